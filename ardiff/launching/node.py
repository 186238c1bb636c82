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
from ardiff.launching import records
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
        """This is where they run, if there can be a run_dir. Raises UserError where it cannot be written to.

        Another start needs the first node's ranks of the last one to have ended. Else these would meet them, at the
        same address and port.
        """
        if not again and self.run_dir is not None:
            records.require_place(self.run_dir)
        if again and not self.is_first and self.run_dir is not None and records.in_use(self.run_dir):
            tell(f"waiting for the first node's ranks of the last start, which hold {self.run_dir}")
            records.in_use(self.run_dir, float("inf"), lambda: stop.number is not None)
        return stop.number is None

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


def payload(variables: dict[str, str], beats: bool, lost_seconds: float) -> bytes:
    """What a node reads first: the variables for its ranks, whether signs of life follow, and for how long after the
    last of them its ranks may go on to stop: the job is to go on without this host.
    """
    return json.dumps({"variables": variables, "beats": beats, "lost_seconds": lost_seconds}).encode() + b"\n"


def receive(source: str, stop: StopRequest) -> None:
    """On a node that a carrier started: take the variables, and stop as after SIGTERM once the connection is gone.

    source: "-" for standard input, or a file, which is removed. stop: of this node's processes; where the host is cut
    off from the others, its time is limited. Raises UserError where the source does not hold what it should.
    """
    try:
        if source == "-":
            line = _read_line(0)
        else:
            line = Path(source).read_bytes()
            _remove(Path(source))
        read = json.loads(line)
        os.environ.update(read["variables"])
        beats, lost_seconds = bool(read["beats"]), float(read["lost_seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--carried {source}: no variables came over the connection ({error})") from None
    threading.Thread(target=_watch, args=(beats, lost_seconds, stop), name="connection watch", daemon=True).start()


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


def _watch(beats: bool, lost_seconds: float, stop: StopRequest) -> None:
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
            stop.deadline = time.monotonic() + lost_seconds  # the job waits for its run_dir, and for no checkpoint
            break
    with contextlib.suppress(OSError):
        sys.stderr.write(f"submit: {reason}: the ranks of this host stop\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
