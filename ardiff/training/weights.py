"""Networks from disk: a run_dir, one checkpoint of it, or an export (model.safetensors, ema.safetensors, config.yaml)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ardiff.config import Config, load
from ardiff.errors import UserError
from ardiff.models import ARVAE, DiT
from ardiff.training.checkpoint import full_weights, newest_valid, problem_with

PREFIX = "network."  # objectives hold their network under this name


def read_weights(source: Path, use_ema: bool = True) -> tuple[dict[str, Tensor], Config, Path]:
    """Weights by name, their configuration, and the directory they came from.

    Raises UserError when `source` is none of the three kinds, or damaged.
    """
    exported = source / ("ema.safetensors" if use_ema else "model.safetensors")
    if exported.is_file():
        try:
            return load_file(exported), load(str(source / "config.yaml")), source
        except SafetensorError as error:
            raise UserError(f"{exported}: not a safetensors file ({error})") from error
    checkpoint = source
    if (source / "checkpoints").is_dir():
        newest = newest_valid(source)
        if newest is None:
            raise UserError(f"{source}: the run has no checkpoint yet")
        checkpoint = newest
    elif not (source / "MANIFEST.json").is_file():
        raise UserError(f"{source}: neither a run_dir, nor a checkpoint of one, nor an export (made by launch/export.py)")
    elif (problem := problem_with(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: damaged ({problem})")
    weights = full_weights(checkpoint, "ema" if use_ema else "master")
    networks = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return networks, load(str(checkpoint / "config.yaml")), checkpoint


def load_dit(source: Path, use_ema: bool = True) -> tuple[DiT, Config]:
    """The diffusion transformer of a run, checkpoint or export, in evaluation mode on the CPU, fp32."""
    weights, config, origin = read_weights(source, use_ema)
    return _fill(DiT(config.model), weights, origin, "diffusion transformer"), config


def load_arvae(source: Path) -> tuple[ARVAE, str]:
    """The auto-encoder of a run, checkpoint or export, and its id (a hash of configuration and weights)."""
    weights, config, origin = read_weights(source)
    network = _fill(ARVAE(config.vae), weights, origin, "AR-VAE")
    digest = hashlib.sha256(repr(config.vae).encode())
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return network, digest.hexdigest()[:16]


def _fill(network: nn.Module, weights: dict[str, Tensor], origin: Path, what: str):  # noqa: ANN202 - the type given
    expected = {name: value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != expected:
        odd = sorted(set(expected) ^ set(weights))[:3]
        raise UserError(f"{origin}: does not hold the weights of a {what}" + (f" (first differences: {odd})" if odd else ""))
    network.load_state_dict(weights)
    return network.eval()
