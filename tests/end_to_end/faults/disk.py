"""Disks that are full: too small from the start, full in the middle of a checkpoint, full for metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.end_to_end.faults.bench import Bench, NotPossibleError, Run, Setting, Tally, require

STEPS, LEFT = 40, 20
FULL = Setting(
    (
        *("--model.hidden_size", "128", "--train.max_steps", str(STEPS), "--train.save_every", "10"),
        *("--train.keep_checkpoints", "9"),
    ),
    ranks=1,
    kind="python",
)
FULL_ON_TWO = Setting(FULL.extra)
MEGABYTE = 1 << 20
CHECKPOINTS = 30  # megabytes that all checkpoints to come need, and to spare
ROOM = 200  # megabytes: for ten checkpoints of 10 MB, and to spare


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with small_disk(folder, 1):
            return True
    except NotPossibleError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A tmpfs of that size on `folder`. Raises NotPossibleError where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise NotPossibleError(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all the room there is, but for so many megabytes; deleting it makes room again."""
    ballast = disk / ".ballast"
    keep = leave * MEGABYTE
    with ballast.open("ab") as stream:
        while (size := shutil.disk_usage(disk).free - keep) >= 4096:
            try:
                os.posix_fallocate(stream.fileno(), os.fstat(stream.fileno()).st_size, size)
            except OSError:  # somebody else has taken some of it
                continue
    return ballast


def full_at_once(bench: Bench, tally: Tally, rounds: int) -> None:
    """A disk without room for a single checkpoint: told in one line, and nothing half-written stays."""
    for number in range(rounds):
        run = bench.new_run("disk_full_at_once", f"{number:02d}", FULL)
        with small_disk(run.run_dir, 5) as disk, _kept_on_failure(run):
            run.start()
            run.check_tells_mistake(run.wait(), "checkpoint", "room")
            _check_record(run)
            require(not list(run.checkpoints.glob("*")), f"left behind: {list(run.checkpoints.glob('*'))}")
            subprocess.run(["mount", "-o", f"remount,size={ROOM}m", str(disk)], check=True)
            _finish(bench, tally, run)


def full_while_writing(bench: Bench, tally: Tally, rounds: int) -> None:
    """A disk that fills up while a checkpoint is being written: the ones before are intact."""
    tally.hits = 0
    for number in range(rounds):
        setting = (FULL, FULL_ON_TWO)[number % 2]
        run = bench.new_run("disk_full_while_writing", f"{number:02d}", setting)
        with small_disk(run.checkpoints, ROOM) as disk, _kept_on_failure(run):  # the rest of the folder has room
            bench.cut_back(run, LEFT)
            fill(disk, leave=CHECKPOINTS)  # so that little is left to fill in the middle of a write
            run.start()
            run.wait_for_step(LEFT + 5)
            run.wait_until(run.being_written, "a checkpoint")
            ballast = fill(disk)
            tally.hits = (tally.hits or 0) + (run.being_written() is not None)
            run.check_tells_mistake(run.wait(), "checkpoint", "room")
            _check_record(run)
            require(run.check_checkpoints(), "no checkpoint is left")
            require(run.being_written() is None, "half a checkpoint was left")
            ballast.unlink()
            _finish(bench, tally, run)


def full_for_metrics(bench: Bench, tally: Tally, rounds: int) -> None:
    """No room for metrics.jsonl and TensorBoard, while the checkpoints have a disk of their own."""
    for number in range(rounds):
        run = bench.new_run("disk_full_for_metrics", f"{number:02d}", FULL)
        with small_disk(run.run_dir, 8) as disk, small_disk(run.checkpoints, ROOM), _kept_on_failure(run):
            bench.cut_back(run, LEFT)
            run.start()
            run.wait_for_step(LEFT + 3)
            ballast = fill(disk)
            run.check_tells_mistake(run.wait(), "metrics.jsonl")
            require(run.check_checkpoints(), "no checkpoint is left")
            ballast.unlink()
            _finish(bench, tally, run)


def _check_record(run: Run) -> None:
    record = run.exit_record()
    require(record["code"] == 2 and "room" in record["reason"], f"exit.json: {record}")


@contextlib.contextmanager
def _kept_on_failure(run: Run) -> Iterator[None]:
    """A copy of what the disk holds, which is gone with it, where a failure is to be looked at."""
    try:
        yield
    except AssertionError:
        shutil.copytree(run.run_dir, run.folder / "copy", dirs_exist_ok=True)
        raise


def _finish(bench: Bench, tally: Tally, run: Run) -> None:
    """There is room again: go on and compare."""
    run.finish()
    bench.compare(run)
    tally.rounds += 1
