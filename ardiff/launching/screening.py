"""Running launch/preflight.py on all hosts before a job, and leaving out those that it finds wanting."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import hostcheck
from ardiff.launching.carriers import Carrier
from ardiff.launching.checks import shared_folder
from ardiff.launching.command import run_dir_of
from ardiff.launching.fleet import Fleet, Settings
from ardiff.launching.hostfile import Host
from ardiff.launching.job import StopRequest, Tell

PROGRAMS = ("train", "train_vae")
PREFLIGHT = str(hostcheck.ROOT / "launch" / "preflight.py")
_OPTIONS = ("--config", "--ds_config", "--run_dir")  # of the job's program, which it has too


def words(command: Sequence[str], ranks: int, report: Path | str) -> tuple[str, ...]:
    """The preflight of a training program with so many ranks (spare hosts do not count), and where its report goes.

    Raises UserError for other programs.
    """
    program = Path(command[0]).stem
    if program not in PROGRAMS:
        raise UserError(
            f"--preflight: checks what launch/train.py and train_vae.py need, not {command[0]}; leave it out"
        )
    kept: list[str] = []
    taking = False
    for word in command[1:]:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            taking = name in _OPTIONS or "." in name
            if taking:
                kept.append(word)
            taking = taking and not equals
        elif taking:
            kept.append(word)
            taking = False
    return (PREFLIGHT, *kept, "--program", program, "--world_size", str(ranks), "--json", str(report))


def describe(command: Sequence[str], hosts: Sequence[Host]) -> str:
    """What would be run."""
    return shlex.join(words(command, sum(host.slots for host in hosts), "REPORT"))


def screen(
    fleet: Fleet,
    hosts: Sequence[Host],
    spares: Sequence[Host],
    carrier: Carrier,
    settings: Settings,
    stop: StopRequest,
    tell: Tell,
) -> int:
    """Preflight on all hosts and spares that can be reached; drops bad ones from the fleet.

    Returns an exit code: 0 where enough hosts are left, or a signal came. Raises UserError as a start does.
    """
    run_dir = run_dir_of(settings.command)
    folder = Path(tempfile.mkdtemp(prefix=".ardiff-preflight-", dir=shared_folder(run_dir) or Path.cwd()))
    try:
        return _screen(fleet, hosts, spares, carrier, settings, folder / "report.json", stop, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _screen(
    fleet: Fleet,
    hosts: Sequence[Host],
    spares: Sequence[Host],
    carrier: Carrier,
    settings: Settings,
    report: Path,
    stop: StopRequest,
    tell: Tell,
    bad: frozenset[str] = frozenset(),
) -> int:
    everyone = [host for host in [*hosts, *spares] if host.name not in bad]
    command = words(settings.command, sum(host.slots for host in hosts), report)
    checking = Fleet(everyone, [], carrier, replace(settings, command=command, min_nodes=1))
    tell(f"preflight on {len(everyone)} host(s)")
    with closing(checking):
        if not checking.prepare(False, stop, tell):
            return _stopped(stop)
        running = checking.start(tell)
        end = running.wait(stop, settings.stop_seconds, None, tell)
    if stop.number is not None:
        return _stopped(stop)
    try:
        problems = _problems(json.loads(report.read_text(encoding="utf-8")), checking.hosts)
    except (OSError, ValueError, KeyError, TypeError):
        tell(f"preflight: {end.describe()}, and left no report that can be read; nothing is started (exit code 1)")
        return cli.EXIT_FAILURE
    for problem in problems.values():
        tell(f"preflight: {problem}")
    general = _general(report, not problems)
    for problem in general:
        tell(f"preflight: {problem}")
    left = [host for host in everyone if host.name not in problems and host in checking.hosts]
    needed = settings.min_nodes or len(hosts)
    if general and problems and len(left) >= needed:
        tell("preflight again without these hosts, as not only they failed")
        report.unlink()
        return _screen(fleet, hosts, spares, carrier, settings, report, stop, tell, bad | problems.keys())
    if general or len(left) < needed:
        why = "" if general else f": {len(left)} host(s) left, {needed} needed"
        tell(f"preflight failed{why}; nothing is started (exit code 1)")
        return cli.EXIT_FAILURE
    fleet.drop({name: f"{name}: failed preflight" for name in bad | problems.keys()})
    return cli.EXIT_OK


def _stopped(stop: StopRequest) -> int:
    return cli.EXIT_INTERRUPTED if stop.at_once else cli.EXIT_OK


def _problems(report: dict[str, Any], hosts: Sequence[Host]) -> dict[str, str]:
    """Hosts that the preflight finds wanting, by the name they have in the hostfile, which ranks tell."""
    names = [host.name for host in hosts for _ in range(host.slots)]  # rank -> host
    found = {}
    for entry in report["hosts"]:
        if not entry["ok"]:
            name = names[entry["ranks"][0]]
            found[name] = f"{name}: {'; '.join(entry['failures']) or 'failed'}"
    return found


def _general(report: Path, all_hosts_ok: bool) -> list[str]:
    """What is wrong with the job, not with a host."""
    read = json.loads(report.read_text(encoding="utf-8"))
    return [str(line) for line in read["failures"]] or ["failed"] * (all_hosts_ok and not read["ok"])
