import os
import threading

from ardiff.locks import discard, hold, locked


def test_exclusive_and_shared_locks(tmp_path):
    path = tmp_path / "lock"
    first = hold(path, shared=True)
    second = hold(path, shared=True)
    assert first is not None and second is not None
    assert hold(path, wait=False) is None
    os.close(first)
    os.close(second)
    with locked(path):
        assert hold(path, shared=True, wait=False) is None
    third = hold(path, wait=False)
    assert third is not None
    discard(path, third)
    assert not path.exists()


def test_who_waited_for_a_lock_that_was_deleted_waits_for_the_one_in_its_place(tmp_path):
    path = tmp_path / "lock"
    first = hold(path)
    assert first is not None
    entered = threading.Event()

    def wait():
        with locked(path):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.1)
    path.unlink()
    second = hold(path, wait=False)  # another file of the same name
    assert second is not None
    os.close(first)
    assert not entered.wait(0.1)
    discard(path, second)
    assert entered.wait(5)
    waiting.join()
