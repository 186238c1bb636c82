"""The forward process and its inverse steps.

"Scaled-linear" betas, linspace(sqrt(beta_start), sqrt(beta_end), T)^2, in float64; t is 0-based, t = 0 being the
cleanest training state (there is no index for "exactly clean").
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig
from ardiff.errors import UserError

PREDICTIONS = ("x0", "eps", "v")


class Schedule:
    """Betas and what follows from them, for a network that predicts `prediction`.

    prediction: `x0`; `eps` (the noise); `v` = sqrt(a) noise - sqrt(1 - a) x0 with a = alphas_cumprod[t].
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: str = "x0",
    ) -> None:
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction '{prediction}' must be one of {', '.join(PREDICTIONS)}")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"betas must satisfy 0 < beta_start <= beta_end < 1, found {beta_start}, {beta_end}")
        self.num_timesteps, self.prediction = num_timesteps, prediction
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Schedule:
        """The schedule of a configuration."""
        return cls(config.num_timesteps, config.beta_start, config.beta_end, config.prediction)

    def alpha(self, t: Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at t [...], on the device and in the dtype of `like`, with axes appended to broadcast.

        float32 arithmetic at least: in bf16 the cleanest and the noisiest levels would coincide.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        values = self._table(like.device)[t].to(dtype)
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))

    @lru_cache(maxsize=8)  # noqa: B019 - a schedule lives as long as the program
    def _table(self, device: torch.device) -> Tensor:
        return self.alphas_cumprod.to(device)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(a) x0 + sqrt(1 - a) noise, with t [B, F] per frame and x0, noise [B, F, L, C]."""
        alpha = self.alpha(t, x0)
        return (alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise).to(x0.dtype)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is trained to output."""
        if self.prediction == "x0":
            return x0
        if self.prediction == "eps":
            return noise
        alpha = self.alpha(t, x0)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a network output stands for."""
        if self.prediction == "x0":
            return output
        alpha = self.alpha(t, x_t)
        if self.prediction == "eps":
            return (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return alpha.sqrt() * x_t - (1 - alpha).sqrt() * output

    def timesteps(self, num_steps: int) -> Tensor:
        """Timestep by progress [num_steps + 1]: not started (T-1), then the uniform grid down to 1.

        For 50 steps of T = 1000: 999, 981, 961, ..., 21, 1. Index k labels a frame that makes its k-th update; the
        last entry is also the label of a finished frame.
        """
        if not 1 <= num_steps < self.num_timesteps:
            raise UserError(
                f"{num_steps} sampling steps: must lie between 1 and num_timesteps - 1 = {self.num_timesteps - 1}"
            )
        stride = self.num_timesteps // num_steps
        grid = torch.arange(num_steps - 1, -1, -1) * stride + 1
        return torch.cat([torch.tensor([self.num_timesteps - 1]), grid])

    def ddim_step(self, x_t: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Deterministic DDIM from t to t_next (both [B, F]), given the predicted x0.

        t_next below the grid is 0: the last step ends at alphas_cumprod[0], as in the reference.
        """
        alpha, alpha_next = self.alpha(t, x_t), self.alpha(t_next, x_t)
        eps = (x_t - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return (alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * eps).to(x_t.dtype)
