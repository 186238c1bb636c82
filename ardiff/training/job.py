"""What the loop needs to know of the thing it trains; everything else is the same for the DiT and the AR-VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from ardiff.config import Config, Phase
from ardiff.data.clips import Collate
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture

Preview = Callable[[nn.Module], dict[str, np.ndarray]]  # network -> tag -> video uint8 [F, H, W, 3]


class Validate(Protocol):
    """What is measured on held-out data while training, shared by all ranks.

    Called with averaged weights, in evaluation mode and without gradients.
    """

    @property
    def identity(self) -> str:
        """Of the held-out data: the same on all ranks."""
        ...

    def measure(self, objective: nn.Module, rank: int, world_size: int, /) -> Any:
        """This rank's share of the work: small and picklable. No collectives, so it may raise."""
        ...

    def combine(self, parts: list[Any], /) -> dict[str, Any]:
        """The shares of all ranks in order -> figures `validation_...`, numbers or lists of numbers. Rank 0 only."""
        ...


@dataclass
class Feed:
    """Where the batches of a phase come from, and what a clip of it costs."""

    data: Mixture
    collate: Collate
    flops_per_clip: float  # forward
    tokens_per_clip: int
    counts_as: int = 1  # what a clip counts in the configuration's batch sizes: 1, or its frames for an AR-VAE


@dataclass
class Job:
    """One thing to train."""

    name: str
    config: Config
    build_objective: Callable[[], nn.Module]  # it holds the network as `.network`; forward(batch) -> Terms
    feeds: list[Feed]  # of each of train.phases; the same object where nothing changes
    latent_space: LatentSpace | None = None  # what the network's latents mean
    preview: Preview | None = None  # on rank 0, with EMA weights, in evaluation mode
    validate: Validate | None = None  # the same on all ranks, see there
    build_discriminator: Callable[[], nn.Module] | None = None  # for stages that have one
    enter: Callable[[nn.Module, Phase], None] | None = None  # prepares the objective for a phase
    initialise: Callable[[nn.Module], None] | None = None  # gives a new run's network weights to start from
    pictures: Callable[[], dict[str, np.ndarray]] | None = None  # tag -> uint8 [H, W, 3], shown once, at the beginning
    notes: list[str] = field(default_factory=list)  # for the log, once

    @property
    def data(self) -> Mixture:
        """The videos; all phases have the same."""
        return self.feeds[0].data

    def every_feed(self) -> list[Feed]:
        """Each feed once, in the order of the phases."""
        return list({id(feed): feed for feed in self.feeds}.values())

    def check(self, world_size: int) -> None:
        """Refuse batches that the data cannot give, in any phase. Raises UserError."""
        for feed in self.feeds:
            size, batch = self.config.train.global_batch_size // feed.counts_as, "train.global_batch_size"
            feed.data.check(size, world_size, batch if feed.counts_as == 1 else f"{batch} / {feed.counts_as} frames")

    def continue_with(self, history: list[list[Any]], position: int) -> bool:
        """See `Mixture.continue_with`; all phases mix alike."""
        changed = [feed.data.continue_with(history, position) for feed in self.every_feed()]
        return any(changed)
