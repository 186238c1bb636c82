"""The signals that ask a run to stop, and catching them: in the ranks and in what supervises them alike."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Catcher:
    """Calls `heard(number)` for each of SIGNALS that comes between `listen` and `release`. Main thread only."""

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """From now on signals are heard here; a second call changes nothing."""
        for number in SIGNALS:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be installed from there again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._heard(number)
