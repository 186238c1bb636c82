"""The diffusion transformer of the published AR-Diffusion weights, number for number.

It differs from ours (ardiff/models/dit.py) in what the weights were trained with: context tokens in front of the video
that may read all frames, blocks that overwrite the residual stream with its normalised self (`share_norm`), positions
counted over the flattened tokens, and no modulation of the last layer. Its state dict has the reference's names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ardiff.compat.reference.blocks import Block, Rotary, TimestepEmbedder
from ardiff.compat.reference.model import ReferenceModel
from ardiff.config import ModelConfig
from ardiff.errors import UserError
from ardiff.sampling.cache import KVCache

FRAME_0_MODES = ("reproduce", "sharenorm_shift_first_t")  # the first frame's timestep reaches other tokens


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
