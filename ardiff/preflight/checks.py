"""What a check is, what it finds, and running one so that a disk or driver that hangs does not hang the others."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from ardiff import cli
from ardiff.config import Config
from ardiff.training.distributed import World
from ardiff.training.job import Job

if TYPE_CHECKING:
    from ardiff.preflight.meeting import Meeting

# rank: every rank by itself; host: one rank of each host, by itself; world: all ranks together, with collectives
Scope = Literal["rank", "host", "world"]
BuildJob = Callable[[Config], Job]


@dataclass
class Finding:
    """What a check found on one rank. Every failure and warning is one line with its remedy."""

    figures: dict[str, Any] = field(default_factory=dict)  # for the report; numbers, strings and lists
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: str | None = None  # why there is nothing


@dataclass
class Report:
    """What one rank has found, and where it runs."""

    rank: int
    local_rank: int
    host: str
    findings: dict[str, Finding] = field(default_factory=dict)  # by check

    def figure(self, name: str) -> Any:
        """A figure of whichever check has it; None where it was not measured."""
        return next((found.figures[name] for found in self.findings.values() if name in found.figures), None)

    def as_json(self) -> dict[str, Any]:
        """To be sent to rank 0."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Report:
        """What `as_json` made."""
        findings = {name: Finding(**found) for name, found in value["findings"].items()}
        return Report(value["rank"], value["local_rank"], value["host"], findings)


@dataclass(frozen=True)
class Remark:
    """What shows only when the ranks are compared: a failure or warning of some ranks, or of none in particular."""

    text: str
    ranks: tuple[int, ...] = ()
    warning: bool = False
    outlier: bool = False  # these ranks compute or communicate far more slowly than the others


@dataclass
class Context:
    """What checks know of this process; `config`, `ds_settings`, `job` and `world` come with those that make them."""

    options: argparse.Namespace
    overrides: list[str]
    build_job: BuildJob
    trains: str  # what the run trains, as in `Job.name`
    fixed: tuple[str, ...]  # sections and settings that a run_dir is made for
    meeting: Meeting
    hosts: list[str]  # of every rank
    local_rank: int
    device: torch.device
    limit: float  # seconds that any check may take
    config: Config | None = None
    ds_settings: dict[str, Any] | None = None
    job: Job | None = None
    world: World | None = None
    clean_up: ExitStack = field(default_factory=ExitStack)  # what must be done however the program ends

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.meeting.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.meeting.size

    @property
    def host(self) -> str:
        """Of this process."""
        return self.hosts[self.rank]

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of every host, both in the order of the ranks."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            if host:
                found.setdefault(host, []).append(rank)
        return found

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank does what is done once on a host."""
        return self.nodes[self.host][0] == self.rank

    @property
    def run_size(self) -> int:
        """How many ranks the run will have: spare hosts may be checked along."""
        return int(self.options.world_size or self.size)

    @property
    def quick(self) -> bool:
        """Whether measurements are to be short."""
        return bool(self.options.quick)


@dataclass(frozen=True)
class Check:
    """One named check: what every rank does, and what is compared on rank 0 when all have done it."""

    name: str
    scope: Scope
    run: Callable[[Context], Finding]
    compare: Callable[[Sequence[Report]], list[Remark]] = lambda _: []


class TooLongError(RuntimeError):
    """Something has not ended within its time."""


def limited(act: Callable[[], Any], seconds: float, give_up: Callable[[], str | None] = lambda: None) -> Any:
    """The result of `act`, in a thread of its own. Raises what it raises, and TooLongError when it takes longer, or
    with the reason as soon as `give_up` has one; the thread is then left alone, as it cannot be ended.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((act(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="check", daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(0.1)
        if not thread.is_alive():
            break
        reason = give_up()
        if reason is not None:
            raise TooLongError(reason)
        if time.monotonic() > until:
            raise TooLongError(f"no answer within {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def run_check(check: Check, context: Context, give_up: Callable[[], str | None] = lambda: None) -> Finding:
    """Run a check within its time; whatever goes wrong in it is a failure of this rank, and not of the program."""

    def act() -> Finding:
        if context.device.type == "cuda" and torch.cuda.is_initialized():  # the current device is a thread's own
            torch.cuda.set_device(context.device)
        return check.run(context)

    try:
        return limited(act, context.limit, give_up)
    except TooLongError as error:
        where = "" if check.scope == "world" else "; what it asks (a disk, a driver) hangs: see dmesg and the mounts"
        return Finding(failures=[f"{check.name}: {error}{where}"])
    except Exception as error:
        mistake = cli.as_user_error(error)
        text = " ".join(str(mistake if mistake is not None else error).split()) or type(error).__name__
        kind = "" if mistake is not None else f"{type(error).__name__}: "
        return Finding(failures=[f"{check.name}: {kind}{text}"])


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-7, 9`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {words}"
