"""Stopping and deciding together: what any rank has to say ends or saves the run at the same step on all of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ardiff.signals import SIGNALS, Catcher
from ardiff.training.distributed import World

TIME_LIMIT = "time limit"
REASONS = (*(number.name for number in SIGNALS), TIME_LIMIT)


class Interrupted(BaseException):
    """Raised inside validation and sampling when the run has been asked to stop; no handler of errors stops it."""


class StopSignal:
    """Catches SIGTERM, SIGINT and SIGUSR1 between `listen` and `release`, and knows when the time is up."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._deadline: float | None = None
        self._received: str | None = None
        self._catcher = Catcher(self._remember)

    def listen(self, time_limit_minutes: float = 0.0) -> None:
        """From now on signals are remembered. time_limit_minutes: since this object was made; 0: none."""
        if time_limit_minutes:
            self._deadline = self._started + 60 * time_limit_minutes
        self._catcher.listen()

    def release(self) -> None:
        """Leave signals to whoever had them before."""
        self._catcher.release()

    def _remember(self, number: int) -> None:
        self._received = self._received or signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, if it does."""
        if self._received is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._received = TIME_LIMIT
        return self._received


@dataclass
class Say:
    """What one rank has to tell after a step."""

    stop: str | None = None  # one of REASONS
    save: bool = False  # it is time for a checkpoint
    failed: bool = False  # metrics or the last checkpoint could not be written
    loss: tuple[float, float] = (0.0, 0.0)  # sum and count of a step's loss on this rank


@dataclass
class Agreed:
    """What the ranks have told together."""

    stop: str | None = None
    save: bool = False
    failed: bool = False
    loss: float | None = None  # mean over the global batch; None when nobody told one

    def add(self, other: Agreed) -> None:
        """Keep what was agreed until it is acted upon."""
        self.stop, self.save = self.stop or other.stop, self.save or other.save
        self.failed = self.failed or other.failed


class Agreement:
    """One sum over all ranks per step, on the host, while the next step is computed: asking costs nothing, and the
    answer is one step old.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def tell(self, mine: Say) -> Agreed | None:
        """Once per step, on every rank; returns what was agreed on the call before."""
        answer = self.settle()
        flags = [float(mine.stop == reason) for reason in REASONS]
        values = torch.tensor([*flags, float(mine.save), float(mine.failed), *mine.loss], dtype=torch.float64)
        work = dist.all_reduce(values, group=self._world.control, async_op=True)
        assert work is not None
        self._pending = (work, values)
        return answer

    def settle(self) -> Agreed | None:
        """Wait for what is in flight, so that the next collective on this group is not confused with it."""
        if self._pending is None:
            return None
        work, values = self._pending
        self._pending = None
        work.wait()
        *flags, save, failed, total, count = values.tolist()
        reasons = [reason for reason, flag in zip(REASONS, flags, strict=True) if flag]
        return Agreed(
            stop=reasons[0] if reasons else None,
            save=save > 0,
            failed=failed > 0,
            loss=total / count if count else None,
        )


def leave_together(world: World, step: int, arrived: Callable[[], bool]) -> bool:
    """Whether all ranks stop here, before this step; asked by a rank that waits for its data and is to stop.

    arrived: waits a moment and tells whether the data are there. A rank that has its data is in the step already, whose
    collectives need all ranks: then none can leave, and False is returned when the data of this one have come.
    """
    leaving, left = f"leaving/{step}", f"left/{step}"
    if world.tally(leaving, 1) == world.size:
        world.tally(left, 1)
        return True
    while not world.tally(left):
        if arrived():  # withdraw, unless all were leaving before that
            return world.tally(leaving, -1) == world.size - 1
    return True
