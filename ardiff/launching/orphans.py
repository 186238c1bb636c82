"""Ranks whose launcher was killed: nobody would end them, and they would meet those of the next start."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from ardiff.launching.processes import Identity, identity, is_running

SUPERVISOR = "ARDIFF_SUPERVISOR"  # set by launch/submit.py: its process, as "id:start time"
LOOK_EVERY = 0.25  # seconds
NOTICE = 1.0  # seconds in which launch/submit.py sees why the ranks stop
PATIENCE = 600.0  # seconds after a signal for the step that is under way and a checkpoint, of 10 GB or more
# What launchers of ours leave in the environment of a rank. Under plain python the parent is a shell, which may end.
_LAUNCHERS = (("TORCHELASTIC_RUN_ID",), ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"))  # torchrun, deepspeed


def when_parent_ends(action: Callable[[], None]) -> None:
    """Call `action` from a thread once the process that started this one has gone."""
    parent = os.getppid()
    _watch(lambda: os.getppid() != parent, action)


def stop_with_launcher(patience: float = PATIENCE) -> bool:
    """Stop as after SIGTERM (at an agreed step, with a checkpoint) once the launcher has gone.

    The launcher is torchrun's or deepspeed's process on this machine, and launch/submit.py; a process that was started
    by hand stays, whatever happens to its shell. Ends the process `patience` seconds later if it is still there.
    Returns whether there is anything to watch.
    """

    def stop() -> None:
        time.sleep(NOTICE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os._exit(1)

    under_launcher = any(all(name in os.environ for name in names) for names in _LAUNCHERS)
    if under_launcher:
        parent = os.getppid()
    supervisor = _supervisor()
    if not under_launcher and supervisor is None:
        return False

    def orphaned() -> bool:
        if under_launcher and os.getppid() != parent:
            return True
        return supervisor is not None and not is_running(supervisor)

    _watch(orphaned, stop)
    return True


def supervisor_variable() -> str:
    """What `SUPERVISOR` has to be for the children of this process."""
    own = identity(os.getpid())
    assert own is not None
    return f"{own.process}:{own.started}"


def _supervisor() -> Identity | None:
    """The process that `SUPERVISOR` names, if it is one of this machine (or container)."""
    process, _, started = os.environ.get(SUPERVISOR, "").partition(":")
    if not (process.isdigit() and started.isdigit()):
        return None
    found = Identity(int(process), int(started))
    return found if is_running(found) else None


def _watch(gone: Callable[[], bool], action: Callable[[], None]) -> None:
    def watch() -> None:
        while not gone():
            time.sleep(LOOK_EVERY)
        action()

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()
