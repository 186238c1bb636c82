"""The reference's recorded runs: weights that anyone can rebuild, inputs and outputs (tests/data/golden/README.md)."""

from __future__ import annotations

import json
import zlib

import numpy as np
import torch
from data_helpers import GOLDEN
from torch import Tensor

DITS = ("dit_vtattn_sharenorm", "dit_tattn_separatenorm", "dit_vtattn_rope_qknorm")
ARVAES = ("arvae_frame_l2", "arvae_temporal_l2")
NETWORK = "diffusion_model.model."
SMALL_ARVAE = {  # constructor arguments; small where the fixture `small_networks` is
    "image_size": 32,
    "token_size": 4,
    "vit_enc_model_size": "small",
    "vit_dec_model_size": "small",
    "num_latent_tokens": 6,
}


def rebuilt(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of one parameter, a function of its name and shape."""
    value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    value *= 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.05
    is_scale = name.endswith("norm.weight") or (name.endswith("weight") and ("ln_" in name or "norm" in name))
    return torch.from_numpy((value + 1 if is_scale else value).astype(np.float32))


def case(name: str) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
    """State dict without the fixed tables, constructor arguments, arrays of a recorded run."""
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    weights = {
        key: rebuilt(key, tuple(entry["shape"]))
        for key, entry in described["parameters"].items()
        if not entry.get("kept")
    }
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    return weights, described["config"], arrays


def like(network: torch.nn.Module) -> dict[str, Tensor]:
    """A rebuilt state dict for every parameter of a network."""
    return {name: rebuilt(name, tuple(value.shape)) for name, value in network.named_parameters()}


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return float((found - expected).detach().abs().max())
