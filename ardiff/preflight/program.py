"""The order of a preflight: meet, check every rank by itself, check what connects them, report; never wait for ever."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from ardiff import cli
from ardiff.errors import EchoedError, UserError
from ardiff.preflight import compute, devices, host, network, shards, software, storage
from ardiff.preflight.checks import (
    BuildJob,
    Check,
    Context,
    Finding,
    Remark,
    Report,
    TooLongError,
    limited,
    ranks_in_words,
    run_check,
)
from ardiff.preflight.forecast import forecast
from ardiff.preflight.meeting import Meeting, join
from ardiff.preflight.result import Result, assemble
from ardiff.training import distributed

CHECKS = (
    Check("versions", "rank", software.check_versions, software.compare_versions),
    Check("configuration", "rank", software.check_configuration, software.compare_configurations),
    Check("host", "host", host.check_host, host.compare_hosts),
    Check("GPU state", "rank", devices.check_nvml, devices.compare_nvml),  # before anything takes memory there
    Check("devices", "rank", devices.check_devices, devices.compare_devices),
    Check("run_dir", "host", storage.check_run_dir, storage.compare_run_dir),
    Check("shards", "rank", shards.check_shards, shards.compare_shards),
    Check("matrix products", "rank", compute.check_matmul, compute.compare_matmul),
    Check("connection", "world", network.check_connection),
    Check("clocks", "world", network.check_clocks, network.compare_clocks),
    Check("collectives", "world", network.check_collectives, network.compare_collectives),
    Check("links between hosts", "world", network.check_links, network.compare_links),
)
ABANDONED = "abandoned"  # published by the first rank on which a check of all ranks failed
STOPPED = "stopped by a signal before all was done, as launchers do when any rank has ended: see the others' output"
GRACE = 5.0  # seconds for a report that is on its way
Ended = Callable[[Result], int]


class StoppedError(BaseException):
    """SIGTERM or SIGINT: end, leaving nothing behind. No Exception, so that no check takes it for its own."""


def run(
    options: argparse.Namespace,
    overrides: list[str],
    build_job: BuildJob,
    trains: str,
    fixed: tuple[str, ...],
    report: Ended,
    checks: Sequence[Check] = CHECKS,
) -> int:
    """Check everything; returns the exit code, the same on all ranks.

    trains, fixed: of the training program, as for `ardiff.training.program.main`.
    report: called on rank 0 with the result; prints it and returns the exit code.
    """
    begin = time.monotonic()
    distributed.launcher_environment()
    _hear_signals()
    logging.getLogger("ardiff").setLevel(logging.ERROR)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    meeting = join(rank, size, options.timeout)
    with ExitStack() as clean_up:
        hosts = _arrive(meeting, local_rank, options.timeout)
        device = devices.local_device(local_rank)
        context = Context(
            options, overrides, build_job, trains, fixed, meeting, hosts, local_rank, device, options.timeout
        )
        clean_up.enter_context(context.clean_up)
        own = Report(rank, local_rank, hosts[rank])
        patience = Patience(context)
        clean_up.callback(patience.end)
        try:
            hung = _check(context, own, checks, patience.renew)
            code = _conclude(context, own, checks, report, begin) if meeting.is_main else _hear_verdict(context)
        except StoppedError:
            if meeting.is_main:
                with suppress(Exception):
                    _conclude(context, own, checks, report, begin, stopped=True)
            raise
        except dist.DistError:  # the store has gone
            text = f"error: rank {rank} ({context.host}): rank 0 has gone; see its output"
            print(text, file=sys.stderr, flush=True)
            context.clean_up.close()
            os._exit(cli.EXIT_FAILURE)
    _end(meeting, code, hung)
    return code


def _arrive(meeting: Meeting, local_rank: int, limit: float) -> list[str]:
    """The host of every rank. Raises UserError where rank 0 does not answer, or has begun without this rank."""
    try:
        hosts = limited(lambda: meeting.arrive(socket.gethostname(), local_rank, limit), 3 * limit)
    except (TooLongError, dist.DistError) as error:
        raise UserError(f"rank {meeting.rank} waits for rank 0 in vain ({error}): see its output") from error
    if not hosts[meeting.rank]:
        raise UserError(f"rank {meeting.rank} has come later than {limit:g} s after rank 0; raise --timeout")
    return hosts


def _check(context: Context, own: Report, checks: Sequence[Check], step: Callable[[], None]) -> bool:
    """All checks of this rank, left for rank 0; returns whether one that all ranks do was given up, and may hang on."""
    meeting, present = context.meeting, all(context.hosts)
    for check in checks:
        if check.scope == "world":
            continue
        if check.scope == "host" and not context.is_first_of_host:
            continue
        meeting.enter(check.name)
        own.findings[check.name] = run_check(check, context)
        step()
        if check.name == "configuration":
            _agree_on_mistake(context, own.findings[check.name])
            step()
        meeting.post("report", own.as_json())
    for check in checks:
        if check.scope != "world":
            continue
        if not present:
            own.findings[check.name] = Finding(not_checked="not all ranks have come")
            continue
        own.findings[check.name] = _check_together(check, context)
        meeting.post("report", own.as_json())
        step()
        if own.findings[check.name].failures:
            break
    meeting.enter("done")
    meeting.post("done", own.as_json())
    return meeting.has(ABANDONED)


def _check_together(check: Check, context: Context) -> Finding:
    """A check of all ranks: begun by all or none, and given up by all when one has to."""
    meeting = context.meeting
    meeting.enter(f"waiting to begin '{check.name}'")
    # Ranks may be in earlier checks for long: each of those has a limit of its own.
    together = 2 * context.limit if check.name == "connection" else context.limit
    if meeting.has(ABANDONED) or not meeting.gate(check.name, context.size, together):
        meeting.publish(ABANDONED, context.rank)
        return Finding(not_checked="another rank failed, or was not ready, before it")
    meeting.enter(check.name)
    since: list[float] = []

    def give_up() -> str | None:
        if not since and meeting.has(ABANDONED):
            since.append(time.monotonic())
        if since and time.monotonic() - since[0] > GRACE:
            return "given up, as another rank has"
        return meeting.lost()

    found = run_check(check, context, give_up)
    if found.failures:
        meeting.publish(ABANDONED, context.rank)
    return found


def _agree_on_mistake(context: Context, found: Finding) -> None:
    """A configuration that all ranks refuse alike is the user's mistake; raises UserError on all ranks.

    That of some only is a failure of those.
    """
    meeting, ranks = context.meeting, [rank for rank, host in enumerate(context.hosts) if host]
    meeting.post("mistake", found.failures)
    if meeting.is_main:
        meeting.wait_for_all("mistake", ranks, context.limit)
        answers = meeting.collect("mistake").values()
        same = len(answers) == len(ranks) and all(answer and answer == found.failures for answer in answers)
        meeting.publish("mistaken", same)
        if same:
            raise UserError(found.failures[0].partition(": ")[2])
        return
    with suppress(TooLongError):
        if meeting.read("mistaken", 2 * context.limit):
            time.sleep(cli.PATIENCE)  # a launcher would end rank 0 if this process ended first
            raise EchoedError(found.failures[0])


def _conclude(
    context: Context,
    own: Report,
    checks: Sequence[Check],
    report: Ended,
    begin: float,
    stopped: bool = False,
) -> int:
    """Rank 0: collect what the ranks found, compare, report, and tell all the exit code."""
    meeting = context.meeting
    present = [rank for rank, name in enumerate(context.hosts) if name]
    missing = [] if stopped else meeting.wait_for_all("done", present, context.limit + GRACE)
    reports = {0: own}
    for found in (meeting.collect("report"), meeting.collect("done")):
        reports |= {rank: Report.from_json(value) for rank, value in found.items()}
    remarks = [Remark(STOPPED)] if stopped else []
    if absent := [rank for rank, name in enumerate(context.hosts) if not name]:
        text = (
            f"not come within {context.limit:g} s; look whether they were started there, whether they reach "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, or raise --timeout"
        )
        remarks.append(Remark(text, tuple(absent)))
    for rank in missing:
        remarks.append(
            Remark(f"did not finish: {meeting.doing(rank)}; look at the host, its output and its network", (rank,))
        )
    ordered = [reports[rank] for rank in sorted(reports)]
    remarks += _together(checks, ordered, missing)
    estimated: dict[str, Any] = {}
    try:
        estimated, more = forecast(context, ordered)
        remarks += more
    except UserError as error:
        remarks.append(Remark(str(error)))
    result = assemble(ordered, checks, context.hosts, remarks, estimated)
    result.seconds = time.monotonic() - begin
    code = report(result)
    meeting.publish("verdict", code)
    return code


def _together(checks: Sequence[Check], reports: Sequence[Report], missing: Sequence[int]) -> list[Remark]:
    """Failures of checks of all ranks, taken from the ranks that tell them: a rank that waits in vain is not to blame.

    Where ranks are missing, those are, and nothing more is to be said. Otherwise who is to blame is not known.
    """
    failed: dict[str, list[int]] = {}
    for report in reports:
        for check in checks:
            found = report.findings.get(check.name)
            if check.scope != "world" or found is None or not found.failures:
                continue
            for text in found.failures:
                failed.setdefault(text, []).append(report.rank)
            found.not_checked, found.failures = "; ".join(found.failures), []
    if missing:
        return []
    everyone = len(reports)
    return [
        Remark(text if len(ranks) == everyone else f"{text} (on {ranks_in_words(ranks)})")
        for text, ranks in failed.items()
    ]


def _hear_verdict(context: Context) -> int:
    """The exit code, from rank 0."""
    try:
        return int(context.meeting.read("verdict", 3 * context.limit))
    except TooLongError:
        raise UserError("rank 0 has not reported in time: see its output") from None


class Patience:
    """Ends this process when a step takes longer than any can: a store whose host was cut off answers nothing, ever."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seconds = 3 * context.limit + 2 * GRACE  # the longest wait is that for rank 0's verdict
        self._until = time.monotonic() + self._seconds
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="patience", daemon=True).start()

    def renew(self) -> None:
        """A step is done."""
        self._until = time.monotonic() + self._seconds

    def end(self) -> None:
        """Nothing more to watch."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            if time.monotonic() > self._until:
                who = f"rank {self._context.rank} ({self._context.host})"
                text = f"error: {who}: nothing heard for {self._seconds:.0f} s; was this host or rank 0's cut off?"
                print(text, file=sys.stderr, flush=True)
                self._context.clean_up.close()
                os._exit(cli.EXIT_FAILURE)


def _hear_signals() -> None:
    def stop(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise StoppedError(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _end(meeting: Meeting, code: int, hung: bool) -> None:
    """Leave; rank 0 last, as it may keep the store. Where a collective hangs nothing else ends the process."""
    meeting.leave()
    with suppress(dist.DistError):  # rank 0 does not wait for ever
        meeting.store.add("left", 1)
        if meeting.is_main:
            meeting.wait(lambda: meeting.store.add("left", 0) >= meeting.size, GRACE)
    if hung:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    distributed.finish()
