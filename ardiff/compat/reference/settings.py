"""What a published network needs besides its weights: the reference's own YAML files, our JSON, or the shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ardiff.compat.reference.options import VIT_SIZES, model_config
from ardiff.compat.reference.state_dict import split_arvae
from ardiff.config import Config
from ardiff.errors import UserError

TIMESTEPS = {  # the reference's noise_level -> ours
    "full_sequence": "synchronous",
    "diff_forcing": "independent",
    "autoregressive_diffusion": "uniform_monotone",
    "ar_diff_midsamplet": "fopp",
}


def with_reference_settings(config: Config, path: Path) -> Config:
    """`config` with the network, and as far as they are told the schedule and timesteps, of a file of settings.

    path: a YAML file of the reference (`model.params.model_cfg.params` and so on), or YAML or JSON of the network's
    constructor arguments, alone or under `config`. Raises UserError for anything else.
    """
    found = _read(path)
    params = _at(found, "model", "params")
    network = _at(params, "model_cfg", "params") or _arguments(found)
    try:
        model = model_config(network, int(params.get("num_class") or 0))
        config = dataclasses.replace(config, model=model)
        process = _at(params, "diffusion_cfg", "params")
        if process:
            diffusion = dataclasses.replace(
                config.diffusion,
                num_timesteps=int(process.get("timesteps", 1000)),
                beta_start=float(process.get("linear_start", 1e-4)),
                beta_end=float(process.get("linear_end", 2e-2)),
                prediction=str(process.get("parameterization", "eps")),
                timesteps=TIMESTEPS[params.get("noise_level", "ar_diff_midsamplet")],
            )
            config = dataclasses.replace(config, diffusion=diffusion)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not settings of a published model ({error!r})") from error
    return config


def arvae_arguments(state_dict: Mapping[str, Tensor], path: Path | None) -> dict[str, Any]:
    """Constructor arguments of an auto-encoder, from a file (as above) or, without one, from the shapes of its weights.

    Shapes tell everything but `use_l2_norm`, which all published ones have. Raises UserError where they do not fit.
    """
    if path is not None:
        found = _read(path)
        return dict(_at(found, "model", "params") or _arguments(found))
    weights = split_arvae(state_dict)
    try:
        patches, decoded = weights["encoder.patch_embed.weight"], weights["decoder.decoder_embed.weight"]
        sides = [round((len(weights[f"{part}.positional_embedding"]) - 1) ** 0.5) for part in ("encoder", "decoder")]
        sizes = {width: name for name, (_, width, _) in VIT_SIZES.items()}
        image_size = sides[0] * patches.shape[-1]
        arguments = {
            "image_size": image_size,
            "token_size": len(weights["encoder.conv_out.weight"]) // 2,
            "vit_enc_model_size": sizes[len(patches)],
            "vit_dec_model_size": sizes[len(decoded)],
            "vit_enc_patch_size": patches.shape[-1],
            "vit_dec_patch_size": image_size // sides[1],
            "num_latent_tokens": len(weights["latent_tokens"]),
        }
    except (KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"not the weights of a published AR-VAE: {error} is not there or not of a known size"
        ) from error
    if any("temporal_blocks" in name for name in weights):
        arguments["num_frame"] = 16
    return arguments


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML or JSON ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold settings by name, found a {type(found).__name__}")
    return found


def _at(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The mapping at a path of names; empty where there is none."""
    node: Any = tree
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _arguments(found: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(found.get("config"), dict):
        return found
    beside = {name: found[name] for name in ("context_token", "context_dim") if name in found}
    return beside | found["config"]
