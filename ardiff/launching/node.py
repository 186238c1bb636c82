"""One node's share of a job, as it runs there: started by hand, or by a carrier from another host."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from ardiff.errors import UserError
from ardiff.launching.command import Launch
from ardiff.launching.job import Job, StopRequest, Tell

BEAT_EVERY = 5.0  # seconds between the signs of life that come over standard input
SILENCE = 60.0  # seconds without any until the connection is taken for lost
RECORD_PATIENCE = 30.0  # seconds that the first node's rank 0 has to write how the run ended, once this node's have


class Node:
    """This node's processes (all of them, where there is one node): what `supervise` starts, and starts again."""

    def __init__(self, launch: Launch, carried: bool = False) -> None:
        """carried: another host started this and judges how the run ended."""
        self.run_dir = None if carried else launch.run_dir
        self.is_first = launch.node_rank == 0
        self.lock_patience = 0.0
        self.record_patience = 0.0 if self.is_first else RECORD_PATIENCE
        self._launch = launch
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, again: bool, stop: StopRequest, tell: Tell) -> bool:
        """Nothing: this is where they run."""
        return True

    def start(self, tell: Tell) -> Job:
        """Start the processes."""
        launch = self._launch
        scratch = Path()
        if files := launch.files():
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="ardiff-")
            scratch = Path(self._scratch.name)
            for name, text in files.items():
                (scratch / name).write_text(text, encoding="utf-8")
        return Job(launch.arguments(scratch), launch.environment(), launch.launcher == "python")

    def close(self) -> None:
        """Remove what the launcher had to read."""
        if self._scratch is not None:
            self._scratch.cleanup()


def payload(variables: dict[str, str], beats: bool) -> bytes:
    """What a node reads first: the variables for its ranks, and whether signs of life follow."""
    return json.dumps({"variables": variables, "beats": beats}).encode() + b"\n"


def receive(source: str) -> None:
    """On a node that a carrier started: take the variables, and stop as after SIGTERM once the connection is gone.

    source: "-" for standard input, or a file, which is removed. Raises UserError where it does not hold them.
    """
    try:
        if source == "-":
            line = _read_line(0)
        else:
            line = Path(source).read_bytes()
            _remove(Path(source))
        read = json.loads(line)
        os.environ.update(read["variables"])
        beats = bool(read["beats"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--carried {source}: no variables came over the connection ({error})") from None
    threading.Thread(target=_watch, args=(beats,), name="connection watch", daemon=True).start()


def _remove(file: Path) -> None:
    file.unlink()
    with contextlib.suppress(OSError):  # others are still to be read
        file.parent.rmdir()


def _read_line(handle: int) -> bytes:
    """Up to the end of a line and not a byte further; Python's own reader would take more."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(handle, 1)
        if not piece:
            break
        line += piece
    return line


def _watch(beats: bool) -> None:
    """Until standard input ends, which it does with the connection, or standard output has no reader any more."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(1, 0)  # errors and hang-up are always told
    heard = time.monotonic()
    while True:
        events = dict(poll.poll(1000.0))
        if 0 in events:
            if not os.read(0, 4096):
                reason = "the connection was closed"
                break
            heard = time.monotonic()
        if events.get(1, 0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            reason = "nobody reads any more"
            break
        if beats and time.monotonic() - heard > SILENCE:
            reason = f"no sign of life for {SILENCE:g} s"
            break
    with contextlib.suppress(OSError):
        sys.stderr.write(f"submit: {reason}: the ranks of this host stop\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
