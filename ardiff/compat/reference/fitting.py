"""Weights of TiTok's own files and of published AR-VAEs for an auto-encoder of other sizes, or of our architecture.

TiTok (Yu et al. 2024) has a vector-quantised bottleneck of 12 numbers per token. The published AR-VAEs started from it
with 4, of which the leading dimensions were kept; the same is done here, for any number of channels.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from ardiff.compat.reference.options import VIT_SIZES
from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.models.fitting import Fit, Tensors, fit_equal, fit_own, leading, leading_moments, replaced, resized_table

LOGVAR = -6.0  # where a file has no log-variance: a standard deviation of 0.05, small beside means of the order of 1
CODEBOOK = "pixel_quantize.embedding.weight"  # [codes, their width], of TiTok's own files

_LAYER = re.compile(r"^(encoder|decoder)\.transformer\.(\d+)\.(.+)$")
_OWN_NAMES = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "qkv.",
    "attn.out_proj.": "proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.0.",
    "mlp.c_proj.": "mlp.2.",
}


def fit_published(found: Tensors, target: Tensors) -> tuple[dict[str, Fit], list[str]]:
    """Tensors for a published auto-encoder whose state dict is `target`, and remarks for the user."""
    fits, notes = _fit_bottleneck(found, target)
    for part in ("latent_tokens", *(f"{p}.latent_token_positional_embedding" for p in ("encoder", "decoder"))):
        if part in found and part not in fits:
            fits = replaced(fits, {part: leading(found[part], target[part], 0, "tokens")})
    for part in ("encoder", "decoder"):
        name = f"{part}.positional_embedding"  # [1 + P, D], the class token first
        if name in found and name not in fits and found[name].ndim == 2:
            old, new = len(found[name]) - 1, len(target[name]) - 1
            fits = replaced(fits, {name: resized_table(found[name], target[name], old, new, before=1)})
    if "latent_tokens" in found and len(found["latent_tokens"]) != len(target["latent_tokens"]):
        notes.append(
            "the published encoder mixes tokens and channels before encoder.conv_out: with another number of tokens "
            "its output has to be learned anew"
        )
    conv, codes = target["pixel_quantize_conv.weight"], found.get(CODEBOOK)
    if "pixel_quantize_conv.weight" in found or codes is None or codes.ndim != 2:
        return fits, notes
    if codes.T.shape == conv.shape[:2]:
        how = "the codebook, so that probabilities of codes give their expected entry"
        weight, bias = codes.T[..., None, None], torch.zeros_like(target["pixel_quantize_conv.bias"])
        fits["pixel_quantize_conv.weight"] = Fit(weight, weight.numel(), how, CODEBOOK)
        fits["pixel_quantize_conv.bias"] = Fit(bias, bias.numel(), how, CODEBOOK)
    return fits, notes


def _fit_bottleneck(found: Tensors, target: Tensors) -> tuple[dict[str, Fit], list[str]]:
    """All equal tensors, with the encoder's output and the decoder's input for the number of channels at hand.

    The input of the decoder tells how many channels n the file has: 2n outputs are mean and log-variance, n are
    vector-quantised. That an output has as many rows as needed tells nothing: 8 are 4 + 4, or 8 to be quantised.
    """
    fits = fit_equal(found, target)
    embed, out = found.get("decoder.decoder_embed.weight"), found.get("encoder.conv_out.weight")
    if embed is None or embed.ndim != 2:
        return fits, []
    columns = leading(embed, target["decoder.decoder_embed.weight"], 1, "channels")
    fits = replaced(fits, {"decoder.decoder_embed.weight": columns})
    names = ("encoder.conv_out.weight", "encoder.conv_out.bias")
    if out is None or any(name not in found for name in names):
        return fits, []
    num_channels = embed.shape[1]
    if len(out) == 2 * num_channels:
        return replaced(fits, {name: leading_moments(found[name], target[name]) for name in names}), []
    if len(out) != num_channels:
        note = (
            f"encoder.conv_out has {len(out)} outputs for a decoder of {num_channels} channels, neither mean alone nor "
            "mean and log-variance: left as initialised"
        )
        return replaced(fits, dict.fromkeys(names)), [note]
    note = (
        f"the bottleneck is vector-quantised, {num_channels} numbers without a log-variance: that starts at "
        f"{LOGVAR:g}, a standard deviation of {math.exp(LOGVAR / 2):.2f}"
    )
    special = {name: _mean_only(found[name], target[name]) for name in names}
    return replaced(fits, special), [note]


def _mean_only(value: Tensor, own: Tensor) -> Fit | None:
    """Leading rows of a mean [n, ...] for mean | log-variance [2C, ...]; the log-variance becomes a constant."""
    channels = len(own) // 2
    fit = leading(value, own[:channels], 0, "channels")
    if fit is None:
        return None
    constant = torch.full_like(own[channels:], LOGVAR if own.ndim == 1 else 0.0)
    how = "; ".join(filter(None, [fit.how, "log-variance constant"]))
    return Fit(torch.cat([fit.value, constant]), fit.filled, how)


def fit_published_to_own(found: Tensors, target: Tensors, config: VAEConfig) -> tuple[dict[str, Fit], list[str]]:
    """Tensors for our architecture: transformer layers, final norms, embedding of patches and of latents.

    Only these have an exact counterpart: the published networks have a norm and a class token before their layers,
    mix tokens with channels at the encoder's end and paint with a convolutional decoder.

    Raises UserError where widths, heads or patches differ.
    """
    patches, width, size = found.get("encoder.patch_embed.weight"), config.hidden_size, config.patch_size
    heads = {wide: count for _, wide, count in VIT_SIZES.values()}
    if patches is None or patches.ndim != 4:
        raise UserError("neither weights of a TiTok network nor of an AR-VAE")
    if tuple(patches.shape) != (width, 3, size, size) or heads.get(width) != config.num_heads:
        wide, side = patches.shape[0], patches.shape[-1]
        raise UserError(
            f"weights of a published network (width {wide}, {heads.get(wide, '?')} heads, patches of {side}) do not "
            f"fit vae.architecture = ardiff of width {width}, {config.num_heads} heads and patches of {size}: "
            "set vae.architecture=reference (preset reference_arvae)"
        )
    renamed = {"encoder_norm.": "encoder.ln_post.", "decoder_norm.": "decoder.ln_post."}
    mapped: dict[str, tuple[Tensor, str]] = {}
    for name in found:
        if match := _LAYER.match(name):
            part, number, rest = match.groups()
            for theirs, ours in _OWN_NAMES.items():
                if rest.startswith(theirs):
                    own_name = f"{part}.{number}.{ours}{rest.removeprefix(theirs)}"
                    mapped[own_name] = found[name], name
        for ours, theirs in renamed.items():
            if name.startswith(theirs):
                mapped[ours + name.removeprefix(theirs)] = found[name], name
    fits = fit_own({name: value for name, (value, _) in mapped.items()}, target)
    for name, fit in fits.items():
        fit.source = mapped[name][1]
    fits |= _embeddings_for_own(found, target)
    note = (
        "our architecture takes the layers, final norms and embeddings of a published network; to go on from all of "
        "it, set vae.architecture=reference (preset reference_arvae)"
    )
    return fits, [note]


def _embeddings_for_own(found: Tensors, target: Tensors) -> dict[str, Fit]:
    """Embedding of patches, which ours scales to [-1, 1], and of latents, which ours multiplies by sqrt(C)."""
    fits: dict[str, Fit | None] = {}
    weight = found["encoder.patch_embed.weight"].float().flatten(1)  # [D, 3 p p], as our patches are flattened
    how = "for pixels in [-1, 1]"
    fits["patch_embed.weight"] = Fit(weight / 2, weight.numel(), how, "encoder.patch_embed.weight")
    bias = found.get("encoder.patch_embed.bias")
    if bias is not None and bias.shape == target["patch_embed.bias"].shape:
        moved = bias.float() + weight.sum(dim=1) / 2
        fits["patch_embed.bias"] = Fit(moved, moved.numel(), how, "encoder.patch_embed.bias")
    own = target["from_latents.weight"]  # [D, C]
    embed = found.get("decoder.decoder_embed.weight")
    bias = found.get("decoder.decoder_embed.bias")
    if embed is None or bias is None or embed.ndim != 2 or bias.shape != own.shape[:1]:
        return {name: fit for name, fit in fits.items() if fit is not None}
    scale = own.shape[1] ** -0.5
    kept = min(embed.shape[1], own.shape[1])
    columns = leading(embed[:, :kept].float() * scale, own, 1, "channels")
    if columns is not None:
        how = f"leading {kept} of {embed.shape[1]} channels, scaled"
        columns.how, columns.source = how, "decoder.decoder_embed.weight"
        fits["from_latents.weight"] = columns
        fits["from_latents.bias"] = Fit(bias.float() * scale, bias.numel(), "scaled", "decoder.decoder_embed.bias")
    return {name: fit for name, fit in fits.items() if fit is not None}
