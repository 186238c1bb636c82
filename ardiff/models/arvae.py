"""The frame auto-encoder (AR-VAE): every frame becomes L tokens of C numbers, independently of the others.

The decoder works frame by frame as well, or reads earlier frames too (`vae.temporal`, see temporal.py).

A ViT encoder with L latent tokens and a ViT decoder with mask tokens (TiTok, Yu et al. 2024), trained with a
continuous bottleneck: latents are normalised to unit length per token before decoding, so only their direction counts.

Latent tokens start as local averages of the patches, and mask tokens as local averages of the latent tokens,
through learned weights: attention alone is slow to find out where each token belongs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.config import VAEConfig
from ardiff.models.temporal import Clip, TemporalCache, decode_clips, mix_frames, temporal_blocks


class Layer(nn.Module):
    """A pre-norm transformer layer with full attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the perceptron, each added to x."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        x = x + self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return x + self.mlp(self.norm2(x))


def grid_places(rows: int, columns: int) -> Tensor:
    """Centres of a grid's cells in the unit square, row by row: (y, x), [rows * columns, 2]."""
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def token_places(num_tokens: int) -> Tensor:
    """A place in the unit square for each latent token, on the grid nearest to a square: (y, x), [L, 2]."""
    rows = next(rows for rows in range(math.isqrt(num_tokens), 0, -1) if num_tokens % rows == 0)
    return grid_places(rows, num_tokens // rows)


def position_embedding(places: Tensor, width: int) -> Tensor:
    """places [T, 2] -> [T, width]: sines and cosines of y and x, from a quarter wave to four waves per frame."""
    frequencies = 0.5 * math.pi * 16 ** torch.linspace(0, 1, width // 4)
    angles = places[..., None] * frequencies  # [T, 2, width // 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(waves, (0, width - waves.shape[1]))


def local_average(to: Tensor, places: Tensor) -> Tensor:
    """Weights [T, S], rows summing to 1, by which tokens at `to` [T, 2] average those at `places` [S, 2]."""
    spacing = min(len(to), len(places)) ** -0.5  # of the coarser grid
    return torch.softmax(-0.5 * (torch.cdist(to, places) / (0.6 * spacing)) ** 2, dim=-1)


def as_pictures(frames: Tensor) -> np.ndarray:
    """Decoded frames [..., 3, H, W], about [0, 1] -> uint8 [..., H, W, 3] on the host."""
    return frames.float().clamp(0, 1).mul(255).round().byte().movedim(-3, -1).cpu().numpy()


class ARVAE(nn.Module):
    """Encoder of single frames, and a decoder of single frames or, `temporal`, of frames and those before them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, side = config.hidden_size, config.patch_size, config.image_size // config.patch_size
        patches, tokens = grid_places(side, side), token_places(config.num_tokens)
        positions = position_embedding(torch.cat([patches, tokens]), width)
        self.patch_embed = nn.Linear(3 * patch * patch, width)
        self.encoder_pool = nn.Parameter(local_average(tokens, patches))
        self.encoder_positions = nn.Parameter(positions)
        self.encoder = nn.Sequential(*(Layer(width, config.num_heads) for _ in range(config.encoder_depth)))
        self.encoder_norm = nn.LayerNorm(width)
        self.to_latents = nn.Linear(width, 2 * config.channels)
        self.from_latents = nn.Linear(config.channels, width)
        self.decoder_pool = nn.Parameter(local_average(patches, tokens))
        self.decoder_positions = nn.Parameter(positions.clone())
        self.decoder = nn.Sequential(*(Layer(width, config.num_heads) for _ in range(config.decoder_depth)))
        self.decoder_norm = nn.LayerNorm(width)
        self.margin = patch // 2  # each patch also paints this far into its neighbours
        self.to_pixels = nn.Linear(width, 3 * (patch + 2 * self.margin) ** 2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.temporal = config.temporal
        if self.temporal:  # last, so that the other weights start as they do without
            self.fine_temporal_blocks, self.coarse_temporal_blocks = temporal_blocks(
                config.decoder_depth, width, config.num_heads
            )

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that paints the pixels."""
        return self.to_pixels

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, F, 3, H, W] in [0, 1] -> mean and log-variance, each [B, F, L, C]."""
        size, patch = self.config.image_size, self.config.patch_size
        if video.ndim != 5 or tuple(video.shape[2:]) != (3, size, size):
            raise ValueError(f"video {tuple(video.shape)} must be [B, F, 3, {size}, {size}]")
        frames = rearrange(video, "b f c (h p) (w q) -> (b f) (h w) (c p q)", p=patch, q=patch)
        x = self.patch_embed((frames * 2 - 1).to(self.patch_embed.weight.dtype))
        x = self.encoder(torch.cat([x, self.encoder_pool @ x], dim=1) + self.encoder_positions)
        out = self.to_latents(self.encoder_norm(x[:, -self.config.num_tokens :]))
        mean, logvar = rearrange(out, "(b f) l c -> b f l c", b=len(video)).chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, video: Tensor) -> Tensor:
        """video [B, F, 3, H, W] in [0, 1] -> posterior mean [B, F, L, C], not normalised."""
        return self.posterior(video)[0]

    def decode(self, latents: Tensor, cache: TemporalCache | None = None, temporal: bool = True) -> Tensor:
        """latents [B, F, L, C] of any length per token -> video [B, F, 3, H, W], about [0, 1] but not clamped.

        With a cache they continue the videos that it has seen. temporal=False decodes every frame by itself; networks
        without temporal blocks always do, and need no cache. Raises UserError for the cache of other videos.
        """
        if not (self.temporal and temporal):
            return self._decode(latents)
        head_dim = self.config.hidden_size // self.config.num_heads
        return decode_clips(self._decode, latents, cache, self.config.window, head_dim)

    def _decode(self, latents: Tensor, clip: Clip | None = None) -> Tensor:
        unit = F.normalize(latents.to(self.from_latents.weight.dtype), dim=-1)
        tokens = self.from_latents(rearrange(unit, "b f l c -> (b f) l c")) * self.config.channels**0.5
        x = torch.cat([self.decoder_pool @ tokens, tokens], dim=1) + self.decoder_positions
        for number, layer in enumerate(self.decoder):
            if clip is not None:
                patches, latent = x.split([len(self.decoder_pool), self.config.num_tokens], dim=1)
                fine, coarse = self.fine_temporal_blocks[number], self.coarse_temporal_blocks[number]
                x = mix_frames(fine, coarse, patches, latent, clip, number)
            x = layer(x)
        pixels = self.to_pixels(self.decoder_norm(x[:, : len(self.decoder_pool)]))
        size, patch = self.config.image_size, self.config.patch_size
        frames = F.fold(  # overlapping patches are added up
            pixels.transpose(1, 2), size, patch + 2 * self.margin, padding=self.margin, stride=patch
        )
        return rearrange((frames + 1) / 2, "(b f) c h w -> b f c h w", b=len(latents))
