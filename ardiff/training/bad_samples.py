"""The samples that had to be replaced, of all ranks: told, counted, and too many of them end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ardiff.config import DataConfig
from ardiff.data.clips import BAD_IN_A_ROW, BadSample, count_bad
from ardiff.data.mixture import Mixture
from ardiff.errors import UserError
from ardiff.training.distributed import World

log = logging.getLogger("ardiff")


class BadSamples:
    """Collected by each rank, and known to all of them whenever they `meet`."""

    def __init__(self, data: Mixture, config: DataConfig, world: World) -> None:
        self._data, self._config, self._world = data, config, world
        self._known: list[BadSample] = []  # of all ranks, in the order of the run
        self._here: list[BadSample] = []  # of this rank, since the ranks last met

    @property
    def count(self) -> int:
        """Positions with a bad sample, as far as known."""
        return count_bad(self._known, 1)[0]

    def add(self, found: Sequence[BadSample]) -> None:
        """Of a batch of this rank."""
        self._here += found

    def state(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [list(bad) for bad in self._known]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """From a checkpoint."""
        self._known, self._here = [BadSample(*entry) for entry in state], []

    def meet(self, samples: int) -> UserError | None:
        """Let all ranks know of all (collective); returns why the run has to end, if it has to: the same on all.

        samples: how many the run has seen.
        """
        new = sorted(bad for part in self._world.gather(self._here) for bad in part)
        self._here = []
        if not new:
            return None
        self._known += (BadSample(*entry) for entry in new)
        if self._world.is_main:
            for position, shard, offset, reason in new:
                log.warning("BAD SAMPLE at position %d replaced: %s, byte %d: %s", position, shard, offset, reason)
        bad, in_a_row = count_bad(self._known, self._data.lanes)
        share, seen = self._config.max_bad_fraction, max(samples, self._data.visits_per_epoch)
        if in_a_row >= BAD_IN_A_ROW:
            problem = f"{in_a_row} bad samples in a row"
        elif bad > share * seen:
            problem = f"{bad} bad samples in {seen} (an epoch, or all so far)"
            problem += f", more than data.max_bad_fraction = {share:g}"
        else:
            return None
        return UserError(
            f"{problem}; the last: {new[-1].shard}, byte {new[-1].offset}: {new[-1].reason}; see "
            "`python -m data_tools.inspect_shards repair`, or allow more"
        )
