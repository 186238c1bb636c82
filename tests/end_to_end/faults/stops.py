"""Signals that ask a run to stop, in the middle of something that takes long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.end_to_end.faults.bench import Bench, Run, Setting, Tally, require

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT = 20.0  # seconds until a run has ended
STEPS = 40
ALONE = {"ranks": 1, "kind": "python"}
SLOW = ("slow_evaluation", 1.0, "FOLDER/slow", "FOLDER/busy")  # a minute and more for one evaluation
EVERY = ("--train.max_steps", str(STEPS), "--train.save_every", "15", "--train.keep_checkpoints", "9")
IN_EVALUATION = Setting(
    (*EVERY, "--train.validate_every", "8", "--data.validation", "VALIDATION"), 1, "python", (SLOW,)
)
IN_PREVIEW = Setting((*EVERY, "--train.sample_every", "8"), 1, "python", (SLOW,))
OF_ONE_RANK = Setting(IN_PREVIEW.extra, faults=(SLOW,))
IN_CHECKPOINT = Setting((*EVERY, "--model.hidden_size", "128", "--train.save_every", "3"), 1, "python")


def stop_in_evaluation(bench: Bench, tally: Tally, rounds: int) -> None:
    """While the averaged weights are measured on held-out videos."""
    _stop(bench, tally, rounds, "stop_in_evaluation", IN_EVALUATION, _busy)


def stop_in_preview(bench: Bench, tally: Tally, rounds: int) -> None:
    """While sample videos are drawn."""
    _stop(bench, tally, rounds, "stop_in_preview", IN_PREVIEW, _busy)


def stop_in_checkpoint(bench: Bench, tally: Tally, rounds: int) -> None:
    """While a checkpoint is being written."""
    _stop(bench, tally, rounds, "stop_in_checkpoint", IN_CHECKPOINT, lambda run: run.being_written() is not None)


def stop_of_one_rank(bench: Bench, tally: Tally, rounds: int) -> None:
    """The second of two ranks gets the signal, while the first draws sample videos and the second waits."""
    _stop(bench, tally, rounds, "stop_of_one_rank", OF_ONE_RANK, _busy, rank=1)


def _busy(run: Run) -> bool:
    return (run.folder / "busy").exists()


def _stop(
    bench: Bench, tally: Tally, rounds: int, name: str, setting: Setting, busy: Callable[[Run], bool], rank: int = 0
) -> None:
    """One run is stopped by one signal after the other, and then finishes."""
    waits = []
    bench.reference(setting)
    run = bench.new_run(name, "run", setting)
    (run.folder / "slow").touch()
    for number in range(rounds):
        (run.folder / "busy").unlink(missing_ok=True)
        run.start()
        begun = run.last_step()
        run.wait_until(lambda: run.last_step() > begun, "a step")  # noqa: B023 - called at once
        run.wait_until(lambda: busy(run), "what is to be disturbed")
        waits.append(_stop_now(run, rank, SIGNALS[number % len(SIGNALS)]))
        tally.rounds += 1
    (run.folder / "slow").unlink()
    run.finish()
    bench.compare(run)
    tally.notes.append(f"stopped after {max(waits):.1f} s at most")


def _stop_now(run: Run, rank: int, number: signal.Signals) -> float:
    assert run.process is not None
    pid = run.process.pid if run.setting.kind == "python" else run.rank_process(rank)
    require(pid is not None, f"rank {rank} is not there: {run.log}")
    assert pid is not None
    begin = time.monotonic()
    os.kill(pid, number)
    code = run.wait(3 * LIMIT)
    seconds = time.monotonic() - begin
    require(seconds < LIMIT, f"{number.name}: it took {seconds:.1f} s to stop: {run.log}")
    require(code == 0, f"{number.name}: exit code {code}: {run.log}")
    require("Traceback" not in run.output, f"{number.name}: a traceback: {run.log}")
    record = run.exit_record()
    require(record["reason"] == number.name and record["code"] == 0, f"exit.json: {record}")
    newest = run.check_checkpoints()[-1].name
    require(newest == f"step_{record['step']:08d}", f"{number.name} at step {record['step']}: the newest is {newest}")
    return seconds
