"""Names of published checkpoints: prefixes taken off, understood extras set apart, everything else accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ardiff.errors import UserError

NETWORK = "diffusion_model.model."
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)
EMBEDDINGS = ("context_emb", "class_emb")
CODEBOOKS = ("quantize.", "pixel_quantize.")  # of TiTok's own file, which the auto-encoder does not use
KNOWN_BETAS = ((1e-4, 0.02), (8.5e-4, 0.012))  # of the published configurations

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
_ROTARY = re.compile(r"^(?:blocks\.\d+\.attn\.)?rotary_emb\.freqs$")  # one tensor, which may appear once per block


@dataclass
class DiTCheckpoint:
    """The parts of a published checkpoint, each under its plain names."""

    network: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # context_emb or class_emb
    buffers: dict[str, Tensor] = field(default_factory=dict)  # of the diffusion process
    vae: dict[str, Tensor] = field(default_factory=dict)  # without `vae.`


def split_dit(state_dict: Mapping[str, Tensor]) -> DiTCheckpoint:
    """Sort a checkpoint of the DiT, whatever its prefixes are. Raises UserError when one name is there twice."""
    parts = DiTCheckpoint()
    outer = _prefix(state_dict, "x_embedder.weight")
    for key, value in state_dict.items():
        name = key.removeprefix(outer) if outer and key.startswith(outer) else _WRAPPERS.sub("", key)
        process = name.removeprefix("diffusion_model.")
        if name in EMBEDDINGS:
            _put(parts.embeddings, name, value, key)
        elif process in BUFFERS:
            _put(parts.buffers, process, value, key)
        elif name.startswith("vae."):
            _put(parts.vae, name.removeprefix("vae."), value, key)
        else:
            name = name.removeprefix(NETWORK)
            _put(parts.network, "rotary_emb.freqs" if _ROTARY.match(name) else name, value, key)
    return parts


def split_arvae(state_dict: Mapping[str, Tensor], codebooks: bool = False) -> dict[str, Tensor]:
    """The auto-encoder's part of a checkpoint, of its own or of a DiT that was saved with its `vae.`.

    codebooks: with those of TiTok's own file.
    """
    outer = _prefix(state_dict, "encoder.conv_out.weight")
    parts: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _WRAPPERS.sub("", key)
        own = bool(outer) and key.startswith(outer)
        name = key.removeprefix(outer) if own else name
        if not own and outer.endswith("vae.") and (name in EMBEDDINGS or name.startswith("diffusion_model.")):
            continue  # the DiT that this auto-encoder was stored with
        if codebooks or not name.startswith(CODEBOOKS):
            _put(parts, name, value, key)
    return parts


def fill(network: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give `network`, which may be on the meta device, fp32 copies of `found`.

    Raises UserError that lists every missing, unexpected and wrongly shaped name.
    """
    expected = network.state_dict()
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise UserError(
            f"the checkpoint does not fit its configuration; names {'; '.join(problems)}: check the constructor "
            "arguments, and that the file is whole"
        )
    copies = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in found.items()}
    network.load_state_dict(copies, assign=True)


def detect_schedule(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of `Schedule` (num_timesteps, beta_start, beta_end) from the buffer `betas`; None without one.

    Raises UserError when the betas are not linspace(sqrt(beta_start), sqrt(beta_end), T)^2.
    """
    betas = split_dit(state_dict).buffers.get("betas")
    if betas is None:
        return None
    values = betas.detach().double().cpu()
    if values.ndim != 1 or len(values) < 2 or not 0 < float(values[0]) <= float(values[-1]) < 1:
        raise UserError(f"betas {tuple(values.shape)} are not the increasing variances of a diffusion process")
    for start, end in (*KNOWN_BETAS, (_rounded(values[0]), _rounded(values[-1]))):
        candidate = torch.linspace(start**0.5, end**0.5, len(values), dtype=torch.float64) ** 2
        if torch.allclose(values, candidate, rtol=1e-5, atol=0):
            return {"num_timesteps": len(values), "beta_start": start, "beta_end": end}
    raise UserError(
        f"betas from {float(values[0]):g} to {float(values[-1]):g} are not scaled-linear, "
        "linspace(sqrt(start), sqrt(end), T)^2: no other schedule is supported"
    )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a .bin, .pt or .pth file without running what is pickled there."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the checkpoint in it, such as {path / 'model.safetensors'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the checkpoint's model.safetensors")
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file; copy or download the checkpoint again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: a damaged checkpoint ({reason}); copy or download it again") from error
    except Exception as error:  # UnpicklingError and what a broken pickle makes of torch
        raise UserError(
            f"{path}: holds more than tensors, or is no checkpoint ({type(error).__name__}); save its state dict alone"
        ) from error
    for name in ("state_dict", "model", "module", "ema"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return found


def _rounded(value: Tensor) -> float:
    return float(f"{float(value):.6g}")  # what was typed, from a float32


def _prefix(names: Iterable[str], anchor: str) -> str:
    """What stands before the one name that every such network has."""
    found = {name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")}
    if len(found) > 1:
        raise UserError(f"the checkpoint holds several networks, under {', '.join(sorted(map(repr, found)))}; keep one")
    return found.pop() if found else ""


def _put(part: dict[str, Tensor], name: str, value: Tensor, key: str) -> None:
    if name in part and not torch.equal(part[name], value):
        raise UserError(f"the checkpoint holds '{name}' twice, with different values (once as '{key}')")
    part[name] = value
