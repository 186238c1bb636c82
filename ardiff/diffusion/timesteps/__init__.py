"""Distributions of training timesteps: one noise level per frame, and which frames are given without noise.

Each distribution is a function of uniform random numbers per sample, so that the same code serves a torch generator
and the counter-based randomness of the loader, and a sample does not depend on the others of its batch. `Timesteps`
is what training uses; `draw`, `fopp` and their twins return bare timesteps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ardiff.config import DiffusionConfig, timestep_problems
from ardiff.diffusion.timesteps import conditioning, plain, staircases
from ardiff.diffusion.timesteps.base import Distribution, Draw, clean_timestep
from ardiff.errors import UserError
from ardiff.randomness import uniforms

__all__ = [
    "DISTRIBUTIONS",
    "Draw",
    "Timesteps",
    "clean_timestep",
    "draw",
    "draw_from_seeds",
    "fopp",
    "fopp_from_seeds",
]


def _mixture(u: Tensor, num_frames: int, settings: DiffusionConfig) -> Draw:
    """Every sample from one of the distributions in `settings.mixture`, chosen by weight."""
    weights = torch.tensor([part.weight for part in settings.mixture], dtype=u.dtype)
    ends = weights.cumsum(0) / weights.sum()
    number = torch.searchsorted(ends, u[:, 0].contiguous(), right=True).clamp(max=len(ends) - 1)
    found = [DISTRIBUTIONS[part.timesteps].draw(u[:, 1:], num_frames, settings) for part in settings.mixture]
    row = torch.arange(len(u))
    return Draw(*(torch.stack(columns)[number, row] for columns in zip(*found, strict=True)))


DISTRIBUTIONS = {
    "fopp": Distribution(plain.fopp, lambda num_frames: num_frames + 1),
    "synchronous": Distribution(plain.synchronous, lambda num_frames: 1),
    "independent": Distribution(plain.independent, lambda num_frames: num_frames),
    "uniform_monotone": Distribution(plain.uniform_monotone, lambda num_frames: num_frames),
    "fvdm": Distribution(plain.fvdm, lambda num_frames: num_frames + 1),
    "pavdm": Distribution(staircases.pavdm, lambda num_frames: num_frames + 4),
    "rolling": Distribution(staircases.rolling, lambda num_frames: 3),
    "ad_matched": Distribution(staircases.ad_matched, lambda num_frames: num_frames + 3),
    "teacher_forced": Distribution(staircases.teacher_forced, lambda num_frames: 3),
    "mixture": Distribution(_mixture, lambda num_frames: num_frames + 5),
}


class Timesteps:
    """The distribution of a configuration, for clips of `num_frames` frames.

    Raises UserError for settings that do not fit together, with the arithmetic.
    """

    def __init__(self, settings: DiffusionConfig, num_frames: int) -> None:
        if settings.timesteps not in DISTRIBUTIONS:
            raise UserError(f"timestep distribution '{settings.timesteps}' must be one of {', '.join(DISTRIBUTIONS)}")
        for problem in timestep_problems(settings, num_frames):
            raise UserError(problem)
        self.settings, self.num_frames = settings, num_frames
        used = settings.used_timesteps
        stairs = settings.staircase
        # Whether frames are ever given, and whether windows are ever shorter than a clip.
        self.gives = bool(
            settings.conditioning.probability
            or used & {"ad_matched", "teacher_forced"}
            or (stairs.prefix and used & {"pavdm", "rolling"})
        )
        self.cuts = bool(
            (stairs.variable_length and used & {"pavdm", "ad_matched", "teacher_forced"})
            or (stairs.prefix and stairs.prefix_dropout and used & {"pavdm", "rolling"})
        )
        self._distribution = DISTRIBUTIONS[settings.timesteps]
        self._width = self._distribution.width(num_frames)
        # Uniform numbers that a sample is made of.
        self.width = self._width + (conditioning.width(num_frames) if self.gives else 0)

    def from_seeds(self, seeds: Tensor | np.ndarray, lengths: Tensor | np.ndarray | None = None) -> Draw:
        """Row i is a function of seeds[i] [B] and of lengths[i], the real frames of that clip (None: all)."""
        return self.from_uniforms(uniforms(np.asarray(seeds), self.width), lengths)

    def from_uniforms(self, u: np.ndarray, lengths: Tensor | np.ndarray | None = None) -> Draw:
        """Row i is a function of u[i], `width` numbers in [0, 1) (u: float64 [B, width]), and of lengths[i]."""
        return self._draw(torch.from_numpy(u), lengths)

    def from_generator(
        self, batch_size: int, generator: torch.Generator | None = None, lengths: Tensor | np.ndarray | None = None
    ) -> Draw:
        """`batch_size` samples with torch's (or the given) generator."""
        u = torch.rand(batch_size, self.width, dtype=torch.float64, generator=generator)
        return self._draw(u, lengths)

    def trained(self, draw: Draw, lengths: Tensor | np.ndarray | None = None) -> Tensor:
        """The frames [B, F] that the loss counts: real, in the window and not given."""
        frame = torch.arange(self.num_frames)
        return (frame < torch.minimum(self._lengths(lengths, draw), draw.window)[:, None]) & ~draw.given

    def _draw(self, u: Tensor, lengths: Tensor | np.ndarray | None) -> Draw:
        drawn = self._distribution.draw(u[:, : self._width], self.num_frames, self.settings)
        if not self.gives:
            return drawn
        return conditioning.condition(drawn, u[:, self._width :], self._lengths(lengths, drawn), self.settings)

    def _lengths(self, lengths: Tensor | np.ndarray | None, draw: Draw) -> Tensor:
        return torch.full_like(draw.window, self.num_frames) if lengths is None else torch.as_tensor(lengths)


def draw(
    name: str,
    batch_size: int,
    num_frames: int,
    num_timesteps: int,
    generator: torch.Generator | None = None,
    settings: DiffusionConfig | None = None,
) -> Tensor:
    """Timesteps [B, F] from a named distribution, with torch's (or the given) generator.

    int64 in 0..T-1, or float64 in [0, T] where `settings` have the process rectified_flow.
    """
    return _named(name, num_frames, num_timesteps, settings).from_generator(batch_size, generator).timesteps


def draw_from_seeds(
    name: str,
    seeds: Tensor | np.ndarray,
    num_frames: int,
    num_timesteps: int,
    settings: DiffusionConfig | None = None,
) -> Tensor:
    """Timesteps [B, F]; row i is a function of seeds[i] alone."""
    return _named(name, num_frames, num_timesteps, settings).from_seeds(seeds).timesteps


def fopp(batch_size: int, num_frames: int, num_timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """FoPP timesteps [B, F] (int64, 0..T-1, non-decreasing along F), AR-Diffusion Algorithm 1."""
    return draw("fopp", batch_size, num_frames, num_timesteps, generator)


def fopp_from_seeds(seeds: Tensor | np.ndarray, num_frames: int, num_timesteps: int) -> Tensor:
    """As `fopp`, row i being a function of seeds[i] alone."""
    return draw_from_seeds("fopp", seeds, num_frames, num_timesteps)


def _named(name: str, num_frames: int, num_timesteps: int, settings: DiffusionConfig | None) -> Timesteps:
    settings = settings or DiffusionConfig()
    return Timesteps(dataclasses.replace(settings, timesteps=name, num_timesteps=num_timesteps), num_frames)
