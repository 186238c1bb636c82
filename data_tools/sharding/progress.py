"""How far a program has come: a bar on a terminal, and in the log of a batch job a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds


class Progress:
    """Counts frames up to `total`, beginning with those that an earlier run did."""

    def __init__(self, total: int, done: int = 0, shown: bool = True) -> None:
        self.total, self.done, self.initial = total, done, done
        self._start = self._last = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="frames", unit_scale=True) if on_terminal else None
        self._lines = shown and not on_terminal

    def set(self, done: int) -> None:
        """So many of all frames are done."""
        self.done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if self._lines and time.monotonic() > self._last + LINE_EVERY:
            self._last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def add(self, frames: int) -> None:
        """So many more frames are done."""
        self.set(self.done + frames)

    def line(self) -> str:
        """How far it is, how fast and for how long still."""
        rate = self.rate()
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "unknown time"
        return f"{self.done} of {self.total} frames, {rate:.1f} frames/s, {left} left"

    def rate(self) -> float:
        """Frames per second of this run so far."""
        return (self.done - self.initial) / self.seconds()

    def seconds(self) -> float:
        """How long this run has taken so far."""
        return max(time.monotonic() - self._start, 1e-9)

    def close(self) -> None:
        """Leave the terminal as it should be."""
        if self._bar is not None:
            self._bar.close()
