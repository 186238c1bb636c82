"""Watching the loss of every step without waiting for the device, and which samples a spike came from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.config import TrainConfig
from ardiff.data.stream import GlobalBatch
from ardiff.terms import Terms
from ardiff.training.guards import SpikeDetector

MOST_ROLLBACKS = 10  # to one checkpoint: beyond, leaving out samples does not help


@dataclass
class Spike:
    """A step whose loss stood out, and the stretch of samples [start, end) that a rollback leaves out."""

    step: int
    loss: float
    deviations: float
    start: int
    end: int
    phase: int  # of train.phases

    def __str__(self) -> str:
        return f"LOSS SPIKE at step {self.step}: {self.loss:.4g}, {self.deviations:.1f} deviations above recent losses"


@dataclass
class _Past:
    step: int
    position: int
    end: int
    phase: int
    sums: Tensor  # loss and count of this rank [2] float64, on the host once the device got there
    copied: torch.cuda.Event | None  # when that is
    told: bool = False


class SpikeWatch:
    """Sends every step's loss on its way to the host, hands it out for the sum over ranks a step later, and judges it
    when that has come back: two steps late, but in order, and never by waiting.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.detector = SpikeDetector(config.spike_sigmas, config.spike_window)
        self._enabled = config.spike_sigmas > 0
        self._batches = config.spike_batches
        self._waiting: deque[_Past] = deque()
        self._judged: deque[_Past] = deque(maxlen=max(1, config.spike_batches))
        self._phase: int | None = None

    def put(self, step: int, batch: GlobalBatch, phase: int, terms: list[Terms]) -> None:
        """The loss terms of a step that changed the weights."""
        if not self._enabled:
            return
        total, count = (sum(part["loss"][side].detach().double() for part in terms) for side in (0, 1))
        sums = torch.stack([total, count])  # type: ignore[list-item]
        copied = None
        if sums.device.type == "cuda":
            sums = torch.empty(2, dtype=torch.float64, pin_memory=True).copy_(sums, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append(_Past(step, batch.position, batch.position + batch.size, phase, sums, copied))

    def next_loss(self, newest_too: bool = False) -> tuple[float, float]:
        """What this rank tells next: sum and count of the oldest loss not told yet, zeros where there is none.

        newest_too: also that of the step just done. Otherwise nothing is waited for: DeepSpeed waits for the device in
        every step, and with it for the copy of the step before.
        """
        waiting = list(self._waiting)
        for past in waiting if newest_too else waiting[:-1]:
            if not past.told:
                past.told = True
                if past.copied is not None:
                    past.copied.synchronize()
                total, count = past.sums.tolist()
                return total, count
        return 0.0, 0.0

    @property
    def untold(self) -> bool:
        """Whether losses are left to be told."""
        return any(not past.told for past in self._waiting)

    def judge(self, loss: float | None) -> Spike | None:
        """The sum over all ranks has come back; they all come to the same verdict."""
        if loss is None:
            return None
        past = self._waiting.popleft()
        if self._phase is not None and past.phase != self._phase:
            self.detector.reset()  # another stage or learning rate: another level
        self._phase = past.phase
        self._judged.append(past)
        deviations = self.detector.see(loss)
        if deviations is None:
            return None
        return Spike(past.step, loss, deviations, min(each.position for each in self._judged), past.end, past.phase)

    def restart(self, recent_losses: list[float], phase: int | None) -> None:
        """Go on from a checkpoint."""
        self._waiting.clear()
        self._judged.clear()
        self._phase = phase
        self.detector.restore(recent_losses)
