"""Distributions that follow a method of sampling: what the network meets in training is what it will meet then.

Levels count solver steps: S is noise, 0 is clean, and every step takes a frame from one level to the next. A staircase
is the level of every frame at one moment of sampling; all of it may be shifted by a little ("jitter"), which fills the
gaps between the levels and keeps the distances between frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig
from ardiff.diffusion.timesteps.base import Draw, as_timesteps, below, clean_timestep, is_continuous


def pavdm(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """The staircase of PA-VDM: chunk j = 1..K of `block` frames is at level j m - k, m = S / K, at stage k = 0..m-1.

    Under rectified_flow that is t = T (j m - k) / S, clamped to T - 1; under ddpm the label of the sampling grid. The
    levels follow from S and K alone (the release builds them from the number of frames, which is right only if that
    equals S). The stage is drawn per sample, not per batch as published: what a sample is may not depend on the
    samples beside it, or ranks and restarts would change it.

    With probability `variable_length` the window is one of the beginning of a video, where it holds the noisiest
    g < K chunks, or of its end, where the cleanest g are left. With probability `prefix_dropout` it has no prefix.
    """
    stairs = settings.staircase
    frame = torch.arange(num_frames)
    prefix = _prefix(u[:, 2], settings)[:, None]
    chunks = (num_frames - stairs.prefix) // stairs.block
    steps = stairs.num_steps // chunks  # m
    stage = below(u[:, :1], steps)
    chunk = (frame - prefix).div(stairs.block, rounding_mode="floor") + 1  # from 1; the prefix has less
    present = torch.full((len(u),), chunks)
    if stairs.variable_length:
        form = below(u[:, 1] / stairs.variable_length, 2 * (chunks - 1))
        partial, growing = u[:, 1] < stairs.variable_length, form % 2 == 1
        present = torch.where(partial, 1 + form // 2, present)
        chunk = chunk + torch.where(growing, chunks - present, 0)[:, None]
    timesteps = _times(chunk * steps - stage + _jitter(u[:, 3:], num_frames, settings), settings)
    return _finished(timesteps, frame < prefix, prefix[:, 0] + present * stairs.block, settings)


def ad_matched(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """A uniform row of the level matrix AD(s), all of it shifted by the jitter.

    L[r, i] = clip(S - (r - b s), 0, S) with b the block of frame i, counted from the end of the prefix. Frames that
    the row finds finished are given. With probability `variable_length` those that it has not begun are left out of
    the window; otherwise they are there as noise.
    """
    stairs = settings.staircase
    frame = torch.arange(num_frames)
    waiting = (frame // stairs.block - stairs.prefix // stairs.block) * stairs.gap
    row = below(u[:, :1], stairs.num_steps + int(waiting[-1]))
    level = stairs.num_steps - row + waiting  # before it is cut to 0..S
    given = (level <= 0) | (frame < stairs.prefix)
    started = (level <= stairs.num_steps).sum(dim=1)
    left_out = u[:, 1] < stairs.variable_length
    window = torch.where(left_out, started, num_frames)
    moved = level + _jitter(u[:, 2:], num_frames, settings)
    waiting = torch.minimum(level, moved) > stairs.num_steps
    timesteps = torch.where(waiting, settings.num_timesteps - 1, _times(moved, settings))
    return _finished(timesteps, given, window, settings)


def teacher_forced(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """(0..0, t, T..T): a uniform block at a uniform timestep, everything before it given, everything after it noise.

    With probability `variable_length` what comes after it is left out of the window.
    """
    stairs = settings.staircase
    frame = torch.arange(num_frames)
    block, first = frame // stairs.block, stairs.prefix // stairs.block
    current = first + below(u[:, :1], int(block[-1]) + 1 - first)
    share = torch.where(block > current, 1.0, u[:, 1:2])
    given = (block < current) | (frame < stairs.prefix)
    end = ((current[:, 0] + 1) * stairs.block).clamp(max=num_frames)
    window = torch.where(u[:, 2] < stairs.variable_length, end, num_frames)
    return _finished(as_timesteps(share, settings), given, window, settings)


def rolling(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """Rolling Diffusion: frame w of W is at the share (w + u) / W of the way to noise, u uniform for the sample.

    With probability `init_probability` the start of a video instead: clip(w / W + u, 0, 1), from all noise to the
    staircase. w and W leave out the `prefix` frames, which are given; with probability `prefix_dropout` the window
    holds the W others only.
    """
    prefix = _prefix(u[:, 2], settings)[:, None]
    frame, width = torch.arange(num_frames) - prefix, num_frames - settings.staircase.prefix
    init = u[:, 1:2] < settings.init_probability
    share = torch.where(init, frame / width + u[:, :1], (frame + u[:, :1]) / width).clamp(0, 1)
    return _finished(as_timesteps(share, settings), frame < 0, prefix[:, 0] + width, settings)


def _prefix(u: Tensor, settings: DiffusionConfig) -> Tensor:
    """Clean frames in front of each sample [B]."""
    return torch.where(u < settings.staircase.prefix_dropout, 0, settings.staircase.prefix)


def _finished(timesteps: Tensor, given: Tensor, window: Tensor, settings: DiffusionConfig) -> Draw:
    return Draw(torch.where(given, clean_timestep(settings), timesteps), given, window)


def _times(level: Tensor, settings: DiffusionConfig) -> Tensor:
    """Timesteps of levels (real numbers), as `Schedule.grid` labels them in sampling.

    rectified_flow: T level / S. ddpm: floor((level - 1) T / S) + 1, as the sampler's grid.
    """
    total, steps = settings.num_timesteps, settings.staircase.num_steps
    if is_continuous(settings):
        return (level * total / steps).clamp(0, total - 1)
    return ((level - 1) * total / steps + 1e-9).floor().long().add(1).clamp(0, total - 1)


def _jitter(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Tensor:
    """How far the levels of frames [B, F] are moved, in solver steps, from uniform numbers [B, F + 1].

    The deviation is `jitter` of one step: of a shift that all frames share, or of every frame by itself, or both.
    """
    pattern = settings.staircase.pattern
    normal = torch.special.ndtri(u[:, : num_frames + 1].clamp(min=2.0**-54)) * settings.staircase.jitter
    moved = torch.zeros(len(u), num_frames, dtype=u.dtype)
    if pattern in ("linear-shift", "linear-variance-shift"):
        moved = moved + normal[:, :1]
    if pattern in ("linear-variance", "linear-variance-shift"):
        moved = moved + normal[:, 1:]
    return moved
