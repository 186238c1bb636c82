"""Constructor arguments of the published AR-Diffusion networks, and the same as our configuration.

The arguments and their defaults are those of the reference's `DiT_crossattn`, `TiTok_KL` and `TiTok_KL_wT`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ardiff.config import ModelConfig, ReferenceModelConfig, ReferenceVAEConfig, VAEConfig
from ardiff.errors import UserError

MERGE_MODES = ("share_norm", "separate_norm", "reproduce", "sharenorm_shift_first_t")
MASKS = {  # causal_attn_mode -> our mask and what context tokens read
    None: ("bidirectional", "leaky"),
    "temporal_causal": ("frame_causal", "strict"),
    "video_temporal_causal": ("frame_causal", "leaky"),
}
VIT_SIZES = {"small": (8, 512, 8), "base": (12, 768, 12), "large": (24, 1024, 16)}  # layers, width, heads

_DIT_DEFAULTS: dict[str, Any] = {
    "num_frames": 16,
    "n_token_per_frame": 32,
    "in_channels": 12,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "learn_sigma": True,
    "use_fp16": False,
    "context_dim": 768,
    "context_token": 77,
    "merge_mode": None,
    "causal_attn_mode": None,
    "use_rotary_emb": False,
    "qk_norm": False,
}
_ARVAE_DEFAULTS: dict[str, Any] = {
    "num_frame": None,  # given: the decoder is temporal
    "image_size": 256,
    "codebook_size": 4096,
    "token_size": 12,
    "use_l2_norm": True,
    "commitment_cost": 0.25,
    "vit_enc_model_size": "large",
    "vit_dec_model_size": "large",
    "vit_enc_patch_size": 16,
    "vit_dec_patch_size": 16,
    "num_latent_tokens": 32,
    "lpips_loss_weight": 0.1,
    "use_l1_loss": False,
    "use_checkpoint": True,
}


def model_config(arguments: Mapping[str, Any], num_classes: int = 0) -> ModelConfig:
    """Our configuration of a network with these constructor arguments. Raises UserError for unknown ones."""
    found = _with_defaults(arguments, _DIT_DEFAULTS, "DiT")
    mask = found["causal_attn_mode"]
    if isinstance(mask, str) and mask.lower() in ("null", "none", ""):
        mask = None
    if mask not in MASKS:
        raise UserError(f"causal_attn_mode = '{mask}' must be null, temporal_causal or video_temporal_causal")
    if found["merge_mode"] not in MERGE_MODES:
        raise UserError(f"merge_mode = '{found['merge_mode']}' must be one of {', '.join(MERGE_MODES)}")
    if found["hidden_size"] % found["num_heads"]:
        raise UserError(f"hidden_size = {found['hidden_size']} is no multiple of num_heads = {found['num_heads']}")
    return ModelConfig(
        num_frames=int(found["num_frames"]),
        tokens_per_frame=int(found["n_token_per_frame"]),
        in_channels=int(found["in_channels"]),
        hidden_size=int(found["hidden_size"]),
        depth=int(found["depth"]),
        num_heads=int(found["num_heads"]),
        mlp_ratio=float(found["mlp_ratio"]),
        qk_norm=bool(found["qk_norm"]),
        num_classes=num_classes,
        mask=MASKS[mask][0],
        context=MASKS[mask][1],
        architecture="reference",
        reference=ReferenceModelConfig(
            merge_mode=found["merge_mode"],
            positions="rotary" if found["use_rotary_emb"] else "flat",
            context_tokens=int(found["context_token"]),
            context_dim=int(found["context_dim"]),
            learn_sigma=bool(found["learn_sigma"]),
        ),
    )


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """The constructor arguments of a network; `model_config` reads them back."""
    modes = [mode for mode, names in MASKS.items() if names == (config.mask, config.context)]
    if config.architecture != "reference" or not modes:
        raise UserError(
            f"model.architecture = {config.architecture}, mask = {config.mask}, context = {config.context}: the "
            "reference code has no such network"
        )
    options = config.reference
    return {
        "num_frames": config.num_frames,
        "n_token_per_frame": config.tokens_per_frame,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "learn_sigma": options.learn_sigma,
        "context_dim": options.context_dim,
        "context_token": options.context_tokens,
        "merge_mode": options.merge_mode,
        "causal_attn_mode": modes[0],
        "use_rotary_emb": options.positions == "rotary",
        "qk_norm": config.qk_norm,
    }


def vae_config(arguments: Mapping[str, Any]) -> VAEConfig:
    """Our configuration of an auto-encoder with these constructor arguments. Raises UserError for unknown ones."""
    found = _with_defaults(arguments, _ARVAE_DEFAULTS, "AR-VAE")
    for name in ("vit_enc_model_size", "vit_dec_model_size"):
        if found[name] not in VIT_SIZES:
            raise UserError(f"{name} = '{found[name]}' must be one of {', '.join(VIT_SIZES)}")
    for name in ("vit_enc_patch_size", "vit_dec_patch_size"):
        if found["image_size"] % found[name]:
            raise UserError(f"image_size = {found['image_size']} is no multiple of {name} = {found[name]}")
    layers, width, heads = VIT_SIZES[found["vit_enc_model_size"]]
    return VAEConfig(
        image_size=int(found["image_size"]),
        patch_size=int(found["vit_enc_patch_size"]),
        num_tokens=int(found["num_latent_tokens"]),
        channels=int(found["token_size"]),
        hidden_size=width,
        encoder_depth=layers,
        decoder_depth=VIT_SIZES[found["vit_dec_model_size"]][0],
        num_heads=heads,
        architecture="reference",
        reference=ReferenceVAEConfig(
            encoder=found["vit_enc_model_size"],
            decoder=found["vit_dec_model_size"],
            decoder_patch_size=int(found["vit_dec_patch_size"]),
            temporal=found["num_frame"] is not None,
            unit_norm=bool(found["use_l2_norm"]),
        ),
    )


def vae_arguments(config: VAEConfig) -> dict[str, Any]:
    """The constructor arguments of an auto-encoder; `vae_config` reads them back."""
    options = config.reference
    arguments = {
        "image_size": config.image_size,
        "token_size": config.channels,
        "use_l2_norm": options.unit_norm,
        "vit_enc_model_size": options.encoder,
        "vit_dec_model_size": options.decoder,
        "vit_enc_patch_size": config.patch_size,
        "vit_dec_patch_size": options.decoder_patch_size,
        "num_latent_tokens": config.num_tokens,
    }
    return {"num_frame": 16, **arguments} if options.temporal else arguments


def _with_defaults(arguments: Mapping[str, Any], defaults: dict[str, Any], what: str) -> dict[str, Any]:
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], defaults, 1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(f"the reference's {what} has no argument {', '.join(unknown)}{hint}")
    found = defaults | dict(arguments)
    for name, default in defaults.items():
        value = found[name]
        if type(default) in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{name} = {value!r} must be a number")
        if type(default) is int and (value != int(value) or value < 1):
            raise UserError(f"{name} = {value!r} must be a whole number above 0")
    return found
