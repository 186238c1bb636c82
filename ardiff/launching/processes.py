"""The processes below one, read from /proc (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
# Has SIGTERM (15) sent to itself when its parent ends (PR_SET_PDEATHSIG, 1), and becomes another program.
_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class Identity:
    """A process; ids are given out again, but not at the same time."""

    process: int
    started: int  # clock ticks after boot


@dataclass(frozen=True)
class _Status:
    process: int
    state: str
    parent: int
    started: int
    name: str

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZX"  # dead, but not yet seen by its parent


def identity(process: int) -> Identity | None:
    """Who has this id now."""
    status = _status(process)
    return Identity(process, status.started) if status and status.is_alive else None


def is_running(who: Identity) -> bool:
    """Whether that very process is there."""
    return identity(who.process) == who


def parent(who: Identity) -> int | None:
    """The id of its parent, None once it has gone."""
    status = _status(who.process)
    return status.parent if status and status.is_alive and status.started == who.started else None


def describe(who: Identity) -> str:
    """A process for a message: its id, name and state (D: waits for a disk or driver, and hears no signal)."""
    status = _status(who.process)
    return f"{who.process} ({status.name}, state {status.state})" if status else f"{who.process}"


def adopt_orphans() -> None:
    """Become the parent of every process below whose own parent ends, so that none can get lost."""
    # Where this is refused, such processes are no longer found; the ranks notice for themselves that they are orphans.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def with_parent(command: list[str]) -> list[str]:
    """A command that gets SIGTERM when the process that started it ends, however it ends."""
    return [sys.executable, "-I", "-S", "-c", _WITH_PARENT, *command]


def below(process: int) -> list[Identity]:
    """All living descendants of a process, parents first."""
    children: dict[int, list[_Status]] = defaultdict(list)
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (status := _status(int(path.name))) is not None:
            children[status.parent].append(status)
    found, queue = [], [process]
    while queue:
        for status in children[queue.pop(0)]:
            queue.append(status.process)
            if status.is_alive:
                found.append(Identity(status.process, status.started))
    return found


def reap(process: int, spare: int) -> None:
    """Collect the dead children of `process`, which is this one, except `spare`, which somebody else waits for."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and path.name != str(spare):
            status = _status(int(path.name))
            if status is not None and status.parent == process and not status.is_alive:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(status.process, os.WNOHANG)


def environment(process: int) -> dict[str, str]:
    """The variables a process was started with; none where it has gone or is somebody else's."""
    try:
        data = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return {}
    entries = (entry.decode(errors="replace").partition("=") for entry in data.split(b"\0") if entry)
    return {name: value for name, _, value in entries}


def ranks(processes: list[Identity]) -> list[Identity]:
    """Those that are ranks of a job: the first ones, from the top, that were started with a RANK."""
    found: list[Identity] = []
    inside: set[int] = set()
    for who in processes:  # parents first
        status = _status(who.process)
        if status is None:
            continue
        if status.parent in inside:  # a helper of a rank
            inside.add(who.process)
        elif "RANK" in environment(who.process):
            inside.add(who.process)
            found.append(who)
    return found


def send(who: Identity, number: int) -> None:
    """Send a signal, unless that process has gone."""
    if is_running(who):
        with contextlib.suppress(ProcessLookupError):
            os.kill(who.process, number)


def _status(process: int) -> _Status | None:
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    start, _, end = text.rpartition(")")  # the name before it may hold anything
    fields, name = end.split(), " ".join(start.partition("(")[2].split())
    return _Status(process, fields[0], int(fields[1]), int(fields[19]), name)
