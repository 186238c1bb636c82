"""Which frames are given, on top of any distribution: a prefix, both ends, or any frames of the clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig
from ardiff.diffusion.timesteps.base import Draw, as_timesteps, below, clean_timestep


def width(num_frames: int) -> int:
    """Uniform numbers that `condition` needs per sample."""
    return num_frames + 4


def condition(draw: Draw, u: Tensor, lengths: Tensor, settings: DiffusionConfig) -> Draw:
    """Give more frames; u [B, F + 4] are uniform numbers, lengths [B] the real frames of the clips.

    At least one frame of every sample stays to be trained, images included: where the distribution gives them all, the
    last one is noised, by a uniform timestep.
    """
    frame = torch.arange(draw.timesteps.shape[1])
    given = draw.given
    if settings.conditioning.probability:
        given = given | _chosen(u, frame, lengths, settings)
    end = torch.minimum(lengths, draw.window)[:, None]
    is_last = frame == end - 1
    nothing_left = (given | (frame >= end)).all(dim=1, keepdim=True)
    rescued = nothing_left & is_last
    timesteps = torch.where(rescued, as_timesteps(u[:, 3:4], settings), draw.timesteps)
    given = given & ~rescued
    return Draw(torch.where(given, clean_timestep(settings), timesteps), given, draw.window)


def _chosen(u: Tensor, frame: Tensor, lengths: Tensor, settings: DiffusionConfig) -> Tensor:
    """The frames [B, F] that `settings.conditioning` gives; 1..max_frames of a chosen sample, less than it has."""
    options = settings.conditioning
    most = (lengths - 1).clamp(max=options.max_frames)
    count = torch.where((u[:, 0] < options.probability) & (most > 0), 1 + below(u[:, 1], most.clamp(min=1)), 0)[:, None]
    if options.where == "prefix":
        return frame < count
    if options.where == "ends":  # how many of them are at the beginning is uniform, none and all included
        first = below(u[:, 2:3], count + 1)
        return (frame < first) | ((frame >= lengths[:, None] - (count - first)) & (frame < lengths[:, None]))
    order = u[:, 4:].masked_fill(frame >= lengths[:, None], 2.0).argsort(dim=1, stable=True)
    return order.argsort(dim=1) < count
