"""The training state as flat vectors that do not depend on the world size.

ZeRO-1/2 keeps, per parameter group, one vector of all parameters end to end and gives each rank an equal slice of it,
padded at the tail (and, with `parameter_alignment`, between parameters). The canonical vector is the same without
padding. `FlatState` maps between this rank's padded slices and the canonical range they cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VECTORS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Span:
    """`length` elements at `local` of the padded slice are those at `canonical` of the canonical vector."""

    local: int
    canonical: int
    length: int


def spans_of(numels: list[int], padded_offsets: list[int], start: int, end: int) -> list[Span]:
    """The parts of a padded vector's [start, end) that are parameters, neighbours merged."""
    spans: list[Span] = []
    canonical = 0
    for numel, offset in zip(numels, padded_offsets, strict=True):
        low, high = max(offset, start), min(offset + numel, end)
        if low < high:
            span = Span(low - start, canonical + low - offset, high - low)
            last = spans[-1] if spans else None
            if last and (last.local + last.length, last.canonical + last.length) == (span.local, span.canonical):
                spans[-1] = Span(last.local, last.canonical, last.length + span.length)
            else:
                spans.append(span)
        canonical += numel
    return spans


def fresh_memory(name: str, length: int, like: Tensor) -> Tensor:
    """New host memory for a slice."""
    return torch.empty(length, dtype=like.dtype)


class FlatState:
    """This rank's slices of master weights and Adam moments inside ZeRO-1/2 optimizers, whose groups are counted on."""

    def __init__(self, optimizers: Sequence[Any], named_parameters: dict[int, str], rank: int) -> None:
        self._optimizers = list(optimizers)
        self.partitions: list[Tensor] = []
        self.layout: list[list[tuple[str, list[int]]]] = []
        self.spans: list[list[Span]] = []
        self._inner: list[tuple[Any, dict[str, Any]]] = []  # of each group: torch's optimizer, and its settings there
        for optimizer in self._optimizers:
            self.partitions += optimizer.single_partition_of_fp32_groups
            self._inner += [(optimizer.optimizer, settings) for settings in optimizer.optimizer.param_groups]
            for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
                self.layout.append([(named_parameters[id(p)], list(p.shape)) for p in parameters])
                size = int(optimizer.partition_size[group])
                offsets = optimizer.round_robin_bit16_offsets[group]
                numels = [p.numel() for p in parameters]
                self.spans.append(spans_of(numels, offsets, rank * size, (rank + 1) * size))

    def ranges(self) -> list[tuple[int, int]]:
        """Per group, the canonical [start, end) of this rank's slice."""
        return [
            (spans[0].canonical, spans[-1].canonical + spans[-1].length) if spans else (0, 0) for spans in self.spans
        ]

    def extract(self, group: int, padded: Tensor | None, host: Tensor) -> None:
        """Copy a padded slice without its padding into `host` (None: zeros). Of a GPU's tensors the copy may still be
        under way on return: synchronise before reading.
        """
        if padded is None:
            host.zero_()
            return
        start = self.ranges()[group][0]
        for span in self.spans[group]:
            source = padded[span.local : span.local + span.length].detach()
            host[span.canonical - start : span.canonical - start + span.length].copy_(source, non_blocking=True)

    def fill(self, group: int, padded: Tensor, canonical: Tensor) -> None:
        """Write a canonical range into a padded slice."""
        start = self.ranges()[group][0]
        for span in self.spans[group]:
            source = canonical[span.canonical - start : span.canonical - start + span.length]
            padded[span.local : span.local + span.length].copy_(source)

    def vectors(self) -> dict[str, list[Tensor | None]]:
        """Vector of VECTORS -> this rank's padded slice per group; None for moments before the first step."""
        moments = [self._adam(group) for group in range(len(self.partitions))]
        return {
            "master": list(self.partitions),
            "exp_avg": [state.get("exp_avg") for state in moments],
            "exp_avg_sq": [state.get("exp_avg_sq") for state in moments],
        }

    def export(
        self,
        averages: Mapping[str, Sequence[Tensor | None]] | None = None,
        room: Callable[[str, int, Tensor], Tensor] = fresh_memory,
    ) -> dict[str, Tensor]:
        """`group{g}.{vector}` -> canonical slice in host memory, of `vectors` and of further ones like them.

        room(name, length, like): where to put a slice, of the type of `like`. See `extract` on GPUs.
        """
        tensors = {}
        for name, slices in {**self.vectors(), **(averages or {})}.items():
            for group, padded in enumerate(slices):
                start, end = self.ranges()[group]
                key = f"group{group}.{name}"
                tensors[key] = room(key, end - start, self.partitions[group])
                self.extract(group, padded, tensors[key])
        return tensors

    def load(self, read: Callable[[str, int, int], Tensor], adam_steps: list[int]) -> None:
        """Restore everything from `read(name, start, end)`, which yields canonical ranges (see `export`).

        adam_steps: of the groups that are stored, the first ones; later groups stay as they are.

        The model still computes with its old weights until `publish`, which all ranks call together.
        """
        for group, (start, end) in enumerate(self.ranges()[: len(adam_steps)]):
            master = self.partitions[group]
            with torch.no_grad():
                self.fill(group, master, read(f"group{group}.master", start, end))
            moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            for name, moment in moments.items():
                self.fill(group, moment, read(f"group{group}.{name}", start, end))
            inner, settings = self._inner[group]
            step = torch.tensor(float(adam_steps[group]), device=master.device if settings.get("fused") else "cpu")
            inner.state[master] = {"step": step, **moments}

    def publish(self) -> None:
        """Give the master weights to the models (collective)."""
        for optimizer in self._optimizers:
            optimizer.update_lp_params()

    def adam_steps(self) -> list[int]:
        """Adam's step count per group."""
        return [int(self._adam(group).get("step", 0)) for group in range(len(self.partitions))]

    def _adam(self, group: int) -> dict[str, Any]:
        return self._inner[group][0].state.get(self.partitions[group], {})
