"""Starting a job again after failures that a start can cure."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import records
from ardiff.launching.job import End, StopRequest, Tell

PAUSES = (2.0, 60.0)  # seconds before the first restart, doubled each time, and at most
_NOT_CURED = (cli.EXIT_OK, cli.EXIT_USER_ERROR, cli.EXIT_INTERRUPTED)  # by another start


class NotStartedError(RuntimeError):
    """A job that ran cannot be started again as things are; the message says what to do."""


class InUseError(UserError):
    """A live run holds the run_dir."""


class Running(Protocol):
    """A job that has been started."""

    def wait(self, stop: StopRequest, stop_seconds: float, in_training: records.Asked | None, tell: Tell) -> End:
        """Until every process has gone. in_training: None for programs that keep no run."""
        ...

    def kill(self, stop: StopRequest, tell: Tell) -> bool:
        """End every process at once; returns whether they have gone."""
        ...


class Start(Protocol):
    """A job that can be started, more than once: on this machine (`node.Node`) or on many hosts (`remote.Fleet`)."""

    run_dir: Path | None  # where the ranks write how they ended; None: only the launcher's code says it
    is_first: bool  # of the nodes: it keeps the notes, and finds the run_dir free
    lock_patience: float  # more seconds for the lock of a start that was lost
    record_patience: float  # seconds for a record that another host writes

    def prepare(self, again: bool, stop: StopRequest, tell: Tell) -> bool:
        """Find out where it can run; False: a signal came. Raises UserError at first, NotStartedError `again`."""
        ...

    def start(self, tell: Tell) -> Running:
        """Start it there."""
        ...

    def close(self) -> None:
        """After the last one."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What a start came to."""

    code: int
    reason: str  # empty: nothing that need be told
    step: int | None
    curable: bool = True  # by another start, as far as this start tells


def supervise(
    job: Start,
    max_restarts: int,
    stop_seconds: float,
    tell: Tell,
    heard: StopRequest | None = None,
    requeued: bool = False,
) -> int:
    """Run a job to its end, restarts included; returns its exit code (those of the rank programs, `ardiff.cli`).

    SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which stop with a checkpoint; heard: remembers them, for a
    caller who wants to know. requeued: an earlier call's ranks may still be ending somewhere. Raises InUseError where
    a live run holds the run_dir, and UserError where the job cannot be started at all.
    """
    restarts = 0
    with heard or StopRequest() as stop, closing(job):
        while True:
            verdict = _run_once(job, restarts > 0, requeued, stop, stop_seconds, tell)
            if verdict.reason:
                tell(f"{verdict.reason} (exit code {verdict.code})")
            if not verdict.curable or verdict.code in _NOT_CURED or stop.number is not None:
                return verdict.code
            if restarts == max_restarts:
                if max_restarts:
                    tell(f"all {max_restarts} restarts are used up")
                return verdict.code
            restarts += 1
            if _pause(job, verdict, restarts, max_restarts, stop, tell):
                tell("stopped while waiting for the restart; the same command goes on")
                return cli.EXIT_OK


def _run_once(job: Start, again: bool, requeued: bool, stop: StopRequest, stop_seconds: float, tell: Tell) -> Verdict:
    try:
        ready = stop.number is None and job.prepare(again, stop, tell)
        _require_free(job, again, requeued, stop, tell)
    except NotStartedError as error:
        return Verdict(cli.EXIT_FAILURE, f"{error}", None, curable=False)
    if not ready or stop.number is not None:
        return Verdict(cli.EXIT_OK, "stopped before the start; the same command goes on", None)
    exit_file = records.ExitFile(job.run_dir) if job.run_dir else None
    running = job.start(tell)
    try:
        end = running.wait(stop, stop_seconds, exit_file.in_training if exit_file else None, tell)
    except BaseException:
        running.kill(stop, tell)
        raise
    if end.outlived:
        reason = "not started again beside them; when they have gone, the same command goes on"
        return Verdict(cli.EXIT_FAILURE, reason, None, curable=False)
    if exit_file is None:
        return judge_by_code(end, stop.at_once)
    killed = stop.at_once or end.killed  # then what it shows is all there is
    nothing = job.is_first and end.code == cli.EXIT_OK and exit_file.read() is None  # perhaps --help
    return judge(end, exit_file.final(0.0 if killed or nothing else job.record_patience), stop.at_once)


def _require_free(job: Start, again: bool, requeued: bool, stop: StopRequest, tell: Tell) -> None:
    if not (job.is_first and job.run_dir and stop.number is None and records.in_use(job.run_dir)):
        return
    patience = job.lock_patience
    if (again or requeued) and patience:
        tell(f"ranks of the last start still hold {job.run_dir}: waiting up to {patience:.0f} s for their end")
        if not records.in_use(job.run_dir, patience, lambda: stop.number is not None) or stop.number is not None:
            return
    if again:
        raise NotStartedError(
            f"not started again: ranks of the last start still hold {job.run_dir}, perhaps on a host that was lost; "
            "when they have ended, the same command goes on"
        )
    raise InUseError(f"--run_dir {job.run_dir}: another run is writing there; stop it or choose another")


def judge(end: End, record: records.Record | None, at_once: bool) -> Verdict:
    """What a start came to, by what the ranks wrote, if they did, and by how the launcher ended.

    at_once: the user did not wait for the stop.
    """
    if at_once:
        return Verdict(cli.EXIT_INTERRUPTED, "ended at once, without a checkpoint", None)
    if record is None:
        return _without_record(end)
    if record.code is None:
        return Verdict(cli.EXIT_FAILURE, f"killed during training ({end.describe()})", record.step)
    if end.in_training is False and record.code == cli.EXIT_FAILURE:
        return Verdict(cli.EXIT_OK, "stopped before training began", record.step)
    if (end.orphaned or end.unasked) and record.reason != records.FINISHED and record.code == cli.EXIT_OK:
        # Ranks of a host that is lost, or without their launcher, stop in order, and all others with them.
        how = f"{end.describe()}; the ranks" if end.unasked else f"{end.describe()} before its ranks"
        return Verdict(cli.EXIT_FAILURE, f"{how}: {record.reason}", record.step)
    where = f"; first, {end.how}" if end.how and record.code == cli.EXIT_FAILURE else ""
    return Verdict(record.code, f"{record.reason}{where}", record.step)


def judge_by_code(end: End, at_once: bool) -> Verdict:
    """What a program that keeps no run came to."""
    if at_once:
        return Verdict(cli.EXIT_INTERRUPTED, "ended at once", None)
    if end.orphaned:
        return Verdict(cli.EXIT_FAILURE, f"{end.describe()} before its ranks", None)
    if end.in_training is not None and not end.killed:  # launchers have many codes for what has heard a signal
        return Verdict(cli.EXIT_OK, "", None)
    return Verdict(end.code if end.code >= 0 else cli.EXIT_FAILURE, end.describe() if end.code else "", None)


def _without_record(end: End) -> Verdict:
    if end.in_training is False:
        return Verdict(cli.EXIT_OK, "stopped before training began", None)
    if end.code in (cli.EXIT_OK, cli.EXIT_USER_ERROR) and not end.orphaned:
        return Verdict(end.code, f"{end.describe()}, and the ranks left no exit.json", None)
    return Verdict(cli.EXIT_FAILURE, f"{end.describe()} before training began", None)


def _pause(job: Start, verdict: Verdict, restart: int, max_restarts: int, stop: StopRequest, tell: Tell) -> bool:
    """Note the restart and wait; returns whether a signal came instead."""
    assert job.run_dir is not None
    checkpoint = records.newest_checkpoint(job.run_dir)
    seconds = min(PAUSES[1], PAUSES[0] * 2 ** (restart - 1))
    entry = {"restart": restart, "step": verdict.step, "reason": verdict.reason, "code": verdict.code}
    try:
        if job.is_first:
            records.note_restart(job.run_dir, {**entry, "resumes_from": checkpoint})
    except OSError as error:
        tell(f"{job.run_dir}: the restart cannot be noted ({error.strerror})")
    tell(f"restart {restart} of {max_restarts} in {seconds:g} s, from {checkpoint or 'the beginning'}")
    return stop.sleep(seconds)
