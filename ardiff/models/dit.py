"""The diffusion transformer: joint attention over all tokens of all frames, one noise level per frame.

Pre-norm adaLN-Zero blocks (Peebles & Xie 2023) with a true residual stream; the modulation differs per frame
(AR-Diffusion, CVPR 2025). Positions are rotary over the absolute frame index plus a learned embedding per token slot,
so the model is not tied to a number of frames and finished frames can be cached.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ardiff.config import ModelConfig
from ardiff.errors import UserError
from ardiff.models.attention import frame_attention
from ardiff.models.embeddings import TimestepEmbedding, apply_rotary, rotary_tables
from ardiff.sampling.cache import KVCache


class Attention(nn.Module):
    """Multi-head frame attention with QK-norm and rotary frame positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, num_context: int, first_frame: int, cache: KVCache | None, window: tuple[int, int]
    ) -> Tensor:
        config = self.config
        qkv = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=config.num_heads)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        num_frames = (x.shape[1] - num_context) // config.tokens_per_frame
        cos, sin = rotary_tables(
            first_frame, num_frames, config.tokens_per_frame, self.head_dim, config.rope_theta, x.device
        )
        if num_context:  # context tokens have no position in time
            q, k = (
                torch.cat([part[:, :, :num_context], apply_rotary(part[:, :, num_context:], cos, sin)], dim=2)
                for part in (q, k)
            )
        else:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            num_context = cache.num_context or num_context
        out = frame_attention(
            q,
            k,
            v,
            config.tokens_per_frame,
            num_context,
            mask=config.mask,
            block=config.block,
            context=config.context,
            backend=config.attention_backend,
            window=window[0],
            sink=window[1],
            evicted=cache.evicted if cache is not None else 0,
        )
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated per frame; context tokens pass unmodulated."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        hidden = int(width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(config, layer)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        num_context: int,
        first_frame: int,
        cache: KVCache | None,
        window: tuple[int, int],
    ) -> Tensor:
        """x [B, N + F*L, D], condition [B, F, D] -> [B, N + F*L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        normed = modulate(self.norm1(x), shift1, scale1, num_context)
        out = self.attention(normed, num_context, first_frame, cache, window)
        x = x + gated(out, gate1, num_context)
        out = self.mlp(modulate(self.norm2(x), shift2, scale2, num_context))
        return x + gated(out, gate2, num_context)


class DiT(nn.Module):
    """The network of the diffusion model; what its output means is the objective's affair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embed = nn.Linear(config.in_channels, width)
        self.slot_embed = nn.Parameter(torch.empty(config.tokens_per_frame, width))
        self.t_embed = TimestepEmbedding(width)
        # One row more than there are classes: the null label of classifier-free guidance is trained, not a class.
        self.label_embed = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.context_embed = nn.Linear(config.context_dim, width) if config.context_dim else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.in_channels)
        self.initialize()

    def initialize(self) -> None:
        """Xavier weights, zero biases; modulations and the last layer zero, so that blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.t_embed.mlp[0], self.t_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.normal_(self.slot_embed, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation." in name or name.startswith("final."):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Noisy latents x [B, F, L, C] and timesteps t [B, F] -> raw output [B, F, L, C].

        label [B]: classes, `num_classes` being the null label (None: all null). context [B, N, context_dim]: text
        features. cache: K/V of the frames before x, which then continues the video at frame `cache.num_frames`.
        window: (frames, sink) that a frame reads at most, see `frame_attention` (None: as in the configuration).
        """
        self._check(x, t, label, context)
        dtype = self.x_embed.weight.dtype
        h = rearrange(self.x_embed(x.to(dtype)) + self.slot_embed, "b f l d -> b (f l) d")
        condition = self.t_embed(t)
        if self.label_embed is not None:
            if label is None:
                label = t.new_full((x.shape[0],), self.config.num_classes)
            condition = condition + self.label_embed(label)[:, None]
        condition = F.silu(condition)
        num_context = 0
        if context is not None and not (cache is not None and cache.num_context):
            assert self.context_embed is not None
            h = torch.cat([self.context_embed(context.to(dtype)), h], dim=1)
            num_context = context.shape[1]
        first_frame = cache.num_frames if cache is not None else 0
        window = window or (self.config.window, self.config.sink)
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, condition, num_context, first_frame, cache, window, use_reentrant=False)
            else:
                h = block(h, condition, num_context, first_frame, cache, window)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        h = modulate(self.final_norm(h[:, num_context:]), shift, scale, 0)
        return rearrange(self.final(h), "b (f l) c -> b f l c", l=x.shape[2]).to(x.dtype)

    def _check(self, x: Tensor, t: Tensor, label: Tensor | None, context: Tensor | None) -> None:
        expected = (self.config.tokens_per_frame, self.config.in_channels)
        if x.ndim != 4 or tuple(x.shape[2:]) != expected:
            raise UserError(
                f"latents {tuple(x.shape)} do not fit a model of {expected[0]} tokens x {expected[1]} channels"
            )
        if t.shape != x.shape[:2]:
            raise UserError(f"timesteps {tuple(t.shape)} must be [B, F] = {tuple(x.shape[:2])}")
        if label is not None and label.shape != x.shape[:1]:
            raise UserError(f"labels {tuple(label.shape)} must be [B] = ({x.shape[0]},)")
        if context is not None:
            if self.context_embed is None:
                raise UserError("context was given, but model.context_dim is 0")
            if context.ndim != 3 or (context.shape[0], context.shape[2]) != (x.shape[0], self.config.context_dim):
                raise UserError(
                    f"context {tuple(context.shape)} must be [B, N, D] = ({x.shape[0]}, N, {self.config.context_dim})"
                )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, num_context: int) -> Tensor:
    """x [B, N + F*L, D] * (1 + scale) + shift with scale and shift [B, F, D], context tokens left as they are."""
    if num_context:
        video = modulate(x[:, num_context:], shift, scale, 0)
        return torch.cat([x[:, :num_context], video], dim=1)
    frames = rearrange(x, "b (f l) d -> b f l d", f=shift.shape[1])
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, num_context: int) -> Tensor:
    """x [B, N + F*L, D] times gate [B, F, D] per frame, context tokens left as they are."""
    if num_context:
        return torch.cat([x[:, :num_context], gated(x[:, num_context:], gate, 0)], dim=1)
    return (rearrange(x, "b (f l) d -> b f l d", f=gate.shape[1]) * gate[:, :, None]).flatten(1, 2)
