"""The forward process between data and noise, and what sampling needs of it: x_t = data(t) x0 + noise(t) eps.

`ddpm`: "scaled-linear" betas, linspace(sqrt(beta_start), sqrt(beta_end), T)^2, in float64; data = sqrt(a), noise =
sqrt(1 - a) with a = alphas_cumprod[t]. t is 0-based, t = 0 being the cleanest training state; there is no index for
"exactly clean".

`rectified_flow` (PA-VDM and Open-Sora): data = 1 - tau, noise = tau with tau = r u / (1 + (r - 1) u) and u = t / T. t
is any number from 0 (exactly clean) to T (noise), and r, the resolution warp, shifts training and sampling to noise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ardiff.config import DiffusionConfig
from ardiff.errors import UserError

PREDICTIONS = ("x0", "eps", "v")
PROCESSES = ("ddpm", "rectified_flow")


class Grid(NamedTuple):
    """S sampling steps as levels S (noise) down to 0 (clean), every column [S + 1].

    labels: the timestep that the network is told for a frame at a level (int64, or float64 under rectified_flow);
    waiting: the one for a frame at level S that is not updated yet. data, noise (float64): the frame at a level is
    data * x0 + noise * eps.
    """

    labels: Tensor
    waiting: int
    data: Tensor
    noise: Tensor


class Schedule:
    """A forward process for a network that predicts `prediction`.

    prediction: `x0`; `eps` (the noise); `v` = sqrt(a) noise - sqrt(1 - a) x0 under `ddpm`, x0 - noise under
    `rectified_flow` (the sign of PA-VDM: the velocity towards the data).
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: str = "x0",
        process: str = "ddpm",
        flow_shift: float = 1.0,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction '{prediction}' must be one of {', '.join(PREDICTIONS)}")
        if process not in PROCESSES:
            raise UserError(f"process '{process}' must be one of {', '.join(PROCESSES)}")
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"betas must satisfy 0 < beta_start <= beta_end < 1, found {beta_start}, {beta_end}")
        if process == "rectified_flow" and prediction == "eps":
            raise UserError("prediction 'eps' says nothing of the data where rectified_flow is noise; use 'v' or 'x0'")
        if not flow_shift > 0:
            raise UserError(f"flow_shift = {flow_shift} must be above 0")
        self.num_timesteps, self.prediction = num_timesteps, prediction
        self.process, self.flow_shift = process, flow_shift
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)

    @classmethod
    def from_config(cls, config: DiffusionConfig, image_size: int = 256, num_frames: int = 16) -> Schedule:
        """The schedule of a configuration; the two sizes give the resolution warp where flow_shift is 0."""
        shift = config.flow_shift or resolution_shift(image_size, image_size, num_frames)
        return cls(config.num_timesteps, config.beta_start, config.beta_end, config.prediction, config.process, shift)

    def predicting(self, prediction: str) -> Schedule:
        """The same process for a network that predicts something else."""
        betas = self.betas[0].item(), self.betas[-1].item()
        return Schedule(self.num_timesteps, *betas, prediction, self.process, self.flow_shift)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """data and noise at t [...], on the device and in the dtype of `like`, with axes appended to broadcast.

        float32 arithmetic at least: in bf16 the cleanest and the noisiest levels would coincide.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.process == "ddpm":
            alpha = self._table(like.device)[t].to(dtype)
            data, noise = alpha.sqrt(), (1 - alpha).sqrt()
        else:
            tau = self.warp(t.double() / self.num_timesteps).to(dtype)
            data, noise = 1 - tau, tau
        shape = data.shape + (1,) * (like.ndim - data.ndim)
        return data.reshape(shape), noise.reshape(shape)

    @lru_cache(maxsize=8)  # noqa: B019 - a schedule lives as long as the program
    def _table(self, device: torch.device) -> Tensor:
        return self.alphas_cumprod.to(device)

    def warp(self, u: Tensor) -> Tensor:
        """Time u in [0, 1] of rectified flow -> the share of noise."""
        return self.flow_shift * u / (1 + (self.flow_shift - 1) * u)

    def labels(self, t: Tensor) -> Tensor:
        """What the network is told of t: t itself, or the warped time (as published for PA-VDM)."""
        return t if self.process == "ddpm" else self.warp(t.double() / self.num_timesteps) * self.num_timesteps

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, F, L, C] from x0 and noise of that shape, with t [B, F] per frame."""
        data_scale, noise_scale = self.scales(t, x0)
        return (data_scale * x0 + noise_scale * noise).to(x0.dtype)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is trained to output."""
        if self.prediction == "x0":
            return x0
        if self.prediction == "eps":
            return noise
        if self.process == "rectified_flow":
            return x0 - noise
        data_scale, noise_scale = self.scales(t, x0)
        return data_scale * noise - noise_scale * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a network output stands for."""
        return self.clean(output, x_t, *self.scales(t, x_t))

    def clean(self, output: Tensor, x_t: Tensor, data: Tensor, noise: Tensor) -> Tensor:
        """As `to_x0`, for frames that are known to be data * x0 + noise * eps (both broadcast to x_t)."""
        if self.prediction == "x0":
            return output
        if self.prediction == "eps":
            return (x_t - noise * output) / data
        return x_t + noise * output if self.process == "rectified_flow" else data * x_t - noise * output

    def grid(self, num_steps: int) -> Grid:
        """The levels of `num_steps` sampling steps.

        ddpm, 50 steps of T = 1000: labels 981, 961, ..., 1 at levels 50 to 1, then 1 again for a clean frame; waiting
        frames are 999. The last step ends at alphas_cumprod[0], as in the reference. rectified_flow: t = T S'/S.
        """
        if not 1 <= num_steps < self.num_timesteps:
            raise UserError(
                f"{num_steps} sampling steps: must lie between 1 and num_timesteps - 1 = {self.num_timesteps - 1}"
            )
        levels = torch.arange(num_steps + 1)
        if self.process == "rectified_flow":
            tau = self.warp(levels.double() / num_steps)
            return Grid(tau * self.num_timesteps, self.num_timesteps, 1 - tau, tau)
        t = ((levels - 1) * self.num_timesteps // num_steps + 1).clamp(min=0)  # to the top, whether S divides T or not
        alpha = self.alphas_cumprod[t]
        return Grid(t.clamp(min=1), self.num_timesteps - 1, alpha.sqrt(), (1 - alpha).sqrt())

    def timesteps(self, num_steps: int) -> Tensor:
        """Timestep by progress [num_steps + 1]: not started, then the labels of levels S down to 1.

        For 50 steps of T = 1000: 999, 981, 961, ..., 21, 1. Index k labels a frame that makes its k-th update.
        """
        grid = self.grid(num_steps)
        return torch.cat([grid.labels.new_tensor([grid.waiting]), grid.labels[1:].flip(0)])


def resolution_shift(height: int, width: int, num_latent_frames: int) -> float:
    """r of the time warp for videos of this size (Open-Sora v1.2): sqrt(H W / 512^2) * sqrt(frames of latents)."""
    return (height * width / 512**2 * num_latent_frames) ** 0.5
