"""What the loop needs to know of the thing it trains; everything else is the same for the DiT and the AR-VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from ardiff.config import Config
from ardiff.data.clips import Collate
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture

Preview = Callable[[nn.Module], dict[str, np.ndarray]]  # network -> tag -> video uint8 [F, H, W, 3]


@dataclass
class Job:
    """One thing to train."""

    name: str
    config: Config
    build_objective: Callable[[], nn.Module]  # it holds the network as `.network`; forward(batch) -> Terms
    data: Mixture
    collate: Collate
    flops_per_clip: float  # forward
    tokens_per_clip: int
    latent_space: LatentSpace | None = None  # what the network's latents mean
    preview: Preview | None = None  # on rank 0, with EMA weights, in evaluation mode
    notes: list[str] = field(default_factory=list)  # for the log, once
