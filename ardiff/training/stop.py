"""Stopping together: a signal on any rank ends the run at the same step on all of them."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from ardiff.training.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Catches SIGTERM, SIGINT and SIGUSR1 while entered; `agreed` tells every rank of it at the same step.

    The ranks' flags are added up by a collective on the host that runs while the next step is computed, so asking
    costs nothing; the answer is one step old.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.received: str | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def agreed(self) -> str | None:
        """Once per step, on every rank: the name of the signal some rank had received a step ago, or None."""
        answer = None
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            names = [signal.Signals(number).name for number, flag in zip(SIGNALS, flags.tolist(), strict=True) if flag]
            answer = names[0] if names else None
        flags = torch.tensor([int(self.received == signal.Signals(number).name) for number in SIGNALS])
        work = dist.all_reduce(flags, group=self._world.control, async_op=True)
        assert work is not None
        self._pending = (work, flags)
        return answer

    def close(self) -> None:
        """Wait for the collective in flight, so that the next one on this group is not confused with it."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
