"""A log file for every rank, kept over restarts: the console shows rank 0 only."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType

log = logging.getLogger("ardiff")


class RankLog(logging.Handler):
    """Appends to a file, unbuffered; a disk that is full or gone loses lines and never ends training."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._whole = os.fstat(self._file).st_size == 0  # an earlier start may have been killed within a line
        self._failed = False
        self._level_before = log.level
        self._consoles = [(handler, handler.level) for handler in log.handlers]
        self._process_hook, self._thread_hook = sys.excepthook, threading.excepthook

    def write(self, text: str) -> None:
        """Append lines as they are."""
        data = ("" if self._whole else "\n").encode() + text.rstrip("\n").encode(errors="replace") + b"\n"
        try:
            self._whole = os.write(self._file, data) == len(data)
            self._failed = False
        except OSError as error:
            if not self._failed:  # told once, until it works again
                print(f"{self.path}: cannot be written ({error.strerror}); its lines are lost", file=sys.stderr)
            self._failed = True

    def emit(self, record: logging.LogRecord) -> None:
        """As in logging."""
        try:
            self.write(self.format(record))
        except Exception:  # a message that cannot be formatted, or stderr gone
            self.handleError(record)

    def install(self) -> None:
        """Take all of the logger "ardiff" from INFO on, and uncaught exceptions; the console stays as it was."""
        for handler, level in self._consoles:
            handler.setLevel(max(level, self._level_before))
        log.setLevel(min(self._level_before or logging.INFO, logging.INFO))
        log.addHandler(self)
        sys.excepthook, threading.excepthook = self._on_exception, self._on_thread_exception

    def close(self) -> None:
        """Undo `install`."""
        if self in log.handlers:
            log.removeHandler(self)
            log.setLevel(self._level_before)
            for handler, level in self._consoles:
                handler.setLevel(level)
            if sys.excepthook == self._on_exception:
                sys.excepthook = self._process_hook
            if threading.excepthook == self._on_thread_exception:
                threading.excepthook = self._thread_hook
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()

    def _on_exception(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        self._write_exception("uncaught", kind, error, where)
        self._process_hook(kind, error, where)

    def _on_thread_exception(self, found: threading.ExceptHookArgs) -> None:
        name = found.thread.name if found.thread else "gone"
        self._write_exception(f"uncaught in thread {name}", found.exc_type, found.exc_value, found.exc_traceback)
        self._thread_hook(found)

    def _write_exception(
        self, what: str, kind: type[BaseException], error: BaseException | None, where: TracebackType | None
    ) -> None:
        text = "".join(traceback.format_exception(kind, error, where))
        record = logging.LogRecord(log.name, logging.CRITICAL, "", 0, f"{what}:\n{text}", None, None)
        self.emit(record)


def open_rank_log(run_dir: Path, rank: int, world_size: int) -> RankLog | None:
    """Log this rank to run_dir/logs from now on, after a line that marks the start.

    Only in a folder that is known to be this run's. Returns the handler (its `close` ends logging), or None where the
    file cannot be made, which is told and no reason to end.
    """
    try:
        handler = RankLog(run_dir / "logs" / f"rank{rank:05d}.log", rank)
    except OSError as error:
        log.error("%s: cannot be written (%s); this rank has no log file", error.filename, error.strerror)
        return None
    command = shlex.join(sys.orig_argv)
    start = f"==== start: rank {rank} of {world_size} on {socket.gethostname()}, process {os.getpid()}: {command}"
    handler.emit(logging.LogRecord(log.name, logging.INFO, "", 0, start, None, None))
    handler.install()
    return handler
