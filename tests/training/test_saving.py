"""Checkpoints written in the background: what they hold, and what happens when they cannot be written."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from training_helpers import TinyRun, join_world

from ardiff import cli
from ardiff.config import load
from ardiff.errors import CheckpointError, UserError
from ardiff.training import checkpoint, saving
from ardiff.training.saving import Saver

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield join_world()
    dist.destroy_process_group()


@pytest.fixture
def gate(monkeypatch):
    """Files are written only once it is set."""
    event = threading.Event()
    write = saving.save_file

    def behind_the_gate(tensors, path):
        assert event.wait(60)
        write(tensors, path)

    monkeypatch.setattr(saving, "save_file", behind_the_gate)
    yield event
    event.set()


def saver_of(run_dir: Path, world, *settings: str) -> Saver:
    return Saver(run_dir, load("tiny", list(settings)), world)


def begin(saver: Saver, run: TinyRun) -> None:
    saver.begin(run.state(), run.flat, run.ema, run.objective, torch.tensor([1.0, 2.0]))


def save(saver: Saver, run: TinyRun) -> Path:
    begin(saver, run)
    saver.wait()
    return checkpoint.newest_valid(saver._run_dir)


def loaded(folder: Path) -> TinyRun:
    """A new training state, from a checkpoint."""
    run = TinyRun(0, 1)
    state = checkpoint.read_state(folder)
    checkpoint.load(folder, state, run.flat, run.ema, run.objective)
    run.step = state.step
    return run


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_it_is_the_state_of_begin_whatever_training_does_then(tmp_path, world, gate, caplog):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    for _ in range(3):
        run.train()
    expected, decays = run.contents(), list(run.ema.decays)
    with caplog.at_level("INFO", logger="ardiff"):
        begin(saver, run)
        assert checkpoint.newest_valid(tmp_path) is None and not saver.failed
        for _ in range(4):  # while nothing has been written yet
            run.train()
        run.ema.decays.append(0.1)
        assert not same(expected, run.contents())
        gate.set()
        saver.wait()
    folder = checkpoint.newest_valid(tmp_path)
    assert names_in(tmp_path) == ["latest", "step_00000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == folder.name
    state = checkpoint.read_state(folder)
    assert (state.step, state.samples, state.adam_steps, state.ema_updates) == (3, 24, [3], [3])
    assert state.ema_decays == decays == [0.9, 0.05]
    assert same(loaded(folder).contents(), expected)
    assert checkpoint.read_probe(folder).tolist() == [1.0, 2.0]
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert sorted(files) == ["config.yaml", "probe.safetensors", "state.json", "state_rank0.safetensors"]
    assert len({(folder / name).stat().st_mode for name in files}) == 1  # readable for whom the others are
    assert f"checkpoint {folder} (training waited {saver.stalled_seconds:.2f} s, written in" in caplog.text


def test_training_goes_on_from_it_as_if_nothing_had_happened(tmp_path, world):
    run = TinyRun(0, 1)
    run.train()
    again = loaded(save(saver_of(tmp_path, world), run))
    for _ in range(3):
        run.train()
        again.train()
    assert same(run.contents(), again.contents())


def test_host_memory_is_used_again(tmp_path, world):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    save(saver, run)
    staged = {name: tensor.data_ptr() for name, tensor in saver._staged.items()}
    run.train()
    assert same(loaded(save(saver, run)).contents(), run.contents())
    assert {name: tensor.data_ptr() for name, tensor in saver._staged.items()} == staged


def test_the_next_one_waits_for_the_one_before(tmp_path, world, gate, caplog, monkeypatch):
    monkeypatch.setattr(saving, "NOTICEABLE", 0.1)
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    run.train()
    begin(saver, run)
    assert "still being written" not in caplog.text
    run.train()
    expected = run.contents()
    wait = saver.wait

    def opens_in_a_while():
        threading.Timer(0.2, gate.set).start()
        wait()

    with monkeypatch.context() as patch:
        patch.setattr(saver, "wait", opens_in_a_while)  # however long it took to come here
        begin(saver, run)
    assert checkpoint.step_directory(tmp_path, 1).is_dir()
    assert 0.2 <= saver.stalled_seconds < 30 and caplog.text.count("still being written") == 1
    saver.wait()
    assert same(loaded(checkpoint.newest_valid(tmp_path)).contents(), expected)
    monkeypatch.setattr(saving, "NOTICEABLE", -1.0)
    begin(saver, run)
    saver.wait()
    assert caplog.text.count("still being written") == 1  # once is enough


def test_one_that_has_ended_is_not_waited_for(tmp_path, world, caplog):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    begin(saver, run)
    saver._thread.join()
    run.train()
    save(saver, run)
    assert "still being written" not in caplog.text


def test_averages_may_be_added_and_dropped(tmp_path, world, caplog):
    run = TinyRun(0, 1)
    for _ in range(3):
        run.train()
    folder = save(saver_of(tmp_path, world), run)
    state = checkpoint.read_state(folder)
    other = TinyRun(0, 1, decays=(0.9, 0.25))
    with caplog.at_level("INFO", logger="ardiff"):
        checkpoint.load(folder, state, other.flat, other.ema, other.objective)
    before, after = run.contents(), other.contents()
    assert torch.equal(after["group0.ema"], before["group0.ema"]) and other.ema.num_updates == state.ema_updates
    assert torch.equal(after["group0.ema_0.25"], before["group0.ema"])
    assert not torch.equal(before["group0.ema_0.05"], before["group0.ema"])
    assert "decay 0.25 is not in the checkpoint" in caplog.text
    assert "no longer kept: the average of decay 0.05" in caplog.text
    main = TinyRun(0, 1, decays=(0.05,))
    checkpoint.load(folder, state, main.flat, main.ema, main.objective)
    assert torch.equal(main.contents()["group0.ema"], before["group0.ema_0.05"])


def test_retention(tmp_path, world):
    settings = ("train.save_every=1", "train.keep_checkpoints=2", "train.keep_every=3")
    saver, run = saver_of(tmp_path, world, *settings), TinyRun(0, 1)
    for _ in range(8):
        run.train()
        begin(saver, run)
    saver.wait()
    assert names_in(tmp_path) == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7, 8))]


def test_what_a_killed_run_left_is_cleared_before_room_is_looked_for(tmp_path, world, monkeypatch):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    left = tmp_path / "checkpoints" / ".step_00000009.tmp"
    left.mkdir(parents=True)

    def usage(path):
        assert not left.exists() and Path(path) == left.parent
        return Usage(2**40, 0, 2**40)

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)
    saver.check_space(run.flat, run.ema, run.objective)
    save(saver, run)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, world, monkeypatch):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    older = save(saver, run)
    bytes_of_it = sum(path.stat().st_size for path in older.iterdir())
    free = [bytes_of_it - 100]
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: Usage(2**40, 0, free[0]))
    run.train()
    with pytest.raises(UserError, match=r"needs 0\.000\d+ GiB, but \S+ GiB are free; make room"):
        begin(saver, run)
    with pytest.raises(UserError, match="needs"):
        saver.check_space(run.flat, run.ema, run.objective)
    saver.wait()
    assert names_in(tmp_path) == ["latest", older.name] and not saver.failed
    free[0] = bytes_of_it + 2 * saving.SMALL_FILES
    assert save(saver, run) == checkpoint.step_directory(tmp_path, 1)


@pytest.mark.parametrize("when", ["tensors", "manifest", "latest"])
def test_a_disk_that_fills_up_while_writing(tmp_path, world, monkeypatch, when):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    older = save(saver, run)
    run.train()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*arguments):
        path = next(argument for argument in arguments if isinstance(argument, Path))
        if when in ("tensors", path.name, path.stem.lower()):
            raise full
        return original(*arguments)

    target = {"tensors": "save_file", "manifest": "write_json", "latest": "write_text"}[when]
    original = getattr(saving, target)
    with monkeypatch.context() as patch:
        patch.setattr(saving, target, fails)
        begin(saver, run)
        with pytest.raises(
            UserError, match=r"step_00000001: .* could not be written .*No space left on device"
        ) as error:
            saver.wait()
    assert "\n" not in str(error.value) and "make room" in str(error.value)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoint.problem_with(older) is None
    if when != "latest":  # which is only a hint: the newest that verifies counts
        assert names_in(tmp_path) == ["latest", older.name]
    run.train()
    assert save(saver, run) == checkpoint.step_directory(tmp_path, 2)


def test_a_failure_shows_without_waiting_and_stops_the_next_begin(tmp_path, world, monkeypatch, gate):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    monkeypatch.setattr(saving, "sync", lambda path: (_ for _ in ()).throw(OSError("no such device")))
    begin(saver, run)
    assert not saver.failed
    gate.set()
    deadline = time.monotonic() + 30
    while not saver.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.train()
    with pytest.raises(CheckpointError, match=r"step_00000000.*no such device"):
        begin(saver, run)
    assert not saver.failed and names_in(tmp_path) == []
    saver.wait()


def test_a_folder_that_cannot_be_made(tmp_path, world):
    (tmp_path / "checkpoints").write_text("a file")
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    begin(saver, run)
    with pytest.raises(UserError, match=r"could not be written .*; earlier ones are intact, mend that and start again"):
        saver.wait()


def of_safetensors(number: int) -> Exception:
    return SafetensorError(f'Error while serializing: I/O error: {os.strerror(number)} (os error {number}) at path "x"')


@pytest.mark.parametrize("target", ["save_file", "write_json", "sync"])
@pytest.mark.parametrize(
    ("failure", "expected", "remedy"),
    [
        (of_safetensors(errno.ENOSPC), UserError, "make room and start again"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError, "make room and start again"),
        (OSError(errno.EROFS, "Read-only file system"), UserError, "mend that and start again"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "intact, start again"),
        (OSError(errno.ESTALE, "Stale file handle"), CheckpointError, "intact, start again"),
        (OSError(errno.ENOENT, "No such file or directory"), CheckpointError, "intact, start again"),
        (of_safetensors(errno.EIO), CheckpointError, "intact, start again"),
        (SafetensorError("header too large"), CheckpointError, "intact, start again"),
    ],
)
def test_only_what_a_user_mends_is_his_mistake(tmp_path, world, monkeypatch, target, failure, expected, remedy):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)

    def fails(*_):
        raise failure

    monkeypatch.setattr(saving, target, fails)
    begin(saver, run)
    with pytest.raises(expected) as error:
        saver.wait()
    assert isinstance(error.value, UserError) == (cli.as_user_error(error.value) is not None) == (expected is UserError)
    text = str(error.value)
    assert "step_00000000: the checkpoint could not be written (" in text and text.endswith(remedy)
    assert str(failure) in text and "\n" not in text
    assert names_in(tmp_path) == []


def test_a_disk_that_does_not_tell_its_room_may_do_so_later(tmp_path, world, monkeypatch):
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale")))
    with pytest.raises(CheckpointError, match="Stale"):
        begin(saver, run)


def test_close_ends_in_time_tells_and_raises_nothing(tmp_path, world, gate, monkeypatch, caplog):
    monkeypatch.setattr(saving, "PATIENCE", 0.2)
    saver, run = saver_of(tmp_path, world), TinyRun(0, 1)
    assert saver.close() and not caplog.text
    begin(saver, run)
    start = time.monotonic()
    assert not saver.close()
    assert time.monotonic() - start < 30
    assert caplog.text.count("not written after 0.2 s more and is given up") == 1
    gate.set()
    saver.wait()
    monkeypatch.setattr(saving, "_finish", None)
    begin(saver, run)
    assert saver.close() and saver.failed
    assert caplog.text.count("given up") == 1


# Two ranks: what the driver below asserts on each, with the main threads talking while the others write.
SCRIPT = """
import errno, os, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from ardiff.config import load
from ardiff.errors import CheckpointError, EchoedError, UserError
from ardiff.training import checkpoint, saving
from training_helpers import TinyRun, join_world

run_dir, end = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{run_dir}/rendezvous", rank=int(os.environ["RANK"]), world_size=2)
world = join_world()
saver, run = saving.Saver(run_dir, load("tiny"), world), TinyRun(world.rank, world.size)
write, gate = saving.save_file, threading.Event()

def raised(call):
    try:
        call()
    except UserError as error:
        assert isinstance(error, EchoedError) == (world.rank == 1), error
        return str(error)
    raise AssertionError("nothing was raised")

def begin():
    saver.begin(run.state(), run.flat, run.ema, run.objective, torch.ones(3) if world.is_main else None)

def nowhere(tensors, path):
    raise OSError(errno.ENOSPC, "No space left on device")

def slowly(tensors, path):
    assert gate.wait(60)
    write(tensors, path)

run.train()
if world.rank == 1:
    saving.save_file = slowly
begin()
for _ in range(20):  # the main threads go on talking
    run.train()
    assert world.gather(run.step) == [run.step] * 2
assert saver._thread.is_alive()
gate.set()
saver.wait()

saving.save_file = write if world.is_main else nowhere
begin()
message = raised(saver.wait)
assert "rank 1: [Errno 28] No space left" in message and "step_00000021" in message, message

def stale(*_):
    raise OSError(errno.ESTALE, "Stale file handle")

def failure(**changed):
    # What a checkpoint ends with, where these functions are others.
    before = {name: getattr(saving, name) for name in changed}
    vars(saving).update(changed)
    begin()
    try:
        saver.wait()
    except (CheckpointError, UserError) as error:
        assert "step_00000021: the checkpoint could not be written" in str(error) and "intact" in str(error), error
        vars(saving).update(before)
        return error
    raise AssertionError("nothing was raised")

saving.save_file = write
for change in ({"save_file": write if world.is_main else stale}, {"write_json": stale}):  # another start may cure it
    error = failure(**change)
    assert isinstance(error, CheckpointError) and "Stale" in str(error), error
both = failure(save_file=stale if world.is_main else nowhere)  # but not this, unless a user makes room
assert isinstance(both, UserError) and "No space" in str(both), both
saving.save_file = write
usage = saving.shutil.disk_usage
if world.is_main:
    saving.shutil.disk_usage = lambda path: type("Usage", (), {"free": 1000})
assert "make room" in raised(begin)
assert "make room" in raised(lambda: saver.check_space(run.flat, run.ema, run.objective))
saving.shutil.disk_usage = usage
assert not saver.failed

if end == "death":
    saving.PATIENCE = 5
    if world.rank == 1:
        saving.save_file = lambda tensors, path: os._exit(9)
    begin()
    assert saver.close() and saver.failed
    try:
        saver.wait()
    except CheckpointError as error:
        assert "could not be written" in str(error) and "\\n" not in str(error), error
        print("LOST", error)
else:  # hang: a disk that never answers
    saving.PATIENCE = 0.5
    if world.rank == 1:
        saving.save_file = lambda tensors, path: time.sleep(1000)
    begin()
    assert not saver.close() and not saver.failed
    print("GAVE UP")
    if world.rank == 1:
        sys.stdin.read()  # until rank 0 has gone
dist.destroy_process_group()
"""


def two_ranks(run_dir: Path, end: str) -> list[tuple[int, str]]:
    """Exit code and output of both."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(run_dir), end],
            env={**environment, "RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def test_two_ranks(tmp_path):
    """They write one checkpoint, which one rank can load; what fails on one fails on both, and leaves nothing behind.

    At the end the disk of a rank hangs, and neither process does.
    """
    for code, output in two_ranks(tmp_path, "hang"):
        assert code == 0 and "GAVE UP" in output, output
    assert names_in(tmp_path) == [".step_00000021.tmp", "latest", "step_00000001"]
    folder = checkpoint.newest_valid(tmp_path)
    state = checkpoint.read_state(folder)
    assert state.world_size == 2 and len(state.slices) == 2 and state.step == 1
    run = TinyRun(0, 1)
    run.train()
    assert same(loaded(folder).contents(), run.contents())


def test_a_rank_that_dies_while_writing_keeps_nobody(tmp_path):
    (code, output), (died, _) = two_ranks(tmp_path, "death")
    assert died == 9 and code == 0 and "LOST" in output, output
    assert names_in(tmp_path) == [".step_00000021.tmp", "latest", "step_00000001"]
