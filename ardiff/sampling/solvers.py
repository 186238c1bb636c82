"""From one level to a lower one, every frame by itself: DDIM and DPM-Solver++(2M)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.diffusion.schedule import Grid
from ardiff.errors import UserError

SOLVERS = ("ddim", "dpmpp")


@dataclass
class History:
    """What a multistep solver remembers of each frame: x0 [B, n, L, C] and the level [n] at which it was predicted.

    Level -1: nothing yet. It moves along with the frames, because each of them is somewhere else on its way.
    """

    x0: Tensor
    level: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> History:
        """Of new frames [B, n, L, C]."""
        return cls(torch.zeros_like(like), torch.full((like.shape[1],), -1))

    def append(self, other: History) -> History:
        """These frames, then the others."""
        return History(torch.cat([self.x0, other.x0], dim=1), torch.cat([self.level, other.level]))

    def drop(self, count: int) -> History:
        """Without the first frames."""
        return History(self.x0[:, count:], self.level[count:])


@dataclass(frozen=True)
class Solver:
    """`ddim` (Song et al. 2021; eta 0 is deterministic, 1 ancestral) or `dpmpp`: the second-order multistep
    DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) in terms of x0. Under rectified flow DDIM is Euler's method.
    """

    grid: Grid
    name: str = "ddim"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise UserError(f"solver '{self.name}' must be one of {', '.join(SOLVERS)}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta = {self.eta} must lie between 0 (deterministic) and 1")
        if self.eta and self.name != "ddim":
            raise UserError(f"eta = {self.eta} needs solver 'ddim'; '{self.name}' is deterministic")

    def step(
        self,
        x: Tensor,
        x0: Tensor,
        before: Tensor,
        after: Tensor,
        history: History | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Frames x [B, n, L, C] at levels `before` [n] -> at levels `after` [n], given their predicted x0.

        history: of `dpmpp`, aligned with x. noise [B, n, L, C]: of DDIM with eta above 0.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        data, old = self._column(self.grid.data[before], x, dtype), self._column(self.grid.noise[before], x, dtype)
        data_next = self._column(self.grid.data[after], x, dtype)
        new = self._column(self.grid.noise[after], x, dtype)
        if self.name == "dpmpp" and history is not None:
            x0 = self._extrapolated(x0, before, after, history, dtype)
        eps = (x - data * x0) / old
        if not self.eta:  # DDIM, which is the first-order DPM-Solver++ too
            return (data_next * x0 + new * eps).to(x.dtype)
        assert noise is not None
        variance = self.eta**2 * new**2 * (1 - (data * new / (data_next * old)) ** 2)
        kept = (new**2 - variance).clamp(min=0).sqrt()
        return (data_next * x0 + kept * eps + variance.clamp(min=0).sqrt() * noise).to(x.dtype)

    def _extrapolated(self, x0: Tensor, before: Tensor, after: Tensor, history: History, dtype: torch.dtype) -> Tensor:
        """x0 + (x0 - previous x0) / (2 r) with r = previous step / this step in log(data / noise).

        First order for the first step of a frame, and for a step that ends without noise (an infinite one).
        """
        known = (history.level >= 0) & (self.grid.noise[after] > 0)
        previous = torch.where(history.level >= 0, history.level, before)
        log_ratio = (self.grid.data.log() - self.grid.noise.log()).nan_to_num(posinf=0.0, neginf=-50.0)
        step, last = log_ratio[after] - log_ratio[before], log_ratio[before] - log_ratio[previous]
        weight = torch.where(known & (last > 0), step / (2 * last.clamp(min=1e-12)), torch.zeros_like(step))
        return x0 + self._column(weight, x0, dtype) * (x0 - history.x0)

    @staticmethod
    def _column(values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(device=like.device, dtype=dtype)[None, :, None, None]
