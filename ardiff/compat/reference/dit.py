"""The diffusion transformer of the published AR-Diffusion weights, number for number.

It differs from ours (ardiff/models/dit.py) in what the weights were trained with: context tokens in front of the video
that may read all frames, blocks that overwrite the residual stream with its normalised self (`share_norm`), positions
counted over the flattened tokens, and no modulation of the last layer. Its state dict has the reference's names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ardiff.compat.reference.model import ReferenceModel
from ardiff.config import ModelConfig
from ardiff.errors import UserError
from ardiff.models.attention import frame_attention
from ardiff.models.dit import gated, modulate
from ardiff.sampling.cache import KVCache

SINUSOIDS = 256
FRAME_0_MODES = ("reproduce", "sharenorm_shift_first_t")  # the first frame's timestep reaches other tokens


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


class ReferenceDiT(nn.Module):
    """The published network: (x [B, F, L, C], t [B, F], context [B, N, context_dim]) -> raw output [B, F, L, C].

    Buffers, not trained: `pos_embed` [1, F*L, D] or `rotary_emb.freqs` [head_dim/2], rebuilt where a checkpoint lacks
    them, and the embedding the network was trained under: `context_emb` [N, context_dim], or with classes `class_emb`
    [num_classes + 1, N, context_dim]. With `learn_sigma` the output has 2C channels.
    """

    pos_embed: Tensor
    context_emb: Tensor | None
    class_emb: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, options = config.hidden_size, config.reference
        self.rotary_emb: Rotary | None = None
        if options.positions == "rotary":
            self.rotary_emb = Rotary(rotary_frequencies(width // config.num_heads, config.rope_theta))
        else:
            self.register_buffer("pos_embed", sincos_table(config.num_frames * config.tokens_per_frame, width))
        self.x_embedder = nn.Linear(config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.c_embedder = nn.Linear(options.context_dim, width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        out_channels = config.in_channels * (2 if options.learn_sigma else 1)
        final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_layer = nn.Sequential(final_norm, nn.Linear(width, out_channels))
        self.register_buffer("context_emb", None)
        self.register_buffer("class_emb", None)

    @classmethod
    def untrained(cls, config: ModelConfig) -> ReferenceDiT:
        """A network as the reference starts to train it, with a random embedding that stays as it is."""
        network = cls(config)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
        tokens = (config.reference.context_tokens, config.reference.context_dim)
        if config.num_classes:
            network.class_emb = 0.1 * torch.randn(config.num_classes + 1, *tokens)
        else:
            network.context_emb = 0.1 * torch.randn(*tokens)
        return network

    def as_model(self, prediction: str, null_context: Tensor | None = None) -> ReferenceModel:
        """This network as `ardiff.sampling.sample` calls it; see `ReferenceModel`."""
        return ReferenceModel(self, prediction, null_context)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """cache: K/V of the frames before x, for a strict context. window: see `frame_attention`."""
        config = self.config
        self._check(x, t, context, cache)
        dtype = self.x_embedder.weight.dtype
        first_frame = cache.num_frames if cache is not None else 0
        h = rearrange(self.x_embedder(x.to(dtype)), "b f l d -> b (f l) d")
        num_context = 0 if cache is not None and cache.num_context else context.shape[1]
        first = first_frame * config.tokens_per_frame
        rotate = None
        if self.rotary_emb is None:
            h = (h + self.pos_embed[:, first : first + h.shape[1]]).to(dtype)
        else:
            rotate = self._rotation(h.shape[1], first, num_context, context.shape[1])
        if num_context:
            h = torch.cat([self.c_embedder(context.to(dtype)), h], dim=1)
        condition = self.t_embedder(t)
        window = window or (config.window, config.sink)
        for block in self.blocks:
            if config.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, condition, num_context, rotate, cache, window, use_reentrant=False)
            else:
                h = block(h, condition, num_context, rotate, cache, window)
        out = self.final_layer(h[:, num_context:])
        return rearrange(out, "b (f l) c -> b f l c", l=x.shape[2]).to(x.dtype)

    def _rotation(self, length: int, first: int, num_context: int, offset: int) -> Callable[[Tensor], Tensor]:
        """Rotates num_context + length tokens; video token 0 stands at position `offset`, after the context."""
        assert self.rotary_emb is not None
        rotary, device = self.rotary_emb, self.rotary_emb.freqs.device
        video = torch.arange(offset + first, offset + first + length, device=device)
        positions = torch.cat([torch.arange(num_context, device=device), video])
        return lambda part: rotary(part, positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReferenceDiT:
        """Move or cast the network; tables and embeddings stay float32 (bfloat16 cannot count to 512)."""
        owners = [(module, name) for module in self.modules() for name in module._buffers]
        kept = {(module, name): module._buffers[name] for module, name in owners}
        super()._apply(fn, recurse)
        for (module, name), value in kept.items():
            moved = module._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                module._buffers[name] = value.to(moved.device)
        return self

    def _check(self, x: Tensor, t: Tensor, context: Tensor, cache: KVCache | None) -> None:
        config, options = self.config, self.config.reference
        expected = (config.tokens_per_frame, config.in_channels)
        if x.ndim != 4 or tuple(x.shape[2:]) != expected:
            raise UserError(f"latents {tuple(x.shape)} must be [B, F, L, C] with L x C = {expected[0]} x {expected[1]}")
        if t.shape != x.shape[:2]:
            raise UserError(f"timesteps {tuple(t.shape)} must be [B, F] = {tuple(x.shape[:2])}")
        if context.ndim != 3 or (context.shape[0], context.shape[2]) != (x.shape[0], options.context_dim):
            raise UserError(
                f"context {tuple(context.shape)} must be [B, N, D] = ({x.shape[0]}, N, {options.context_dim})"
            )
        frames = x.shape[1] + (cache.num_frames if cache is not None else 0)
        if options.positions == "flat" and frames > config.num_frames:
            raise UserError(
                f"{frames} frames, but the positions of this network end after {config.num_frames}; sample longer "
                f"videos with window = SlidingWindow({config.num_frames})"
            )
        if cache is not None and (config.context != "strict" or options.merge_mode in FRAME_0_MODES):
            raise UserError(
                f"cache = 'exact' needs strict context and tokens that depend on their own frame alone; this network "
                f"has context = '{config.context}' and merge_mode = '{options.merge_mode}': use cache = 'none'"
            )


def fixed_tables(config: ModelConfig) -> dict[str, Tensor]:
    """The tables of a network, by their names in its state dict."""
    if config.reference.positions == "rotary":
        return {"rotary_emb.freqs": rotary_frequencies(config.hidden_size // config.num_heads, config.rope_theta)}
    return {"pos_embed": sincos_table(config.num_frames * config.tokens_per_frame, config.hidden_size)}


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians per position [head_dim/2] of every pair of channels."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def sincos_table(length: int, width: int) -> Tensor:
    """The fixed position table [1, length, width]: sines, then cosines, of position / 10000^(k / (width/2))."""
    frequencies = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()[None]
