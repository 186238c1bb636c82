"""Exponential moving averages of the weights, kept where the master weights are: sharded, in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MAIN = "ema"  # the vector that holds the main average


def ema_name(decay: float) -> str:
    """Name of the vector (and export file) of a further average: `ema_0.999`."""
    return f"{MAIN}_{float(decay)!r}"


class ShardedEMA:
    """Averages of this rank's slices of the master weights; no rank ever holds a full copy.

    optimizer: ZeRO's, or whatever has its `single_partition_of_fp32_groups` (fp32 master weights, a flat slice per
    group of parameters) and `update_lp_params()` (collective: gives them to the model).
    decays: of all averages, in [0, 1), each once; the first is the main one, which is sampled, validated and exported
    as `ema`. The others cost their memory and are there to choose from afterwards.

    Every decay warms up as min(decay, (1 + n) / (10 + n)) after n updates of a group of parameters, as in the
    reference: a group that begins to learn late must not carry its initial values along for as long as others need to
    forget. n is common to all averages.
    """

    def __init__(self, optimizer: Any, decays: Sequence[float]) -> None:
        self._optimizer = optimizer
        self.decays = [float(decay) for decay in decays]
        assert self.decays and len(set(self.decays)) == len(self.decays), decays
        names = [MAIN, *(ema_name(decay) for decay in self.decays[1:])]
        self._averages = {name: [master.clone() for master in self._masters] for name in names}
        self.num_updates = [0] * len(self._masters)  # per group

    @property
    def _masters(self) -> list[Tensor]:
        return [master.detach() for master in self._optimizer.single_partition_of_fp32_groups]

    def vectors(self) -> dict[str, list[Tensor]]:
        """Name -> this rank's slice (padded, fp32) per group; the main average first, to be written in place."""
        return {name: list(averages) for name, averages in self._averages.items()}

    @torch.no_grad()
    def update(self, learns: list[bool]) -> None:
        """Once per optimizer step that changed the weights; learns: which groups did, the others keep their averages.

        One pass over memory per average; the slices are long, so torch._foreach_lerp_ would not be quicker.
        """
        for group, master in enumerate(self._masters):
            if learns[group]:
                updates = self.num_updates[group]
                for decay, averages in zip(self.decays, self._averages.values(), strict=True):
                    averages[group].lerp_(master, 1 - min(decay, (1 + updates) / (10 + updates)))
                self.num_updates[group] += 1

    def settle(self, learns: list[bool]) -> None:
        """Groups that do not learn from now on stay what they are on (main) average (collective).

        Their further averages take the same values: everything is trained from now on beside these weights, and an
        average over a time in which they stand still can be nothing else.
        """
        main = self._averages[MAIN]
        for averages in list(self._averages.values())[1:]:
            for group, learnt in enumerate(learns):
                if not learnt:
                    averages[group].copy_(main[group])
        chosen = zip(main, self._masters, learns, strict=True)
        self._assign([master if learnt else average for average, master, learnt in chosen])

    @contextmanager
    def swapped_in(self, vector: str = MAIN) -> Iterator[None]:
        """The model computes with these averaged weights inside this block (collective: all ranks enter and leave it).

        The master weights are afterwards what they were, to the last bit, whatever was raised. Raises RuntimeError
        when the model could not be given its weights: it may then hold averaged ones, and the run has to end.
        """
        averages = self._averages[vector]
        saved = [master.clone() for master in self._masters]
        try:
            self._assign(averages)
        except BaseException:
            self._copy(saved)  # without the other ranks: they may be gone, or elsewhere
            raise
        try:
            yield
        finally:
            self._assign(saved)

    def _assign(self, values: list[Tensor]) -> None:
        """Set the master weights, then those of the model (collective)."""
        self._copy(values)
        try:
            self._optimizer.update_lp_params()
        except Exception as error:
            raise RuntimeError(
                "the weights of the model could not be exchanged between the ranks; start again, the run resumes from "
                f"its last checkpoint ({type(error).__name__}: {error})"
            ) from error

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for master, value in zip(self._masters, values, strict=True):
            master.copy_(value)
