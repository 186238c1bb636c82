"""Networks from disk: a run_dir, one checkpoint of it, or an export.

An export (launch/export.py) is a folder with model.safetensors, ema.safetensors, config.yaml and, for a diffusion
transformer, latent_space.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardiff.config import Config, VAEConfig, load, to_yaml
from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.files import replacing, write_json, write_text
from ardiff.models import build_arvae, build_dit
from ardiff.models.temporal import is_temporal
from ardiff.training.checkpoint import full_weights, newest_valid, problem_with, read_state

if TYPE_CHECKING:
    from ardiff.compat.reference import ReferenceARVAE, ReferenceModel
    from ardiff.models import ARVAE, DiT

PREFIX = "network."  # objectives hold their network under this name
FILES = {"ema": "ema.safetensors", "master": "model.safetensors"}
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Stored:
    """What a run, checkpoint or export holds: the weights and buffers of a network by name, and how to use them."""

    weights: dict[str, Tensor]
    config: Config
    origin: Path
    latent_space: dict[str, Any] | None


def read_weights(source: Path, vector: str = "ema") -> Stored:
    """Read `ema` or `master` (unaveraged) weights. Raises UserError when `source` is none of the three, or damaged."""
    exported = source / FILES[vector]
    if exported.is_file():
        space = source / "latent_space.json"
        try:
            weights = load_file(exported)
            found = json.loads(space.read_text(encoding="utf-8")) if space.is_file() else None
        except (SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{source}: a damaged export ({error})") from error
        return Stored(weights, load(str(source / "config.yaml")), source, found)
    checkpoint = find_checkpoint(source)
    weights = full_weights(checkpoint, vector)
    weights |= _buffers(checkpoint)
    network = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return Stored(network, load(str(checkpoint / "config.yaml")), checkpoint, read_state(checkpoint).latent_space)


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that a run_dir (its newest valid one) or a checkpoint directory stands for."""
    if (source / "checkpoints").is_dir():
        newest = newest_valid(source)
        if newest is None:
            raise UserError(f"{source}: the run has no checkpoint yet")
        return newest
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not (source / "MANIFEST.json").is_file():
        raise UserError(f"{source}: neither a run_dir with checkpoints, nor a checkpoint, nor an export")
    problem = problem_with(source)
    if problem is not None:
        raise UserError(f"{source}: a damaged checkpoint ({problem})")
    return source


def load_dit(source: Path, vector: str = "ema") -> tuple[DiT | ReferenceModel, Config, LatentSpace]:
    """The diffusion transformer of a run, checkpoint or export: fp32, on the CPU, in evaluation mode."""
    stored = read_weights(source, vector)
    if stored.latent_space is None:
        raise UserError(f"{stored.origin}: does not hold a diffusion transformer (is it the run of an AR-VAE?)")
    try:
        space = LatentSpace(**stored.latent_space)
    except TypeError as error:
        raise UserError(f"{stored.origin}: its latent space is not one that this version knows ({error})") from error
    network = build_dit(stored.config.model, stored.config.diffusion.prediction)
    return _fill(network, stored), stored.config, space


def load_arvae(source: Path) -> tuple[ARVAE | ReferenceARVAE, str]:
    """The auto-encoder of a run, checkpoint or export, and its id (a hash of configuration and weights)."""
    stored = read_weights(source)
    if stored.latent_space is not None:
        raise UserError(f"{stored.origin}: holds a diffusion transformer, but an AR-VAE is needed")
    network = _fill(build_arvae(stored.config.vae), stored)
    return network, arvae_id(stored.config.vae, stored.weights)


def arvae_id(vae: VAEConfig, weights: dict[str, Tensor]) -> str:
    """The id of an auto-encoder: a hash of configuration and weights.

    Without those by which a decoder reads other frames: they may be trained by themselves, and decode the same latents.
    """
    digest = hashlib.sha256(_description(vae).encode())
    for name in sorted(name for name in weights if not is_temporal(name)):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _description(vae: VAEConfig) -> str:
    """What goes into the id: always these fields, so that a new setting does not give old auto-encoders a new id."""
    names = "image_size patch_size num_tokens channels hidden_size encoder_depth decoder_depth num_heads kl_weight"
    described = ", ".join(f"{name}={getattr(vae, name)!r}" for name in [*names.split(), "l1_weight"])
    extra = f", reference={vae.reference!r}" if vae.architecture == "reference" else ""
    return f"VAEConfig({described}{extra})"


def export(source: Path, out: Path) -> Path:
    """Write the networks of a run or checkpoint for use elsewhere; returns the checkpoint that was exported."""
    checkpoint = find_checkpoint(source)
    write_export(out, lambda vector: read_weights(checkpoint, vector))
    return checkpoint


def write_export(out: Path, stored_of: Callable[[str], Stored]) -> None:
    """Write an export; `stored_of` gives what belongs into its file of `ema` and of `master` weights.

    Raises UserError for a folder that is something else.
    """
    if (out / "checkpoints").exists() or (out / "MANIFEST.json").exists():
        raise UserError(f"--out {out}: is a run or a checkpoint, an export there would hide it; choose another folder")
    (out / "latent_space.json").unlink(missing_ok=True)
    for vector, name in FILES.items():
        stored = stored_of(vector)
        with replacing(out / name) as temporary:
            save_file(stored.weights, temporary)
    if stored.latent_space is not None:
        write_json(out / "latent_space.json", stored.latent_space)
    write_text(out / "config.yaml", to_yaml(stored.config))


def _buffers(checkpoint: Path) -> dict[str, Tensor]:
    """What a network holds besides its parameters; rank 0 has written it."""
    with safe_open(checkpoint / "state_rank0.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {key.removeprefix("buffer."): file.get_tensor(key) for key in names if key.startswith("buffer.")}


def _fill(network: Network, stored: Stored) -> Network:
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in stored.weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise UserError(f"{stored.origin}: weights do not fit their configuration ({len(odd)} differ, first: {odd[0]})")
    network.load_state_dict(stored.weights)
    return network.eval()
