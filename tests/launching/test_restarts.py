"""When a start is another one's turn: locks that others hold, records that come late, and nodes that wait."""

import fcntl
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ardiff.launching import records
from ardiff.launching.command import Launch
from ardiff.launching.job import End, StopRequest
from ardiff.launching.node import Node
from ardiff.launching.supervisor import NotStartedError, _require_free, judge_by_code, supervise

FAKE = str(Path(__file__).with_name("fake_rank.py"))


class Scripted:
    """A job whose starts end at once, as told."""

    def __init__(self, run_dir: Path, ends: list[End], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.run_dir, self.is_first = run_dir, True
        self.lock_patience, self.record_patience = 0.5, 5.0
        self.starts = 0
        self._ends, self._meanwhile = ends, meanwhile

    def prepare(self, again, stop, tell) -> bool:
        return True

    def start(self, tell) -> "Scripted":
        self.starts += 1
        return self

    def wait(self, stop, stop_seconds, in_training, tell) -> End:
        self._meanwhile()
        return self._ends.pop(0)

    def kill(self, stop, tell) -> bool:
        return True

    def close(self) -> None:
        pass


def later(seconds: float, action: Callable[[], object]) -> None:
    threading.Timer(seconds, action).start()


def write(run_dir: Path, reason: str, code: int | None) -> None:
    temporary = run_dir / ".exit"
    temporary.write_text(json.dumps({"reason": reason, "code": code, "step": 7}))
    temporary.replace(run_dir / "exit.json")


@pytest.fixture
def lock(tmp_path):
    """The run_dir, held as a live run does."""
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield held


def test_a_record_that_is_seen_late_is_waited_for(tmp_path):
    """The ranks' last words may come over a network disk."""

    def trains() -> None:
        write(tmp_path, "running", None)
        later(0.5, lambda: write(tmp_path, "user error: x", 2))

    told: list[str] = []
    assert supervise(Scripted(tmp_path, [End(1, False, None)], trains), 0, 1.0, told.append) == 2
    assert told == ["user error: x (exit code 2)"]


@pytest.mark.parametrize("end", [End(1, False, None, killed=True), End(0, False, None)], ids=["killed", "nothing said"])
def test_a_record_that_cannot_come_is_not(tmp_path, end):
    began = time.monotonic()
    supervise(Scripted(tmp_path, [end]), 0, 1.0, lambda _: None)
    assert time.monotonic() - began < 2


def test_a_lost_share_is_cured_where_all_ranks_have_stopped_in_order(tmp_path):
    how = "node2: the connection was lost"
    ends = [End(1, False, None, how=how, unasked=True), End(0, False, None)]
    reasons = iter(["SIGTERM", "finished"])
    job = Scripted(tmp_path, ends, lambda: write(tmp_path, next(reasons), 0))
    (tmp_path / "config.yaml").touch()
    told: list[str] = []
    assert supervise(job, 1, 1.0, told.append) == 0 and job.starts == 2
    assert told[0] == f"{how}; the ranks: SIGTERM (exit code 1)"


def test_a_held_lock_is_waited_for_and_then_a_failure(tmp_path, lock):
    job, told = Scripted(tmp_path, []), []
    with StopRequest() as stop:
        with pytest.raises(NotStartedError, match="still hold"):
            _require_free(job, True, False, stop, told.append)
        assert told == [f"ranks of the last start still hold {tmp_path}: waiting up to 0 s for their end"]
        job.lock_patience = 60.0
        later(0.5, lock.close)
        _require_free(job, True, False, stop, told.append)


def test_a_signal_ends_the_wait_for_a_lock(tmp_path, lock):
    job = Scripted(tmp_path, [])
    job.lock_patience = 60.0
    began = time.monotonic()
    with StopRequest() as stop:
        later(3.0, lambda: signal.raise_signal(signal.SIGTERM))
        _require_free(job, True, False, stop, lambda _: None)
        assert stop.number == signal.SIGTERM and time.monotonic() - began < 20


def test_a_node_that_is_not_the_first_waits_for_the_ranks_of_the_first(tmp_path, lock):
    launch = Launch("torchrun", (1,), (FAKE, "--run_dir", str(tmp_path)), 2, 1, "127.0.0.1", 29500)
    told: list[str] = []
    with StopRequest() as stop:
        assert Node(launch).prepare(False, stop, told.append) and told == []
        later(2.5, lock.close)
        assert Node(launch).prepare(True, stop, told.append)
        assert told == [f"waiting for the first node's ranks of the last start, which hold {tmp_path}"]
        assert records.in_use(tmp_path, 0.0) is False


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (End(241, False, True), 0),  # deepspeed's after SIGTERM
        (End(1, False, True), 0),  # torchrun's
        (End(-9, False, True, killed=True), 1),
        (End(2, False, None, how="node2: ended with 2", unasked=True), 2),
        (End(9, True, None), 1),
        (End(9, True, True), 1),
    ],
)
def test_what_a_program_without_a_run_came_to(end, code):
    assert judge_by_code(end, at_once=False).code == code
