"""Exponential moving average of the weights, kept where the master weights are: sharded, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ShardedEMA:
    """Average of this rank's slices of the master weights; no rank ever holds a full copy.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, as in the reference.
    """

    def __init__(self, optimizer: Any, decay: float) -> None:
        self._optimizer, self.decay = optimizer, decay
        self.num_updates = 0
        self.partitions: list[Tensor] = [master.detach().clone() for master in self._masters]

    @property
    def _masters(self) -> list[Tensor]:
        return [master.detach() for master in self._optimizer.single_partition_of_fp32_groups]

    def update(self, learns: list[bool]) -> None:
        """Once per optimizer step that changed the weights; learns: which groups did, the others keep their average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averages, masters = (
            [part for part, learnt in zip(parts, learns, strict=True) if learnt]
            for parts in (self.partitions, self._masters)
        )
        torch._foreach_lerp_(averages, masters, 1 - decay)

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
