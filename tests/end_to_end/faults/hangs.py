"""Ranks that make no progress, and runs that take longer than they may."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace

from tests.end_to_end.faults.bench import INJECT, Bench, Run, Setting, Tally, require
from tests.end_to_end.faults.kills import expect_no_processes

STEPS, HANGING_STEP = 40, 17
EXIT_HANG = 3
HANG_SECONDS = 12.0  # longer than anything healthy takes, on a busy machine too
WATCHED = (
    *("--train.max_steps", str(STEPS), "--train.save_every", "5", "--train.keep_checkpoints", "9"),
    *("--train.hang_minutes", str(HANG_SECONDS / 60), "--train.collective_timeout_minutes", "2"),
)
HANGS = Setting(WATCHED, faults=(("hang", 1, HANGING_STEP, "FOLDER/has_hung"),))
STOPPED = Setting(WATCHED)
LONG = 240
UNLIMITED = Setting(
    ("--train.max_steps", str(LONG), "--train.save_every", "50", "--model.hidden_size", "128"), 1, "python"
)
PATIENCE = 90.0  # seconds until torchrun has killed a rank that does not react


def hang(bench: Bench, tally: Tally, rounds: int) -> None:
    """A rank that sleeps for ever in a step: found, named, all stacks written, all ranks ended; then it goes on."""
    waits = []
    bench.reference_with_file(HANGS, "has_hung")  # the same command, and no rank hangs
    for number in range(rounds):
        run = bench.new_run("hang", f"{number:02d}", HANGS)
        run.start()
        run.wait_until((run.folder / "has_hung").exists, "the hang")
        waits.append(_check_found(run))
        reason = run.exit_record()["reason"]
        require("in 'training step'" in reason, f"exit.json does not say what the ranks did: {reason}")
        _check_stacks(run)
        run.finish()
        bench.compare(run)
        tally.rounds += 1
    tally.notes.append(f"ended after {max(waits):.0f} s at most")


def stopped_rank(bench: Bench, tally: Tally, rounds: int) -> None:
    """SIGSTOP of a rank: it can tell nothing itself, so the others have to."""
    waits, rng = [], bench.random("stopped_rank")
    bench.reference(STOPPED)
    for number in range(rounds):
        rank = number % 2
        run = bench.new_run("stopped_rank", f"{number:02d}", STOPPED)
        run.start()
        run.wait_for_step(rng.randint(5, 20))
        pid = run.rank_process(rank)
        require(pid is not None, f"rank {rank} is not there")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        waits.append(_check_found(run, rank))
        run.finish()
        bench.compare(run)
        tally.rounds += 1
    tally.notes.append(f"ended after {max(waits):.0f} s at most")


def _check_found(run: Run, rank: int = 1) -> float:
    """The hang of a rank must end the run by itself, and be told."""
    begin = time.monotonic()
    code = run.wait(PATIENCE)
    expect_no_processes(run, 10)
    require(code != 0, f"the launcher ended with 0: {run.log}")
    record = run.exit_record()
    require(record["code"] == EXIT_HANG, f"exit.json: {record}")
    require(f"rank {rank}" in record["reason"], f"exit.json does not name rank {rank}: {record}")
    witnesses = sorted(path.name for path in (run.run_dir / "logs").glob("hang_rank*.txt"))
    require(witnesses, f"no stacks in {run.run_dir / 'logs'}")
    for name in witnesses:
        text = (run.run_dir / "logs" / name).read_text()
        require("File " in text and "line " in text, f"{name} holds no stack: {text[:200]!r}")
    return time.monotonic() - begin


def _check_stacks(run: Run) -> None:
    """All ranks answered, and the stack of the one that hangs, rank 1, begins where it does."""
    for rank in range(run.setting.ranks):
        text = (run.run_dir / "logs" / f"hang_rank{rank:05d}.txt").read_text()
        innermost = re.findall(r'most recent call first\):\n  File "([^"]*)"', text)
        require((str(INJECT) in innermost) == (rank == 1), f"the stacks of rank {rank}: {innermost}")


def time_limit(bench: Bench, tally: Tally, rounds: int) -> None:
    """A run that may only take so long each time ends as planned, again and again, until it is done."""
    minutes = f"{0.5 * bench.seconds(UNLIMITED) / 60:.3f}"
    limited = replace(UNLIMITED, extra=(*UNLIMITED.extra, "--train.time_limit_minutes", minutes))
    for number in range(rounds):
        run = bench.new_run("time_limit", f"{number:02d}", limited)
        while True:
            run.start()
            code = run.wait()
            require(code == 0, f"exit code {code}: {run.log}")
            record = run.exit_record()
            if record["reason"] == "finished":
                break
            require(record["reason"] == "time limit" and record["code"] == 0, f"exit.json: {record}")
            newest = run.check_checkpoints()[-1].name
            require(newest == f"step_{record['step']:08d}", f"the newest checkpoint is {newest}: {record}")
            require(run.starts < 30, "it does not come to an end")
            tally.rounds += 1
        require(run.starts > 1, f"a limit of {minutes} minutes never ended it")
        run.setting = UNLIMITED  # with which it is compared
        bench.compare(run)
