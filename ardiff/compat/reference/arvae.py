"""The published frame auto-encoders (TiTok with a continuous bottleneck, per frame or with a temporal decoder).

A ViT encoder with latent tokens, a ViT decoder that ends in soft indices of a 1,024-entry codebook, and the
convolutional decoder of MaskGIT-VQGAN. The state dict has the reference's names.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.compat.reference.options import VIT_SIZES
from ardiff.compat.reference.pixels import PixelDecoder
from ardiff.config import VAEConfig
from ardiff.errors import UserError

CODES, CODE_WIDTH = 1024, 256


class MultiHeadAttention(nn.Module):
    """Queries [B, Q, D] read keys and values [B, K, D]; a mask [Q, K] is True where reading is allowed."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Q, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            rearrange(F.linear(part, weight, bias), "b t (h d) -> b h t d", h=self.num_heads)
            for part, weight, bias in zip((q, k, v), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(out, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """Two layers with exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class SelfAttention(nn.Module):
    """Pre-norm self-attention with a residual, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, num_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mask [T, T] is True where reading is allowed."""
        h = self.ln_1(x)
        return x + self.attn(h, h, h, mask)


class Layer(SelfAttention):
    """A transformer layer of one frame."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention, then the perceptron, each added to x."""
        x = super().forward(x, mask)
        return x + self.mlp(self.ln_2(x))


class CrossAttention(nn.Module):
    """Tokens of a frame read the latent tokens of all frames up to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = MultiHeadAttention(width, num_heads)

    def forward(self, x: Tensor, latents: Tensor, num_frames: int) -> Tensor:
        """x [B*F, T, D], latents [B*F, L, D] -> [B*F, T, D]."""
        q = rearrange(self.ln_q(x), "(b f) t d -> b (f t) d", f=num_frames)
        k, v = (rearrange(norm(latents), "(b f) l d -> b (f l) d", f=num_frames) for norm in (self.ln_k, self.ln_v))
        mask = repeat(causal(num_frames, x.device), "f g -> (f t) (g l)", t=x.shape[1], l=latents.shape[1])
        out = self.attn(q, k, v, mask)
        return x + rearrange(out, "b (f t) d -> (b f) t d", f=num_frames)


def causal(num_frames: int, device: torch.device) -> Tensor:
    """[F, F], True where frame i may read frame j <= i."""
    return torch.ones(num_frames, num_frames, dtype=torch.bool, device=device).tril()


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
        self.temporal = options.temporal
        if self.temporal:
            self.fine_temporal_blocks = nn.ModuleList(SelfAttention(width, heads) for _ in range(layers))
            self.coarse_temporal_blocks = nn.ModuleList(CrossAttention(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, CODES, 1))

    def forward(self, latents: Tensor, num_frames: int) -> Tensor:
        """num_frames: F, which frames follow one another."""
        count, num_patches = len(latents), self.side**2
        tokens = self.decoder_embed(latents) + self.latent_token_positional_embedding
        masked = self.mask_token.expand(count, num_patches, -1)
        masked = torch.cat([self.class_embedding.expand(count, -1, -1), masked], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([masked, tokens], dim=1))
        for number, layer in enumerate(self.transformer):
            if self.temporal:
                x = self._mix_frames(x, number, num_frames)
            x = layer(x)
        x = self.ln_post(x[:, 1 : 1 + num_patches])
        return self.ffn(rearrange(x, "n (h w) d -> n d h w", h=self.side))

    def _mix_frames(self, x: Tensor, number: int, num_frames: int) -> Tensor:
        """Patches read their place in earlier frames, then patches and latents read earlier latents."""
        first, patches, latents = x.split([1, self.side**2, x.shape[1] - 1 - self.side**2], dim=1)
        patches = rearrange(patches, "(b f) n d -> (b n) f d", f=num_frames)
        patches = self.fine_temporal_blocks[number](patches, causal(num_frames, x.device))
        patches = rearrange(patches, "(b n) f d -> (b f) n d", n=self.side**2)
        both = self.coarse_temporal_blocks[number](torch.cat([patches, latents], dim=1), latents, num_frames)
        return torch.cat([first, both], dim=1)


class ReferenceARVAE(nn.Module):
    """encode(video [B, F, 3, H, W] in [0, 1]) -> [B, F, L, C]; decode([B, F, L, C]) -> video, about [0, 1].

    `temporal`: frames are decoded with all frames before them, so a video must be decoded as a whole.
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

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, F, L, C] of any length per token -> video [B, F, 3, H, W], not clamped."""
        latents = latents.to(self.latent_tokens.dtype)
        if self.config.reference.unit_norm:
            latents = F.normalize(latents, dim=-1)
        scores = self.decoder(latents.flatten(0, 1), latents.shape[1])
        frames = self.pixel_decoder(self.pixel_quantize_conv(scores.softmax(dim=1)))
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(latents))
