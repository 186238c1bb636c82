"""Timestep and position embeddings of the transformers."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

SINUSOIDS = 256


class TimestepEmbedding(nn.Module):
    """Integer timesteps [...] -> vectors [..., D]: 256 sinusoids and a two-layer perceptron (as in DiT)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        half = SINUSOIDS // 2
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = t.double()[..., None] * torch.exp(-math.log(10000.0) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] by per-token angles given as cos and sin [T, D/2]; halves of D are the two axes."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 could not tell neighbouring frames apart
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=64)
def rotary_tables(
    first: int, num_frames: int, tokens_per_frame: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Float64 cos and sin [num_frames * tokens_per_frame, head_dim/2] of the absolute frame index.

    All tokens of a frame share its angle, so K/V of a finished frame never change when the video grows.
    """
    with torch.inference_mode(False):  # the tables are kept, and training may be the next to use them
        return _rotary_tables(first, num_frames, tokens_per_frame, head_dim, theta, device)


def _rotary_tables(
    first: int, num_frames: int, tokens_per_frame: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    frames = torch.arange(first, first + num_frames, dtype=torch.float64, device=device)
    angles = (frames[:, None] * frequencies).repeat_interleave(tokens_per_frame, dim=0)
    return angles.cos(), angles.sin()
