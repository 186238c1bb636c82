"""What a supervisor reads in a run_dir, and the record of restarts it keeps there.

Light on purpose: a process that waits for weeks need not hold a deep-learning framework.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardiff.errors import UserError

FINISHED = "finished"  # as written by a run that reached its last step
LOCK_PATIENCE = 2.0  # seconds: a process that has just been killed may take a moment to go
Asked = Callable[[], bool]
_Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class Record:
    """exit.json: how a start ended, or that it trains."""

    reason: str
    code: int | None  # None: training, or killed
    step: int | None


class ExitFile:
    """exit.json as far as the start that follows this object's creation has written it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "exit.json"
        self._before = self._stamp()

    def read(self) -> Record | None:
        """The record, or None where this start has not written any."""
        if self._stamp() == self._before:
            return None
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return Record(str(found["reason"]), found["code"], found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def final(self, patience: float) -> Record | None:
        """The record once the ranks have ended; that of another host's rank may take a moment to be seen here."""
        until = time.monotonic() + patience
        while True:
            found = self.read()
            if (found is not None and found.code is not None) or time.monotonic() > until:
                return found
            time.sleep(0.2)

    def in_training(self) -> bool:
        """Whether it trains by now."""
        found = self.read()
        return found is not None and found.code is None

    def _stamp(self) -> _Stamp:
        try:
            status = self._path.stat()  # the file is replaced at every write, so it is another one then
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name of the newest checkpoint, which the ranks still have to verify."""
    names = [path.name for path in run_dir.glob("checkpoints/step_*") if path.name.removeprefix("step_").isdigit()]
    return max(names, default=None)


def require_place(run_dir: Path) -> None:
    """Raise UserError where a run_dir cannot be made or written to; leaves nothing behind.

    A launcher replaces the exit code of a rank that finds out, and that rank cannot write exit.json either: it would
    look like a failure that another start may cure.
    """
    made: list[Path] = []
    try:
        for folder in reversed([run_dir, *run_dir.parents]):
            if not folder.is_dir():
                folder.mkdir()
                made.append(folder)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"--run_dir {run_dir}: cannot be written to ({error.strerror}); choose another place"
        ) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()


def in_use(run_dir: Path, patience: float = LOCK_PATIENCE, give_up: Asked = lambda: False) -> bool:
    """Whether a live run holds run_dir, and still does after that many seconds, or once waiting is given up."""
    try:
        handle = os.open(run_dir / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                if time.monotonic() > until or give_up():
                    return True
            except OSError:  # a file system without locks: the ranks will tell
                return False
            time.sleep(0.1)
    finally:
        os.close(handle)


def note_restart(run_dir: Path, entry: dict[str, Any]) -> None:
    """Append a line to run_dir/restarts.jsonl. Raises OSError."""
    if not (run_dir / "config.yaml").is_file():
        return  # no run yet: the ranks would take the folder for somebody else's
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with (run_dir / "restarts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, **entry}) + "\n")
