"""The temporal-causal part of a frame auto-encoder's decoder (AR-VAE of AR-Diffusion, Sun et al. 2025).

Before every layer of the per-frame decoder, *fine* attention lets a patch read its own place in earlier frames, and
*coarse* attention lets patches and latents read the latents of earlier frames. Both are causal and banded: a frame
reads at most `window` frames in a layer, itself included. So the keys and values of window - 1 frames per layer are all
that a video of any length needs to be decoded piece by piece (`TemporalCache`).

All parameters have "temporal" in their name. Their output projections start at zero: a network with these blocks begins
as the same network without them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.errors import UserError
from ardiff.models.embeddings import apply_rotary, rotary_tables

ROTARY_BASE = 100.0  # periods of 6 to some hundreds of frames: windows have tens of them
PIECE = 16  # frames that are decoded at a time, at least, where a long video is cut into pieces
QUERIES_AT_ONCE = 64  # few: masked reading is work thrown away, and a single frame needs no mask


def is_temporal(name: str) -> bool:
    """Whether a parameter belongs to what reads other frames, which may be trained by itself."""
    return "temporal" in name


class TemporalCache:
    """What a temporal decoder remembers of the frames so far: per layer the keys and values of the last few.

    Begins empty; `decode(latents, cache)` continues the videos that it has seen and adds to it. Its size does not grow
    beyond window - 1 frames. It belongs to one network and one batch of videos. No gradients flow into the past.
    """

    def __init__(self) -> None:
        self.num_frames = 0  # seen so far: the absolute index of the next frame
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._num_videos = 0
        self._interrupted = False

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.untyped_storage().nbytes() for pair in self._kept.values() for part in pair)

    def begin(self, num_videos: int) -> None:
        """Before the next frames of `num_videos` videos. Raises UserError where they cannot be continued."""
        if self._interrupted:
            raise UserError("the TemporalCache is of a decode that failed midway; start the video again with a new one")
        if self.num_frames and num_videos != self._num_videos:
            raise UserError(f"the TemporalCache is of {self._num_videos} videos and cannot continue {num_videos}")
        self._num_videos, self._interrupted = num_videos, True

    def end(self, num_frames: int) -> None:
        """So many frames have passed all layers."""
        self.num_frames += num_frames
        self._interrupted = False

    def extend(self, layer: str, k: Tensor, v: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Put the remembered frames in front of k and v [N, H, F, T, D], and remember the last `keep` of them all."""
        if self.num_frames:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._kept[layer], (k, v), strict=True))
        first = max(0, k.shape[2] - keep)
        self._kept[layer] = (k[:, :, first:].detach().clone(), v[:, :, first:].detach().clone())
        return k, v


@dataclass(frozen=True)
class Clip:
    """Successive frames that pass the decoder together."""

    num_frames: int  # F
    window: int
    cache: TemporalCache | None  # of the frames before
    rotary: tuple[Tensor, Tensor] | None  # cos and sin [F, 1, D/2] of the absolute frame index


class MultiHeadAttention(nn.Module):
    """Attention with its projections; names and layout of the parameters are those of torch's."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads side by side, each [..., D] -> [..., D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return (
            F.linear(q, weights[0], biases[0]),
            F.linear(k, weights[1], biases[1]),
            F.linear(v, weights[2], biases[2]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Every token of x [B, T, D] reads all of them."""
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", h=self.num_heads) for part in self.project(x, x, x))
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class TemporalBlock(nn.Module):
    """What fine and coarse attention share: heads that read a band of time, and a projection that starts at zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(width, num_heads)
        nn.init.zeros_(self.attn.out_proj.weight)
        nn.init.zeros_(self.attn.out_proj.bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: str, clip: Clip, layer: str) -> Tensor:
        """q [B*F, T, D], k and v [B*F, S, D] -> [B*F, T, D]; `pattern`: how b, t, h, f, d make up [N, H, F, T, D]."""
        tokens, sizes = q.shape[1], {"f": clip.num_frames, "h": self.attn.num_heads}
        q, k, v = (rearrange(part, f"(b f) t (h d) -> {pattern}", **sizes) for part in self.attn.project(q, k, v))
        if clip.rotary is not None:
            q, k = apply_rotary(q, *clip.rotary), apply_rotary(k, *clip.rotary)
        if clip.cache is not None:
            k, v = clip.cache.extend(layer, k, v, clip.window - 1)
        out = banded_attention(q, k, v, clip.window)
        return self.attn.out_proj(rearrange(out, f"{pattern} -> (b f) t (h d)", t=tokens))


class FineBlock(TemporalBlock):
    """Every patch reads its own place in the frames up to its own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.ln_1 = nn.LayerNorm(width)

    def forward(self, patches: Tensor, clip: Clip, layer: str) -> Tensor:
        """patches [B*F, P, D] -> [B*F, P, D]."""
        h = self.ln_1(patches)
        return patches + self.attend(h, h, h, "(b t) h f 1 d", clip, layer)


class CoarseBlock(TemporalBlock):
    """All tokens of a frame read the latents of the frames up to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, tokens: Tensor, latents: Tensor, clip: Clip, layer: str) -> Tensor:
        """tokens [B*F, T, D], latents [B*F, L, D] -> [B*F, T, D]."""
        q, k, v = self.ln_q(tokens), self.ln_k(latents), self.ln_v(latents)
        return tokens + self.attend(q, k, v, "b h f t d", clip, layer)


def temporal_blocks(depth: int, width: int, num_heads: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Fine and coarse blocks for a decoder of `depth` layers.

    To be made after all other parts of a network, whose initial weights then do not depend on them.
    """
    fine = nn.ModuleList(FineBlock(width, num_heads) for _ in range(depth))
    return fine, nn.ModuleList(CoarseBlock(width, num_heads) for _ in range(depth))


def mix_frames(fine: nn.Module, coarse: nn.Module, patches: Tensor, latents: Tensor, clip: Clip, layer: int) -> Tensor:
    """Before layer number `layer`: patches [B*F, P, D] and latents [B*F, L, D] -> both [B*F, P + L, D]."""
    patches = fine(patches, clip, f"fine {layer}")
    return coarse(torch.cat([patches, latents], dim=1), latents, clip, f"coarse {layer}")


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [N, H, F, T, D] -> [N, H, F, T, D]: tokens of frame i read those of the frames i - window + 1 .. i.

    k and v [N, H, G, S, D] end with the F frames of q; the others came before. A few frames are computed at a time, so
    that masks are never [F*T, F*S].
    """
    frames, tokens = q.shape[2:4]
    past, step = k.shape[2] - frames, max(1, min(window, QUERIES_AT_ONCE // tokens))
    parts = []
    for begin in range(0, frames, step):
        end = min(begin + step, frames)
        first, last = max(0, past + begin - window + 1), past + end
        mask = None
        if end - begin > 1:  # otherwise all of the keys are to be read
            reading = torch.arange(past + begin, last, device=q.device)[:, None]
            read = torch.arange(first, last, device=q.device)
            allowed = (read <= reading) & (read > reading - window)
            mask = repeat(allowed, "i j -> (i t) (j s)", t=tokens, s=k.shape[3])
        out = F.scaled_dot_product_attention(
            q[:, :, begin:end].flatten(2, 3),
            k[:, :, first:last].flatten(2, 3),
            v[:, :, first:last].flatten(2, 3),
            attn_mask=mask,
        )
        parts.append(out.unflatten(2, (-1, tokens)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def decode_clips(
    decode: Callable[[Tensor, Clip], Tensor],
    latents: Tensor,
    cache: TemporalCache | None,
    window: int,
    rotary_dim: int = 0,
) -> Tensor:
    """latents [B, F, L, C] -> video [B, F, 3, H, W] by `decode`, which takes any number of successive frames.

    Without gradients a long video is decoded in pieces, so that memory (but for the video) does not grow with F.
    rotary_dim: channels per head of rotary positions; 0: frames have no positions in time.
    """
    length = max(window, PIECE)
    pieces = [latents]
    if not torch.is_grad_enabled() and latents.shape[1] > 2 * length:
        pieces = list(latents.split(length, dim=1))
        cache = TemporalCache() if cache is None else cache
    frames = []
    for piece in pieces:
        first, count = 0 if cache is None else cache.num_frames, piece.shape[1]
        rotary = None
        if rotary_dim:
            cos, sin = rotary_tables(first, count, 1, rotary_dim, ROTARY_BASE, piece.device)
            rotary = cos[:, None], sin[:, None]
        if cache is not None:
            cache.begin(len(piece))
        frames.append(decode(piece, Clip(count, window, cache, rotary)))
        if cache is not None:
            cache.end(count)
    return frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)
