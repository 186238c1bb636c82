"""What the disturbed runs train on: small latent shards, held-out ones and an AR-VAE that decodes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ardiff.config import load, to_yaml
from ardiff.models import ARVAE
from ardiff.training.weights import load_arvae
from tests.data_helpers import write_latents

LENGTHS = ((9, 30, 4), (17, 2, 40), (25, 8))
ARVAE_SIZES = [
    *("vae.image_size=16", "vae.patch_size=8", "vae.num_tokens=2", "vae.channels=4", "vae.hidden_size=16"),
    *("vae.encoder_depth=1", "vae.decoder_depth=1", "vae.num_heads=2"),
]


def write_data(folder: Path) -> Path:
    """The training shards, `validation` beside them in a folder of their own; returns the training shards."""
    config = load("arvae_tiny", ARVAE_SIZES)
    arvae = folder / "arvae"
    arvae.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(ARVAE(config.vae).state_dict(), arvae / "ema.safetensors")
    (arvae / "config.yaml").write_text(to_yaml(config))
    for name, lengths in (("latents", LENGTHS), ("validation", ((12, 5), (9,)))):
        write_latents(folder / name, lengths=lengths)
        manifest = folder / name / "manifest.json"
        described = json.loads(manifest.read_text())
        described["arvae"] = {"id": load_arvae(arvae)[1], "path": str(arvae)}
        manifest.write_text(json.dumps(described))
    return folder / "latents"


def validation_shards(shards: Path) -> Path:
    """The held-out shards beside the training shards."""
    return shards.parent / "validation"
