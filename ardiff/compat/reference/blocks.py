"""The parts of the published transformer: embeddings of timesteps, rotary positions, attention, blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.config import ModelConfig
from ardiff.models.attention import frame_attention
from ardiff.models.dit import gated, modulate
from ardiff.sampling.cache import KVCache

SINUSOIDS = 256


class TimestepEmbedder(nn.Module):
    """Timesteps [B, F] -> vectors [B, F, D]; sinusoids in float32, as the weights were trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """256 numbers per timestep, through two layers."""
        half = SINUSOIDS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[..., None] * torch.exp(-math.log(10000.0) * exponents)
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


class Rotary(nn.Module):
    """Rotation of adjacent pairs of channels by position x frequency."""

    freqs: Tensor

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", frequencies)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, T, D] at positions [T]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = positions.to(self.freqs.dtype)[:, None] * self.freqs
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        first, second = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over context tokens and frames, optionally with affine QK-norm and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        num_context: int,
        rotate: Callable[[Tensor], Tensor] | None,
        cache: KVCache | None,
        window: tuple[int, int],
    ) -> Tensor:
        """x [B, N + F*L, D] -> [B, N + F*L, D]."""
        qkv = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.config.num_heads)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if cache is None:
            out = self._attend(q, k, v, num_context, window, 0)
        elif cache.context_tokens:
            k, v = cache.extend(self.layer, k, v)
            out = self._attend(q, k, v, cache.num_context or num_context, window, cache.evicted)
        else:  # the cache holds frames only: the context, which reads nothing but itself, is computed anew
            n = num_context
            keys, values = cache.extend(self.layer, k[:, :, n:], v[:, :, n:])
            keys, values = torch.cat([k[:, :, :n], keys], dim=2), torch.cat([v[:, :, :n], values], dim=2)
            video = self._attend(q[:, :, n:], keys, values, n, window, cache.evicted)
            alone = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
            out = torch.cat([alone, video], dim=2)
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, num_context: int, window: tuple[int, int], evicted: int
    ) -> Tensor:
        config = self.config
        return frame_attention(
            q,
            k,
            v,
            config.tokens_per_frame,
            num_context,
            mask=config.mask,
            context=config.context,
            backend=config.attention_backend,
            window=window[0],
            sink=window[1],
            evicted=evicted,
        )


class MLP(nn.Module):
    """Two layers with tanh-GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP under one of the reference's merge modes.

    share_norm: LN(h) replaces h, modulated frames go through the branch, its gated output is added; context tokens
    are neither modulated nor gated. separate_norm: the same on an ordinary pre-norm residual.
    sharenorm_shift_first_t: as share_norm, but context tokens take frame 0's shift and scale, and the MLP takes those
    of the attention. reproduce: pre-norm residual, all tokens modulated and gated by frame 0's timestep.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.mode = config.reference.merge_mode
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(config, layer)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        num_context: int,
        rotate: Callable[[Tensor], Tensor] | None,
        cache: KVCache | None,
        window: tuple[int, int],
    ) -> Tensor:
        """x [B, N + F*L, D], embedded timesteps t [B, F, D] -> [B, N + F*L, D]."""

        def attend(h: Tensor) -> Tensor:
            return self.attn(h, num_context, rotate, cache, window)

        if self.mode == "reproduce":
            t = t[:, :1]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(t).chunk(6, dim=-1)
        if self.mode == "sharenorm_shift_first_t":
            shift2, scale2 = shift1, scale1
        x = self._branch(x, attend, shift1, scale1, gate1, num_context)
        return self._branch(x, self.mlp, shift2, scale2, gate2, num_context)

    def _branch(
        self,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        num_context: int,
    ) -> Tensor:
        h = self.norm(x)
        if self.mode == "reproduce":
            return x + gate * function(h * (1 + scale) + shift)
        residual = x if self.mode == "separate_norm" else h
        h = modulate(h, shift, scale, num_context)
        if self.mode == "sharenorm_shift_first_t":
            context = h[:, :num_context] * (1 + scale[:, :1]) + shift[:, :1]
            h = torch.cat([context, h[:, num_context:]], dim=1)
        return residual + gated(function(h), gate, num_context)
