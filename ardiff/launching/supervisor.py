"""Starting a job again after failures that a start can cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import records
from ardiff.launching.command import Launch
from ardiff.launching.job import End, Job, StopRequest

PAUSES = (2.0, 60.0)  # seconds before the first restart, doubled each time, and at most
_NOT_CURED = (cli.EXIT_OK, cli.EXIT_USER_ERROR, cli.EXIT_INTERRUPTED)  # by another start


@dataclass(frozen=True)
class Verdict:
    """What a start came to."""

    code: int
    reason: str
    step: int | None


def supervise(launch: Launch, max_restarts: int, stop_seconds: float, tell: Callable[[str], None]) -> int:
    """Run a job to its end, restarts included; returns its exit code (those of the rank programs, `ardiff.cli`).

    SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which stop with a checkpoint. Raises UserError where a live
    run holds the run_dir.
    """
    run_dir = launch.run_dir
    restarts = 0
    with StopRequest() as stop:
        while True:
            if records.in_use(run_dir):
                raise UserError(f"--run_dir {run_dir}: another run is writing there; stop it or choose another")
            if stop.number is not None:
                return cli.EXIT_OK
            exit_file = records.ExitFile(run_dir)
            job = Job(launch.arguments(), launch.environment(), launch.launcher == "python")
            try:
                end = job.wait(stop, stop_seconds, exit_file.in_training, tell)
            except BaseException:
                job.kill(stop, tell)
                raise
            if end.outlived:
                tell("not started again beside them; when they have gone, the same command goes on (exit code 1)")
                return cli.EXIT_FAILURE
            verdict = judge(end, exit_file.read(), stop.at_once)
            tell(f"{verdict.reason} (exit code {verdict.code})")
            if verdict.code in _NOT_CURED or stop.number is not None:
                return verdict.code
            if restarts == max_restarts:
                if max_restarts:
                    tell(f"all {max_restarts} restarts are used up")
                return verdict.code
            restarts += 1
            if _pause(launch, verdict, restarts, max_restarts, stop, tell):
                tell("stopped while waiting for the restart; the same command goes on")
                return cli.EXIT_OK


def judge(end: End, record: records.Record | None, at_once: bool) -> Verdict:
    """What a start came to, by what the ranks wrote, if they did, and by how the launcher ended.

    at_once: the user did not wait for the stop.
    """
    if at_once:
        return Verdict(cli.EXIT_INTERRUPTED, "ended at once, without a checkpoint", None)
    how = f"ended with {end.code}" if end.code >= 0 else f"died by signal {-end.code}"
    if record is None:
        return _without_record(end, how)
    if record.code is None:
        return Verdict(cli.EXIT_FAILURE, f"killed during training (the launcher {how})", record.step)
    if end.in_training is False and record.code == cli.EXIT_FAILURE:
        return Verdict(cli.EXIT_OK, "stopped before training began", record.step)
    if end.orphaned and record.reason != records.FINISHED and record.code == cli.EXIT_OK:
        return Verdict(cli.EXIT_FAILURE, f"the launcher {how} before its ranks: {record.reason}", record.step)
    return Verdict(record.code, record.reason, record.step)


def _without_record(end: End, how: str) -> Verdict:
    if end.in_training is False:
        return Verdict(cli.EXIT_OK, "stopped before training began", None)
    if end.code in (cli.EXIT_OK, cli.EXIT_USER_ERROR) and not end.orphaned:
        return Verdict(end.code, f"the launcher {how}, and the ranks left no exit.json", None)
    return Verdict(cli.EXIT_FAILURE, f"the launcher {how} before training began", None)


def _pause(
    launch: Launch, verdict: Verdict, restart: int, max_restarts: int, stop: StopRequest, tell: Callable[[str], None]
) -> bool:
    """Note the restart and wait; returns whether a signal came instead."""
    checkpoint = records.newest_checkpoint(launch.run_dir)
    seconds = min(PAUSES[1], PAUSES[0] * 2 ** (restart - 1))
    entry = {"restart": restart, "step": verdict.step, "reason": verdict.reason, "code": verdict.code}
    try:
        records.note_restart(launch.run_dir, {**entry, "resumes_from": checkpoint})
    except OSError as error:
        tell(f"{launch.run_dir}: the restart cannot be noted ({error.strerror})")
    tell(f"restart {restart} of {max_restarts} in {seconds:g} s, from {checkpoint or 'the beginning'}")
    return stop.sleep(seconds)
