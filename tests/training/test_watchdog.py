"""Hanging processes: real ones, that stop in the ways in which ranks do."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardiff import cli
from ardiff.training import hangs, watchdog
from ardiff.training.hangs import Answer
from ardiff.training.watchdog import START, Watchdog

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.5  # seconds
RANK = """
import ctypes, logging, os, signal, sys, time
from pathlib import Path
from ardiff.training.watchdog import Watchdog

def stuck_in_the_collective():
    time.sleep(60)

folder, rank, world, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
logging.basicConfig(level=logging.INFO)
watchdog = Watchdog(folder, rank, world, {limit} / 60)
watchdog.patience = {patience}
arm, armed = watchdog._arm, []

def noted():
    arm()
    armed.append(watchdog._allowed)

watchdog._arm = noted
if how in ("waits", "apart"):
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=world)
    dist.all_reduce(torch.ones(5))
with watchdog:
    for step in range(3):
        watchdog.enter("training step", step)
        time.sleep(0.05)
    while watchdog.limit not in armed:  # until the watchdog knows that the first steps are over
        time.sleep(0.01)
    (folder / f"ready{{rank}}").touch()
    while not (folder / "go").exists():  # until all ranks are here
        watchdog.beat()
        time.sleep(0.01)
    if how == "data":
        watchdog.enter("waiting for data", 3)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "held":
        ctypes.PyDLL(None).sleep(60)
    if how == "busy":
        for _ in range(int(4 * {limit} / 0.1)):
            watchdog.beat()
            time.sleep(0.1)
        sys.exit(0)
    if how == "waits":
        dist.all_reduce(torch.ones(7, 3))
    stuck_in_the_collective()
"""


def start(folder: Path, hows: list[str]) -> list[subprocess.Popen[str]]:
    """A rank for each of these ways, all of them beyond their first steps."""
    ranks = []
    # Ranks that all answer may take their time; one that never does is waited for so long.
    silent = {"stopped", "held"} & set(hows) or (folder / "logs").is_file()
    patience = 2.0 if silent else 15.0
    code = RANK.format(limit=LIMIT, patience=patience)
    for rank, how in enumerate(hows):
        command = [sys.executable, "-c", code, str(folder), str(rank), str(len(hows)), how]
        ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    until = time.monotonic() + 60
    while not all((folder / f"ready{rank}").exists() for rank in range(len(hows))):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert not list((folder / "logs").glob("hang_rank?????.txt"))
    (folder / "go").touch()
    return ranks


def wait_until_stopped(rank: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.02)


def finish(ranks: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def record(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


def test_a_rank_alone_leaves_its_stacks_and_a_reason(tmp_path):
    (tmp_path / "logs").mkdir()
    for old in ("hang_rank00000.txt", "hang_rank00007.txt"):
        (tmp_path / "logs" / old).write_text("of an earlier start")
    ranks = start(tmp_path, ["stuck"])  # which looks whether the old ones have gone
    (output,) = finish(ranks)
    assert ranks[0].returncode == cli.EXIT_HUNG == 3
    text = (tmp_path / "logs" / "hang_rank00000.txt").read_text()
    answer = json.loads(text.splitlines()[0])
    assert (answer["phase"], answer["step"], answer["pid"]) == ("training step", 2, ranks[0].pid)
    assert "stuck_in_the_collective" in text and text.count("hread 0x") >= 2  # of all threads
    assert record(tmp_path)["code"] == 3 and record(tmp_path)["step"] == 2
    assert record(tmp_path)["reason"].startswith("hang: no progress for 0.025 min: rank 0 in 'training step' at step 2")
    assert record(tmp_path)["reason"] in output and "stuck_in_the_collective" in output  # both are in the log


def test_the_rank_that_is_elsewhere_is_named(tmp_path):
    ranks = start(tmp_path, ["stuck", "stuck", "data"])
    outputs = finish(ranks)
    assert [rank.returncode for rank in ranks] == [3, 3, 3], outputs
    reason = record(tmp_path)["reason"]
    assert "ranks 0-1 in 'training step' at step 2, rank 2 in 'waiting for data' at step 3" in reason
    assert "likely cause: rank 2 (not where the others are)" in reason
    assert len(list((tmp_path / "logs").glob("hang_rank*.txt"))) == 3


def test_the_collective_that_a_rank_waits_for_is_named(tmp_path):
    finish(start(tmp_path, ["waits", "apart"]))
    waiting, apart = ((tmp_path / "logs" / f"hang_rank0000{rank}.txt").read_text() for rank in range(2))
    ((line,),) = (part.splitlines()[1:] for part in waiting.split("\ncollectives that have not ended")[1:])
    assert re.fullmatch(r"  gloo:all_reduce number 2 of group '0 default_pg', sizes \[\[7, 3\]\], \w+ \d{4}-.*", line)
    assert apart.endswith("collectives that have not ended, the newest last:\n  none\n")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_the_other_tells(tmp_path, stopped):
    ranks = start(tmp_path, ["stopped" if rank == stopped else "stuck" for rank in range(2)])
    other = 1 - stopped
    ranks[other].communicate(timeout=60)
    assert ranks[other].returncode == 3
    ranks[stopped].kill()
    ranks[stopped].communicate()
    reason = record(tmp_path)["reason"]
    assert f"rank {stopped} did not answer" in reason and f"likely cause: rank {stopped};" in reason
    assert record(tmp_path)["code"] == 3
    assert not (tmp_path / "logs" / f"hang_rank{stopped:05d}.txt").exists()


def test_a_library_that_holds_the_interpreter_still_gives_stacks(tmp_path):
    ranks = start(tmp_path, ["stuck", "held"])
    ranks[0].communicate(timeout=60)
    ranks[1].kill()
    ranks[1].communicate()
    assert "rank 1 held inside a library; likely cause: rank 1;" in record(tmp_path)["reason"]
    stacks = (tmp_path / "logs" / "hang_rank00001.txt").read_text()
    assert "did not give the interpreter back" in stacks and "in <module>" in stacks


def test_progress_and_a_suspended_process_are_left_alone(tmp_path):
    ranks = start(tmp_path, ["busy", "busy"])
    for rank in ranks:  # as Ctrl-Z does
        rank.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * LIMIT)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    outputs = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert not (tmp_path / "exit.json").exists()
    assert not list((tmp_path / "logs").iterdir())


def test_a_suspension_within_a_phase_is_not_counted(tmp_path):
    (rank,) = start(tmp_path, ["stopped"])
    wait_until_stopped(rank)
    time.sleep(1.5 * LIMIT)
    resumed = time.monotonic()
    rank.send_signal(signal.SIGCONT)
    finish([rank])
    assert rank.returncode == 3
    assert time.monotonic() - resumed > LIMIT / 2  # and not at once


class Clock:
    """Stands in for `time` and for the event that a watchdog waits on: time passes in these steps, then it is over."""

    def __init__(self, steps: list[float]) -> None:
        self.now, self.steps = 0.0, steps

    def wait(self, _: float) -> bool:
        self.now += self.steps.pop(0) if self.steps else 0.0
        return not self.steps

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("steps", "hangs_at"),
    [
        ([1.0] * 61, 60.0),
        ([1.0] * 59, None),
        ([1.0] * 50 + [300.0] + [1.0] * 59, None),  # suspended in between: it counts anew
        ([1.0] * 50 + [300.0] + [1.0] * 61, 410.0),
        ([11.0] * 6, 66.0),  # slow, but running
    ],
)
def test_only_seconds_that_it_sees_go_by_are_counted(tmp_path, monkeypatch, steps, hangs_at):
    ended = []
    dog = Watchdog(tmp_path, 0, 1, 1.0)
    dog._allowed = dog.limit
    clock = Clock([*steps, 0.0])
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(dog, "_ended", clock)
    monkeypatch.setattr(dog, "_end", lambda *_: ended.append(clock.now))
    dog._watch()
    assert ended[:1] == ([] if hangs_at is None else [hangs_at])


def test_a_full_disk_does_not_hide_a_hang(tmp_path):
    (tmp_path / "logs").write_text("in the way")  # nothing can be written there, not by root either
    ranks = start(tmp_path, ["stuck"])
    (output,) = finish(ranks)
    assert ranks[0].returncode == 3
    assert "rank 0 in 'training step' at step 2" in record(tmp_path)["reason"]
    assert "stuck_in_the_collective" in output


def test_the_first_step_may_take_longer(tmp_path):
    dog = Watchdog(tmp_path, 0, 1, 1.0)
    allowed = []
    for step in (0, 0, 40, 40, 41, 42):  # built, resumed at step 40, one step done, two
        dog.enter("training step", step)
        allowed.append(dog._allowed)
    assert allowed == [60 + START] * 4 + [60] * 2


def test_progress_costs_nothing_that_a_step_would_notice(tmp_path):
    dog = Watchdog(tmp_path, 0, 1, 1.0)
    started = time.thread_time()  # of this thread alone, however busy the machine is
    for step in range(10_000):
        dog.enter("training step", step)
    assert time.thread_time() - started < 0.5  # 50 microseconds each


@pytest.mark.parametrize(
    ("answers", "world", "held", "expected"),
    [
        (
            {0: Answer("training step", 5, 9.0), 1: Answer("waiting for data", 6, 8.0)},
            *(2, set()),
            "rank 0 in 'training step' at step 5, rank 1 in 'waiting for data' at step 6; "
            "likely cause: rank 1 (still for longest)",
        ),
        (
            {rank: Answer("checkpoint", 5, 9.0 - (rank == 2)) for rank in range(4)},
            *(4, set()),
            "ranks 0-3 in 'checkpoint' at step 5; likely cause: rank 2 (still for longest)",
        ),
        (
            {rank: Answer("checkpoint", 5, 9.0) for rank in (0, 3)},
            *(4, {1}),
            "ranks 0, 3 in 'checkpoint' at step 5, rank 1 held inside a library, rank 2 did not answer: stopped, or "
            "held inside a library; likely cause: ranks 1-2",
        ),
        ({0: Answer("sampling", 5, 9.0)}, 1, set(), "rank 0 in 'sampling' at step 5; likely cause: rank 0 (alone)"),
    ],
)
def test_summary(answers, world, held, expected):
    assert hangs.summary(answers, world, held) == expected


def test_half_a_file_is_no_answer(tmp_path):
    (tmp_path / "logs").mkdir()
    hangs.file(tmp_path, 0).write_text('{"rank": 0, "pha')
    hangs.file(tmp_path, 1).write_text('{"phase": "checkpoint", "step": 3, "since": 1.5}\nstacks')
    assert hangs.read(tmp_path, 3) == {1: Answer("checkpoint", 3, 1.5)}
