"""Exponential moving average of the weights, kept where the master weights are: sharded, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ShardedEMA:
    """Average of this rank's slices of the master weights; no rank ever holds a full copy.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates of a group of parameters, as in the reference:
    a group that begins to learn late must not carry its initial values along for as long as others need to forget.
    """

    def __init__(self, optimizer: Any, decay: float) -> None:
        self._optimizer, self.decay = optimizer, decay
        self.partitions: list[Tensor] = [master.detach().clone() for master in self._masters]
        self.num_updates = [0] * len(self.partitions)

    @property
    def _masters(self) -> list[Tensor]:
        return [master.detach() for master in self._optimizer.single_partition_of_fp32_groups]

    def update(self, learns: list[bool]) -> None:
        """Once per optimizer step that changed the weights; learns: which groups did, the others keep their average."""
        for group, (average, master) in enumerate(zip(self.partitions, self._masters, strict=True)):
            if learns[group]:
                updates = self.num_updates[group]
                average.lerp_(master, 1 - min(self.decay, (1 + updates) / (10 + updates)))
                self.num_updates[group] += 1

    def settle(self, learns: list[bool]) -> None:
        """Groups that do not learn from now on stay what they are on average (collective)."""
        chosen = zip(self.partitions, self._masters, learns, strict=True)
        self._assign([master if learnt else average for average, master, learnt in chosen])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averaged weights inside this block (collective: all ranks enter it)."""
        saved = [master.clone() for master in self._masters]
        self._assign(self.partitions)
        try:
            yield
        finally:
            self._assign(saved)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for master, value in zip(self._masters, values, strict=True):
            master.copy_(value)
        self._optimizer.update_lp_params()
