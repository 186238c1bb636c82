"""The hosts of a job: chosen and checked before every start, and the command that each of them gets."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ardiff.errors import UserError
from ardiff.launching import checks, hostcheck
from ardiff.launching.carriers import JOB, Carrier, shell_line
from ardiff.launching.checks import Choice, Hosts
from ardiff.launching.command import check_port, check_program, new_job, run_dir_of
from ardiff.launching.environment import Variables
from ardiff.launching.hostfile import Host, names
from ardiff.launching.job import StopRequest, Tell
from ardiff.launching.node import RECORD_PATIENCE, SILENCE, payload
from ardiff.launching.remote import RemoteJob, Share, end_on
from ardiff.launching.supervisor import NotStartedError

LOCK_MARGIN = 30.0  # seconds beyond those that the ranks of a lost host have, until their run_dir must be free
LOOK_AGAIN = 5.0  # seconds between looks at hosts that are waited for


class NoHostsError(UserError):
    """Hosts that the job needs cannot be used."""


@dataclass(frozen=True)
class Settings:
    """How a job is started on its hosts."""

    launcher: str
    command: tuple[str, ...]  # the program and its options
    variables: Variables
    stop_seconds: float  # of the primitive, for a last checkpoint
    fail_seconds: float = 120.0  # for the other hosts once one has failed
    rejoin_seconds: float = 120.0  # for a lost host to be back before a restart, where there is no spare
    min_nodes: int | None = None  # fewer hosts than these are never taken; None: all of them are needed
    master_addr: str | None = None
    master_port: int | None = None


def check_hosts(launcher: str, hosts: int, min_nodes: int | None) -> None:
    """Raises UserError for what cannot be started on so many hosts."""
    if launcher == "python":
        raise UserError("--launcher python: starts one process; for hosts use torchrun or deepspeed")
    if min_nodes is not None and not 1 <= min_nodes <= hosts:
        raise UserError(f"--min_nodes {min_nodes}: must be from 1 to {hosts}, the number of hosts")


class Fleet:
    """A job on many hosts: what `supervise` starts, and starts again."""

    def __init__(self, hosts: Sequence[Host], spares: Sequence[Host], carrier: Carrier, settings: Settings) -> None:
        """Raises UserError for what cannot be started anywhere."""
        check_program(settings.command, sum(host.slots for host in hosts))
        check_hosts(settings.launcher, len(hosts), settings.min_nodes)
        if settings.master_port is not None:
            check_port(settings.master_port)
        self.run_dir = run_dir_of(settings.command)
        self.is_first = True
        self.lock_patience = SILENCE + settings.fail_seconds + LOCK_MARGIN
        self.record_patience = RECORD_PATIENCE
        self.hosts, self.spares = list(hosts), list(spares)
        self._carrier, self._settings = carrier, settings
        shared = checks.shared_folder(self.run_dir) or (None if carrier.forwards_stdin else Path.cwd())
        self._asking = Hosts(carrier, shared)
        self._dropped: dict[str, str] = {}  # hosts that are not to be used again, and why
        self._folder: Path | None = None  # with the variables, where standard input does not carry them
        self._running: RemoteJob | None = None
        self._meeting = ("", 0)  # address and port of the first host

    def prepare(self, again: bool, stop: StopRequest, tell: Tell) -> bool:
        """Check the hosts, take spares, end what an earlier start left; False: a signal came.

        Raises UserError at first and NotStartedError `again` where there are not enough hosts.
        """
        choice = self._choose(again, stop, tell)
        if choice is None:
            return False
        for warning in [] if again else checks.warnings(self.hosts, choice.facts, self._settings.variables.values):
            tell(warning)
        self._end_left(tell)
        return True

    def start(self, tell: Tell) -> RemoteJob:
        """Start every host's share."""
        address, port = self._meeting
        where = f"address {address}, port {port}"
        tell(f"{sum(host.slots for host in self.hosts)} rank(s) on {', '.join(names(self.hosts))}, {where}")
        job = new_job()
        self.close()  # what the last start left
        delivered = [self._deliver(job, node) for node in range(len(self.hosts))]  # a fast host removes an empty folder
        shares = []
        for node, (host, (source, first)) in enumerate(zip(self.hosts, delivered, strict=True)):
            line = self._line(f"{job}.{node}", node, source, address, port)
            words, variables = self._carrier.command(host.name, line), self._carrier.environment()
            shares.append(Share(host, f"{job}.{node}", words, variables, first))
        left = self._running.left if self._running else []
        self._running = RemoteJob(self._asking, shares, self._settings.fail_seconds)
        self._running.left += left  # until their host has answered
        return self._running

    def close(self) -> None:
        """Remove the variables where nobody has fetched them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _end_left(self, tell: Tell) -> None:
        """End what earlier starts left on hosts that could not be reached then."""
        if self._running is None or not self._running.left:
            return
        with ThreadPoolExecutor(len(self._running.left)) as pool:
            found = list(pool.map(lambda share: end_on(self._asking, share.host, share.job), self._running.left))
        for share, alive in zip(self._running.left, found, strict=True):
            if alive:
                tell(f"{share.host.name}: SIGKILL does not end {alive} of the last start")
        self._running.left = [share for share, alive in zip(self._running.left, found, strict=True) if alive is None]

    def drop(self, problems: dict[str, str]) -> None:
        """Use these hosts no more, for these reasons."""
        self._dropped |= problems

    def _choose(self, again: bool, stop: StopRequest, tell: Tell) -> Choice | None:
        """Fix the hosts, and the address and port of the first. None: a signal came while waiting."""
        until = time.monotonic() + (self._settings.rejoin_seconds if again else 0.0)
        told: list[str] = []
        while True:
            choice, meeting = self._look()
            if stop.number is not None:
                return None
            needed = len(self.hosts) if self._settings.min_nodes is None else self._settings.min_nodes
            if len(choice.hosts) >= needed:
                break
            if time.monotonic() > until or all(host.name in self._dropped for host in choice.missing):
                raise self._refusal(choice, again)
            if told != choice.problems:
                told = choice.problems
                for line in told:
                    tell(f"{line}; waiting for it")
            if stop.sleep(LOOK_AGAIN):
                return None
        for line in [*choice.changes, *([] if again else choice.spares)]:
            tell(line)
        if choice.missing:
            tell(f"going on with {len(choice.hosts)} of {len(self.hosts)} hosts, as --min_nodes allows:")
            for line in choice.problems:
                tell(line)
        gone = [host for host in self.hosts if host not in choice.hosts]
        used = names(choice.hosts)
        self.spares = [spare for spare in [*self.spares, *gone] if spare.name not in used]  # they may come back
        self.hosts = choice.hosts
        self._meeting = meeting
        return choice

    def _look(self) -> tuple[Choice, tuple[str, int]]:
        """The hosts that answer well, and that reach the first of them."""
        excluded = dict(self._dropped)
        while True:
            choice = self._asking.choose(self.hosts, self.spares, excluded)
            if not choice.hosts:
                return choice, ("", 0)
            first = choice.hosts[0]
            port = self._settings.master_port or int(choice.facts[first.name]["port"])
            if len(choice.hosts) == 1:
                return choice, ("127.0.0.1", port)
            given = self._settings.master_addr
            addresses = [given] if given else checks.addresses_of(first, choice.facts[first.name])
            address, problems = self._asking.meet(choice.hosts, port, addresses)
            if not problems:
                return choice, (given or address, port)
            excluded |= problems

    def _refusal(self, choice: Choice, again: bool) -> Exception:
        lines = "".join(f"\n  {line}" for line in [*choice.problems, *choice.spares])
        away = f"{len(choice.missing)} of {len(self.hosts)} hosts cannot be used"
        if again:
            remedy = "the same command goes on once they are back, or with " + (
                "--min_nodes" if self._carrier.name == "srun" else "other hosts, --spares or --min_nodes"
            )
            return NotStartedError(f"not started again: {away}; {remedy}{lines}")
        remedy = "take them out of the hostfile, or name --spares"
        if self._carrier.name == "srun":
            remedy = "have SLURM leave them out (--exclude), or go on with fewer (--min_nodes)"
        return NoHostsError(f"{away}: mend them, {remedy}{lines}")

    def _deliver(self, job: str, node: int) -> tuple[str, bytes]:
        """Where a node finds its variables, and what goes over standard input."""
        own = self._settings
        data = payload(dict(own.variables.values), self._carrier.forwards_stdin, own.fail_seconds)
        if self._carrier.forwards_stdin:
            return "-", data
        assert self._asking.shared is not None
        self._folder = self._asking.shared / f".ardiff-{job}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        file = self._folder / f"{node}.json"
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as target:
            target.write(data)
        return str(file), b""

    def _line(self, mark: str, node: int, source: str, address: str, port: int | str) -> str:
        own = self._settings
        slots = [str(host.slots) for host in self.hosts]
        ranks = slots[0] if len(set(slots)) == 1 else ",".join(slots)
        words = [sys.executable, "-u", str(hostcheck.ROOT / "launch" / "submit.py"), "--carried", source]
        words += ["--launcher", own.launcher, "--ranks", ranks, "--nodes", str(len(slots)), "--node_rank", str(node)]
        words += ["--master_addr", address, "--master_port", str(port), "--stop_minutes", f"{own.stop_seconds / 60:g}"]
        return shell_line(Path.cwd(), [*words, "--", *own.command], {JOB: mark})

    def describe(self) -> str:
        """What would be checked, sent and run."""
        own, first = self._settings, self.hosts[0].name
        hosts = [f"  {host.name} slots={host.slots}" for host in self.hosts]
        spares = [f"  {spare.name} slots={spare.slots} (spare)" for spare in self.spares]
        shown = [f"  {line}" for line in own.variables.shown()] or ["  none"]
        way = "over standard input"
        if not self._carrier.forwards_stdin:
            way = f"in {self._asking.shared}/.ardiff-JOB/NODE.json (mode 600, read and removed by each host)"
        address = own.master_addr or "ADDRESS"
        port = own.master_port or "PORT"
        checked = f"{hostcheck.ROOT}, {sys.executable}, versions, ports"
        if self._asking.shared:
            checked += f", and that all see {self._asking.shared} (by a file that is removed)"
        commands = []
        for node, host in enumerate(self.hosts):
            source = "-" if self._carrier.forwards_stdin else f"{self._asking.shared}/.ardiff-JOB/{node}.json"
            words = self._carrier.command(host.name, self._line(f"JOB.{node}", node, source, address, port))
            given = [f"{name}={value}" for name, value in self._carrier.environment().items()]
            commands.append("  " + shlex.join([*(["env", *given] if given else []), *words]))
        return "\n".join(
            [
                f"hosts, by {self._carrier.name}, checked before every start ({checked}):",
                *hosts,
                *spares,
                f"variables for all ranks, sent {way}:",
                *shown,
                f"commands (JOB: a new mark; ADDRESS, PORT: of {first}, found out):",
                *commands,
            ]
        )
