"""The published frame auto-encoders (TiTok with a continuous bottleneck, per frame or with a temporal decoder).

A ViT encoder with latent tokens, a ViT decoder that ends in soft indices of a 1,024-entry codebook, and the
convolutional decoder of MaskGIT-VQGAN. The state dict has the reference's names. Temporal blocks have no positions in
time, and start at zero (as the reference means to; its own initialisation overwrites that).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.compat.reference.options import VIT_SIZES
from ardiff.compat.reference.pixels import PixelDecoder
from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.models.temporal import (
    Clip,
    MultiHeadAttention,
    TemporalCache,
    decode_clips,
    mix_frames,
    temporal_blocks,
)

CODES, CODE_WIDTH = 1024, 256


class MLP(nn.Module):
    """Two layers with exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer of one frame, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the perceptron, each added to x."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Frames [N, 3, H, W] in [0, 1] -> moments [N, 2C, L], mean and log-variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        layers, width, heads = VIT_SIZES[config.reference.encoder]
        patch, num_patches = config.patch_size, (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(num_patches + 1, width) * width**-0.5)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(config.num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, 2 * config.channels, 1)

    def forward(self, frames: Tensor, latent_tokens: Tensor) -> Tensor:
        """latent_tokens [L, D] are the same for every frame."""
        patches = rearrange(self.patch_embed(frames), "n d h w -> n (h w) d")
        first = self.class_embedding.expand(len(frames), -1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(len(frames), -1, -1)
        x = self.ln_pre(torch.cat([x, latents], dim=1))
        for layer in self.transformer:
            x = layer(x)
        tokens = self.ln_post(x[:, patches.shape[1] + 1 :])
        # [N, L, D] is read as [N, D, L] without a transpose: the weights were trained with tokens mixed up like this.
        mixed = tokens.reshape(len(frames), tokens.shape[2], tokens.shape[1], 1)
        return self.conv_out(mixed)[..., 0]


class Decoder(nn.Module):
    """Latents [B*F, L, C] -> scores of the codes [B*F, 1024, h, w]; temporal: also from the frames before."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        options = config.reference
        layers, width, heads = VIT_SIZES[options.decoder]
        self.side = config.image_size // options.decoder_patch_size
        self.decoder_embed = nn.Linear(config.channels, width)
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(self.side**2 + 1, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(config.num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, CODES, 1))

    def add_temporal_blocks(self, config: VAEConfig) -> None:
        """Let frames read those before them."""
        self.fine_temporal_blocks, self.coarse_temporal_blocks = temporal_blocks(*VIT_SIZES[config.reference.decoder])

    def forward(self, latents: Tensor, clip: Clip | None = None) -> Tensor:
        """Frames of a clip read those before them, others only themselves."""
        count, num_patches = len(latents), self.side**2
        tokens = self.decoder_embed(latents) + self.latent_token_positional_embedding
        masked = self.mask_token.expand(count, num_patches, -1)
        masked = torch.cat([self.class_embedding.expand(count, -1, -1), masked], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([masked, tokens], dim=1))
        for number, layer in enumerate(self.transformer):
            if clip is not None:  # the class token stays out of it
                first, patches, latent = x.split([1, num_patches, tokens.shape[1]], dim=1)
                fine, coarse = self.fine_temporal_blocks[number], self.coarse_temporal_blocks[number]
                x = torch.cat([first, mix_frames(fine, coarse, patches, latent, clip, number)], dim=1)
            x = layer(x)
        x = self.ln_post(x[:, 1 : 1 + num_patches])
        return self.ffn(rearrange(x, "n (h w) d -> n d h w", h=self.side))


class ReferenceARVAE(nn.Module):
    """encode(video [B, F, 3, H, W] in [0, 1]) -> [B, F, L, C]; decode([B, F, L, C]) -> video, about [0, 1].

    `temporal`: frames are decoded with those before them.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.temporal = config.reference.temporal
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        width = VIT_SIZES[config.reference.encoder][1]
        self.latent_tokens = nn.Parameter(torch.randn(config.num_tokens, width) * width**-0.5)
        self.pixel_quantize_conv = nn.Conv2d(CODES, CODE_WIDTH, 1)
        self.pixel_decoder = PixelDecoder(CODE_WIDTH)
        if self.temporal:  # last, so that the other weights start as they do without
            self.decoder.add_temporal_blocks(config)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer that paints the pixels."""
        return self.pixel_decoder.conv_out

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, F, 3, H, W] in [0, 1] -> mean and log-variance, each [B, F, L, C]."""
        size = self.config.image_size
        if video.ndim != 5 or tuple(video.shape[2:]) != (3, size, size):
            raise UserError(f"video {tuple(video.shape)} must be [B, F, 3, {size}, {size}]")
        moments = self.encoder(video.flatten(0, 1).to(self.latent_tokens.dtype), self.latent_tokens)
        mean, logvar = rearrange(moments, "(b f) c l -> b f l c", b=len(video)).chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, video: Tensor) -> Tensor:
        """video [B, F, 3, H, W] in [0, 1] -> posterior mean [B, F, L, C], not normalised."""
        return self.posterior(video)[0]

    def decode(self, latents: Tensor, cache: TemporalCache | None = None, temporal: bool = True) -> Tensor:
        """latents [B, F, L, C] of any length per token -> video [B, F, 3, H, W], not clamped.

        cache and temporal as of `ARVAE.decode`.
        """
        if not (self.temporal and temporal):
            return self._decode(latents)
        return decode_clips(self._decode, latents, cache, self.config.window)

    def _decode(self, latents: Tensor, clip: Clip | None = None) -> Tensor:
        latents = latents.to(self.latent_tokens.dtype)
        if self.config.reference.unit_norm:
            latents = F.normalize(latents, dim=-1)
        scores = self.decoder(latents.flatten(0, 1), clip)
        frames = self.pixel_decoder(self.pixel_quantize_conv(scores.softmax(dim=1)))
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(latents))
