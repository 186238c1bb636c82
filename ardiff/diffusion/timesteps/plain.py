"""Distributions without structure in time other than order: FoPP, one level for all frames, independent levels.

FoPP (AR-Diffusion, CVPR 2025) draws a frame f and its timestep t uniformly and then the rest uniformly among all
non-decreasing sequences through (f, t). The frames before f are then a uniform multiset of f values from {0..t} and
those after it one of F-1-f values from {t..T-1}; a uniform multiset is what a Polya urn draws: begin with one ball of
each value, and return every drawn ball together with a copy of it. In continuous time (rectified flow) ties have no
weight and the multisets are sorted independent numbers. Exact for every F and T, without tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig
from ardiff.diffusion.timesteps.base import Draw, all_noisy, as_timesteps, below, is_continuous


def _draw_from_urns(u: Tensor, values: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """Uniform multisets, unsorted: u [B, K] -> draws [B, K], each in 0..values-1 (all arguments broadcast to [B, K]).

    Column i is draw number `order` of an urn that holds `values` values and whose first draw is column `first`.
    """
    ball = below(u, values + order)
    is_copy = ball >= values  # the ball is one that an earlier draw added
    source = (first + ball - values).clamp(min=0)
    drawn = ball.masked_fill(is_copy, 0)
    for i in range(1, u.shape[1]):
        copied = drawn.gather(1, source[:, i : i + 1])[:, 0]
        drawn[:, i] = torch.where(is_copy[:, i], copied, drawn[:, i])
    return drawn


def fopp(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """A uniform frame at a uniform timestep, the others uniform over all non-decreasing sequences through it."""
    frame = below(u[:, 0], num_frames)[:, None]
    anchor = as_timesteps(u[:, 1:2], settings)
    slot = torch.arange(num_frames - 1)  # the frames other than the anchor: the first `frame` of them come before it
    before = slot < frame
    if is_continuous(settings):
        room = torch.where(before, anchor, settings.num_timesteps - anchor)
        drawn = u[:, 2 : num_frames + 1] * room
    else:
        drawn = _draw_from_urns(
            u[:, 2 : num_frames + 1],
            values=torch.where(before, anchor + 1, settings.num_timesteps - anchor),
            order=torch.where(before, slot, slot - frame),
            first=torch.where(before, torch.zeros_like(frame), frame),
        )
    drawn = torch.where(before, drawn, drawn + anchor)
    return all_noisy(torch.cat([drawn, anchor], dim=1).sort(dim=1).values)


def uniform_monotone(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """Uniform over all non-decreasing sequences (AR-Diffusion's ablation "AR")."""
    if is_continuous(settings):
        return all_noisy(as_timesteps(u[:, :num_frames], settings).sort(dim=1).values)
    slot, zero = torch.arange(num_frames), torch.zeros(1, dtype=torch.long)
    drawn = _draw_from_urns(u[:, :num_frames], zero + settings.num_timesteps, slot, zero)
    return all_noisy(drawn.sort(dim=1).values)


def synchronous(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """One uniform timestep for all frames: ordinary video diffusion."""
    return all_noisy(as_timesteps(u[:, :1], settings).repeat(1, num_frames))


def independent(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """A uniform timestep for every frame: diffusion forcing."""
    return all_noisy(as_timesteps(u[:, :num_frames], settings))


def fvdm(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """One timestep for all frames with probability `shared_probability`, otherwise independent ones.

    FVDM decides once per step; here every sample decides for itself, so that it does not depend on its batch.
    """
    shared = u[:, :1] < settings.shared_probability
    times = u[:, 1 : num_frames + 1]
    return all_noisy(as_timesteps(torch.where(shared, times[:, :1], times), settings))
