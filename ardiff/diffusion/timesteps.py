"""Distributions of training timesteps: one noise level per frame.

Each distribution is a function of uniform random numbers [B, F + 1], so that the same code serves a torch generator
and the counter-based randomness of the loader. All are exact for every F and T, without tables.

FoPP (AR-Diffusion, CVPR 2025) draws a frame f and its timestep t uniformly and then the rest uniformly among all
non-decreasing sequences through (f, t). The frames before f are then a uniform multiset of f values from {0..t} and
those after it one of F-1-f values from {t..T-1}; a uniform multiset is what a Polya urn draws: begin with one ball of
each value, and return every drawn ball together with a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ardiff.errors import UserError
from ardiff.randomness import uniforms

Distribution = Callable[[Tensor, int, int], Tensor]


def _below(u: Tensor, count: Tensor | int) -> Tensor:
    """Uniform integers in [0, count) from uniform numbers in [0, 1)."""
    limit = torch.as_tensor(count) - 1
    return torch.minimum((u * count).floor().long(), limit)


def _draw_from_urns(u: Tensor, values: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """Uniform multisets, unsorted: u [B, K] -> draws [B, K], each in 0..values-1 (all arguments broadcast to [B, K]).

    Column i is draw number `order` of an urn that holds `values` values and whose first draw is column `first`.
    """
    ball = _below(u, values + order)
    is_copy = ball >= values  # the ball is one that an earlier draw added
    source = (first + ball - values).clamp(min=0)
    drawn = ball.masked_fill(is_copy, 0)
    for i in range(1, u.shape[1]):
        copied = drawn.gather(1, source[:, i : i + 1])[:, 0]
        drawn[:, i] = torch.where(is_copy[:, i], copied, drawn[:, i])
    return drawn


def _fopp(u: Tensor, num_frames: int, num_timesteps: int) -> Tensor:
    frame = _below(u[:, 0], num_frames)[:, None]
    anchor = _below(u[:, 1], num_timesteps)[:, None]
    slot = torch.arange(num_frames - 1)  # the frames other than the anchor: the first `frame` of them come before it
    before = slot < frame
    drawn = _draw_from_urns(
        u[:, 2:],
        values=torch.where(before, anchor + 1, num_timesteps - anchor),
        order=torch.where(before, slot, slot - frame),
        first=torch.where(before, torch.zeros_like(frame), frame),
    )
    drawn = torch.where(before, drawn, drawn + anchor)
    return torch.cat([drawn, anchor], dim=1).sort(dim=1).values


def _synchronous(u: Tensor, num_frames: int, num_timesteps: int) -> Tensor:
    return _below(u[:, :1], num_timesteps).repeat(1, num_frames)


def _independent(u: Tensor, num_frames: int, num_timesteps: int) -> Tensor:
    return _below(u[:, :num_frames], num_timesteps)


def _uniform_monotone(u: Tensor, num_frames: int, num_timesteps: int) -> Tensor:
    slot, zero = torch.arange(num_frames), torch.zeros(1, dtype=torch.long)
    return _draw_from_urns(u[:, :num_frames], zero + num_timesteps, slot, zero).sort(dim=1).values


DISTRIBUTIONS: dict[str, Distribution] = {
    "fopp": _fopp,
    "synchronous": _synchronous,
    "independent": _independent,
    "uniform_monotone": _uniform_monotone,
}


def draw(
    name: str, batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps [B, F] in 0..T-1 from a named distribution, with torch's (or the given) generator."""
    u = torch.rand(batch_size, num_frames + 1, dtype=torch.float64, generator=generator)
    return _named(name)(u, num_frames, num_timesteps)


def draw_from_seeds(name: str, seeds: Tensor | np.ndarray, num_frames: int, num_timesteps: int) -> Tensor:
    """Timesteps [B, F]; row i is a function of seeds[i] alone."""
    keys = np.asarray(seeds)
    u = torch.from_numpy(uniforms(keys, num_frames + 1))
    return _named(name)(u, num_frames, num_timesteps)


def fopp(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """FoPP timesteps [B, F] (int64, 0..T-1, non-decreasing along F), AR-Diffusion Algorithm 1."""
    return draw("fopp", batch_size, num_frames, num_timesteps, generator)


def fopp_from_seeds(seeds: Tensor | np.ndarray, num_frames: int, num_timesteps: int) -> Tensor:
    """As `fopp`, row i being a function of seeds[i] alone."""
    return draw_from_seeds("fopp", seeds, num_frames, num_timesteps)


def _named(name: str) -> Distribution:
    if name not in DISTRIBUTIONS:
        raise UserError(f"timestep distribution '{name}' must be one of {', '.join(DISTRIBUTIONS)}")
    return DISTRIBUTIONS[name]
