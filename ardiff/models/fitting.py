"""Weights of one network for another of slightly different sizes: what is the same is taken, the rest is adapted.

Nothing here changes a network: every function returns the tensors that it would have. A number that has no counterpart
keeps its initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


@dataclass
class Fit:
    """What a tensor of the network becomes."""

    value: Tensor  # of the shape that it has in the network
    filled: int  # numbers of it that come from the source; the others are as initialised
    how: str = ""  # how they were adapted; empty: taken as they are
    source: str = ""  # its name in the source; empty: the same as here


def fit_equal(found: Tensors, target: Tensors) -> dict[str, Fit]:
    """All tensors of the same name and shape, as they are."""
    return {
        name: Fit(found[name], own.numel())
        for name, own in target.items()
        if name in found and found[name].shape == own.shape
    }


def leading(value: Tensor, own: Tensor, dim: int, what: str) -> Fit | None:
    """The first entries of `value` along `dim` in the place of those of `own`; None if other sizes differ as well."""
    others = [shape[:dim] + shape[dim + 1 :] for shape in (value.shape, own.shape)]
    if value.ndim != own.ndim or others[0] != others[1]:
        return None
    kept = min(value.shape[dim], own.shape[dim])
    new = own.clone()
    part = new.narrow(dim, 0, kept)
    part.copy_(value.narrow(dim, 0, kept))
    return Fit(new, part.numel(), _described(value.shape[dim], own.shape[dim], what))


def leading_moments(value: Tensor, own: Tensor) -> Fit | None:
    """The same for mean | log-variance, [2n, ...] -> [2C, ...]: the first of the n channels of both."""
    if value.shape[1:] != own.shape[1:] or len(value) % 2:
        return None
    old, channels = len(value) // 2, len(own) // 2
    kept = min(old, channels)
    new = own.clone()
    new[:kept].copy_(value[:kept])
    new[channels : channels + kept].copy_(value[old : old + kept])
    return Fit(new, 2 * new[:kept].numel(), _described(old, channels, "channels"))


def resized(rows: Tensor, count: int) -> Tensor | None:
    """rows [P, D] of a square grid, row by row -> [count, D] of another one, bicubically; None if one is no square."""
    if len(rows) == count:
        return rows
    old, new = math.isqrt(len(rows)), math.isqrt(count)
    if old * old != len(rows) or new * new != count:
        return None
    picture = rearrange(rows.float(), "(h w) d -> 1 d h w", h=old)
    picture = F.interpolate(picture, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    return rearrange(picture, "1 d h w -> (h w) d")


def resized_table(table: Tensor, own: Tensor, old: int, new: int, before: int = 0, after: bool = True) -> Fit | None:
    """Positions of a grid of `old` patches for one of `new`; `before` rows in front of them are kept.

    after: the rows behind the patches are kept too, else they are as initialised.
    """
    grid = resized(table[before : before + old], new)
    if grid is None or table.shape[1:] != own.shape[1:] or (after and len(table) - old != len(own) - new):
        return None
    fit = own.clone()
    fit[:before].copy_(table[:before])
    fit[before : before + new].copy_(grid)
    filled = before + new
    if after:
        fit[before + new :].copy_(table[before + old :])
        filled = len(fit)
    how = [] if old == new else [f"grid of {old} patches interpolated to {new}"]
    how += [] if after else ["rows of the tokens as initialised: another number of tokens"]
    return Fit(fit, filled * fit[0].numel(), "; ".join(how))


def fit_own(found: Tensors, target: Tensors) -> dict[str, Fit]:
    """Tensors of our AR-VAE (architecture = ardiff) of another run for the one whose state dict is `target`.

    Another number of channels: the leading ones. Another grid of patches: positions and pools are interpolated.
    Another number of tokens: pools and positions of tokens are as initialised, since tokens have other places then.
    """
    fits = fit_equal(found, target)
    fits |= _own_channels(found, target)
    pool, wanted = found.get("decoder_pool"), target["decoder_pool"]  # [P, L]
    if pool is None or pool.ndim != 2 or pool.shape == wanted.shape:
        return fits
    (old, old_tokens), (new, tokens) = pool.shape, wanted.shape
    special: dict[str, Fit | None] = dict.fromkeys(("encoder_positions", "decoder_positions"))
    for name in special:
        if name in found and len(found[name]) == old + old_tokens:
            special[name] = resized_table(found[name], target[name], old, new, after=old_tokens == tokens)
    if old_tokens == tokens and (grid := resized(pool, new)) is not None:
        how = f"grid of {old} patches interpolated to {new}"
        special["decoder_pool"] = Fit(grid, grid.numel(), how)
        encoder_pool = found.get("encoder_pool")  # [L, P]: rows are averages, whose sum stays the same
        if encoder_pool is not None and encoder_pool.shape == (tokens, old):
            grid = resized(encoder_pool.T, new)
            assert grid is not None  # decoder_pool has the same grid
            special["encoder_pool"] = Fit((grid * (old / new)).T.contiguous(), grid.numel(), how)
    return replaced(fits, special)


def _own_channels(found: Tensors, target: Tensors) -> dict[str, Fit]:
    """Input and output of the bottleneck. Decoding scales unit tokens by sqrt(C), which the weights make up for."""
    fits: dict[str, Fit | None] = {}
    for name in ("to_latents.weight", "to_latents.bias"):
        if name in found and found[name].shape != target[name].shape:
            fits[name] = leading_moments(found[name], target[name])
    weight, bias = (found.get(f"from_latents.{part}") for part in ("weight", "bias"))
    own = target["from_latents.weight"]  # [D, C]
    if weight is not None and weight.ndim == 2 and weight.shape != own.shape and len(weight) == len(own):
        factor = (weight.shape[1] / own.shape[1]) ** 0.5
        kept = min(weight.shape[1], own.shape[1])
        fits["from_latents.weight"] = leading(weight[:, :kept].float() * factor, own, 1, "channels")
        if bias is not None and bias.shape == own.shape[:1]:
            fits["from_latents.bias"] = Fit(bias.float() * factor, bias.numel())
        for fit in filter(None, fits.values()):
            fit.how = _described(weight.shape[1], own.shape[1], "channels")
    return {name: fit for name, fit in fits.items() if fit is not None}


def replaced(fits: dict[str, Fit], special: Mapping[str, Fit | None]) -> dict[str, Fit]:
    """`fits` with those of `special`, and without its names where that is None."""
    kept = {name: fit for name, fit in fits.items() if name not in special}
    return kept | {name: fit for name, fit in special.items() if fit is not None}


def usable(value: Tensor) -> bool:
    """Whether a tensor of a file is an ordinary one of real numbers, as large as its storage says."""
    if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _described(old: int, new: int, what: str) -> str:
    if old == new:
        return ""
    return f"leading {new} of {old} {what}" if new < old else f"{old} {what} of {new}, the others as initialised"
