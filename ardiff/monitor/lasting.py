"""What is worth a line in the log only if it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable

REPORTS = 3  # in a row, for it to be said
SECONDS = 30.0  # that they span at least: of short steps, what lasts less is the scheduler's doing


class Lasting:
    """Says when something has been so in three reports in a row and for half a minute, and again after six, twelve, ...

    now: where the time (in seconds) comes from.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._in_a_row, self._say_at, self._since = 0, REPORTS, 0.0

    def see(self, so: bool) -> bool:
        """Take in whether it is so at a report; whether that is to be said."""
        if not so:
            self._in_a_row, self._say_at = 0, REPORTS
            return False
        if self._in_a_row == 0:
            self._since = self._now()
        self._in_a_row += 1
        if self._in_a_row < self._say_at or self._now() - self._since < SECONDS:
            return False
        self._say_at = 2 * self._in_a_row
        return True
