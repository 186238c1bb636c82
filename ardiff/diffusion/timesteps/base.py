"""What all distributions of training timesteps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig


class Draw(NamedTuple):
    """The noise of training samples, frame by frame."""

    timesteps: Tensor  # [B, F] int64 in 0..T-1; under rectified_flow float64 in [0, T]
    given: Tensor  # [B, F] bool: conditioning frames, fed without noise and not trained
    window: Tensor  # [B] int64: so many frames exist for the sample, the others are neither read nor trained


class Distribution(NamedTuple):
    """`draw(u [B, width(F)], F, settings)` makes a `Draw` of uniform random numbers; row i is a function of u[i]."""

    draw: Callable[[Tensor, int, DiffusionConfig], Draw]
    width: Callable[[int], int]


def below(u: Tensor, count: Tensor | int) -> Tensor:
    """Uniform integers in [0, count) from uniform numbers in [0, 1)."""
    limit = torch.as_tensor(count) - 1
    return torch.minimum((u * count).floor().long(), limit)


def is_continuous(settings: DiffusionConfig) -> bool:
    """Whether timesteps are real numbers in [0, T], or integers in 0..T-1."""
    return settings.process == "rectified_flow"


def as_timesteps(share: Tensor, settings: DiffusionConfig) -> Tensor:
    """Shares of the way from data to noise, in [0, 1], as timesteps; integers are rounded down."""
    times = share * settings.num_timesteps
    return times if is_continuous(settings) else times.floor().long().clamp(max=settings.num_timesteps - 1)


def clean_timestep(settings: DiffusionConfig) -> int:
    """The label of a frame without noise, as in sampling: 0 is clean in rectified_flow; DDPM has no such index, and 1
    is what the reference labels finished frames with.
    """
    return 0 if is_continuous(settings) else min(1, settings.num_timesteps - 1)


def all_noisy(timesteps: Tensor) -> Draw:
    """A draw without conditioning frames in full windows."""
    batch, num_frames = timesteps.shape
    return Draw(timesteps, torch.zeros(batch, num_frames, dtype=torch.bool), torch.full((batch,), num_frames))
