"""Values of the right type that cannot work, alone or together, each told with the arithmetic."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from ardiff.config.sections import Config
from ardiff.config.timestep_checks import mask_problems, timestep_problems


def _bad_choices(section: Any, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        choices = item.metadata.get("choices")
        if dataclasses.is_dataclass(value):
            yield from _bad_choices(value, f"{prefix}{item.name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for number, part in enumerate(value):
                yield from _bad_choices(part, f"{prefix}{item.name}[{number}].")
        elif choices and value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            yield f"{prefix}{item.name} = '{value}' must be one of {', '.join(choices)}{hint}"


POSITIVE = {
    "model": ("num_frames", "tokens_per_frame", "in_channels", "hidden_size", "depth", "num_heads", "block"),
    "vae": (
        *("image_size", "patch_size", "num_tokens", "channels", "hidden_size", "num_heads"),
        *("discriminator_width", "discriminator_layers", "window"),
    ),
    "train": (
        *("global_batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints"),
        *("validation_frames", "spike_batches"),
    ),
    "data": ("stride", "prefetch", "lanes", "lane_window", "decode_threads"),
    "sampling": ("num_videos", "num_steps"),
    "diffusion": ("num_timesteps",),
}


BOUNDS = (
    ("model.mlp_ratio", 0.125, 64),
    ("model.rope_theta", 1, 1e12),
    ("model.num_classes", 0, 1e6),
    ("model.context_dim", 0, 1e6),
    ("model.window", 0, 1e9),
    ("model.sink", 0, 1e9),
    ("vae.encoder_depth", 0, 1e4),
    ("vae.decoder_depth", 0, 1e4),
    ("vae.kl_weight", 0, 1e6),
    ("vae.l1_weight", 0, 1),
    ("vae.perceptual_weight", 0, 1e6),
    ("vae.adversarial_weight", 0, 1e6),
    ("vae.adversarial_warmup", 0, 1e12),
    ("vae.discriminator_lr", 0, 1e3),
    ("data.flip_probability", 0, 1),
    ("data.crop_scale", 0.05, 1),
    ("data.max_bad_fraction", 0, 1),
    ("data.cache_gb", 0.001, 1e6),
    ("train.seed", -(2**63), 2**63 - 1),
    ("train.warmup_steps", 0, 1e12),
    ("train.weight_decay", 0, 1e6),
    ("train.grad_clip", 0, 1e12),
    ("train.adam_eps", 0, 1),
    ("train.ema_decay", 0, 1 - 1e-9),
    ("train.label_dropout", 0, 1),
    ("train.sample_every", 0, 1e12),
    ("train.validate_every", 0, 1e12),
    ("train.num_threads", 0, 1e4),
    ("train.collective_timeout_minutes", 0.05, 1e5),
    ("train.max_skipped_steps", 1, 1e9),
    ("train.save_minutes", 0, 1e6),
    ("train.keep_every", 0, 1e12),
    ("train.probe_tolerance", 0, 1e9),
    ("train.time_limit_minutes", 0, 1e7),
    ("train.spike_sigmas", 0, 1e6),
    ("train.spike_window", 10, 1e4),
    ("train.grad_norms_every", 0, 1e12),
    ("diffusion.flow_shift", 0, 1e3),
    ("sampling.guidance", -1e6, 1e6),
    ("sampling.fps", 0.01, 1e4),
    ("sampling.block", 0, 1e9),
    ("sampling.eta", 0, 1),
    ("sampling.window", 0, 1e9),
    ("sampling.sink", 0, 1e9),
    ("sampling.sliding", 0, 1e9),
    ("sampling.history", -1, 1e9),
    ("sampling.partition", 0, 1e9),
)


def impossible(config: Config) -> Iterator[str]:
    """One sentence for each setting that cannot work."""
    yield from _bad_choices(config, "")
    too_small = [
        f"{section}.{name} = {value} must be at least 1"
        for section, names in POSITIVE.items()
        for name in names
        if (value := getattr(getattr(config, section), name)) < 1
    ]
    yield from too_small
    for key, low, high in BOUNDS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if not low <= value <= high:  # NaN included
            yield f"{key} = {value} must lie between {low:g} and {high:g}"
    yield from _impossible_sampling(config)
    yield from _impossible_data(config)
    if not too_small:  # the arithmetic below divides by them
        yield from _impossible_networks(config)
        yield from timestep_problems(config.diffusion, config.model.num_frames)
        yield from mask_problems(config.diffusion, config.model)
        yield from _impossible_training(config)


def _impossible_networks(config: Config) -> Iterator[str]:
    model, vae = config.model, config.vae
    for name, width, heads in (
        ("model", model.hidden_size, model.num_heads),
        ("vae", vae.hidden_size, vae.num_heads),
    ):
        if width % heads or (width // heads) % 2:
            yield f"{name}.hidden_size / {name}.num_heads = {width} / {heads} must be an even whole number"
    if vae.image_size % vae.patch_size:
        yield f"vae.image_size = {vae.image_size} is no multiple of vae.patch_size = {vae.patch_size}"
    yield from _impossible_reference(config)
    if model.mask != "block_causal" and model.block != 1:
        yield f"model.block = {model.block} has a meaning only with model.mask = block_causal"
    if model.window and model.mask == "bidirectional":
        yield f"model.window = {model.window} needs a causal model.mask; this one is bidirectional"
    if model.sink and not model.window:
        yield f"model.sink = {model.sink} has a meaning only with model.window"
    if model.window % model.block or model.sink % model.block:
        yield (
            f"model.window = {model.window} and model.sink = {model.sink} must be multiples of model.block = "
            f"{model.block}"
        )


def _impossible_reference(config: Config) -> Iterator[str]:
    model, vae = config.model, config.vae
    if model.architecture == "reference":
        options = model.reference
        if model.mask == "block_causal":
            yield "model.mask = block_causal: the reference architecture has only frame_causal and bidirectional"
        if options.context_tokens < 1 or options.context_dim < 1:
            yield (
                f"model.reference.context_tokens = {options.context_tokens} and context_dim = {options.context_dim} "
                "must be at least 1"
            )
        if model.context_dim:
            yield (
                f"model.context_dim = {model.context_dim}: the reference architecture has an embedding of its own "
                "(model.reference.context_tokens) instead of text features; leave it at 0"
            )
    if vae.architecture == "reference":
        patch = vae.reference.decoder_patch_size
        if patch < 1 or vae.image_size % patch:
            yield f"vae.image_size = {vae.image_size} is no multiple of vae.reference.decoder_patch_size = {patch}"


def _impossible_training(config: Config) -> Iterator[str]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size} is no multiple of "
            f"train.micro_batch_size = {train.micro_batch_size}"
        )
    if any(phase.steps < 1 or not 0 < phase.lr < 1e3 for phase in train.phases) or not train.phases:
        yield "train.phases needs a list of {steps: N, lr: X} with N >= 1 and X > 0"
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas = {train.betas} must be two numbers in [0, 1)"
    decays = [train.ema_decay, *train.extra_ema_decays]
    if len(set(decays)) != len(decays) or not all(0 <= decay < 1 for decay in decays):
        yield f"train.extra_ema_decays = {train.extra_ema_decays} must be numbers in [0, 1), none twice nor ema_decay"
    hang, timeout = train.hang_minutes, train.collective_timeout_minutes
    if hang is not None and not 0.01 <= hang < timeout:
        yield (
            f"train.hang_minutes = {hang:g} must be at least 0.01 and less than train.collective_timeout_minutes = "
            f"{timeout:g}: the other ranks would give up before it is known which one hangs"
        )
    if train.keep_every % train.save_every:
        yield f"train.keep_every = {train.keep_every} must be a multiple of train.save_every = {train.save_every}"
    if train.spike_action == "rollback" and not train.spike_sigmas:
        yield "train.spike_action = rollback needs train.spike_sigmas above 0"
    if train.spike_batches > 1 and train.spike_action != "rollback":
        yield f"train.spike_batches = {train.spike_batches} has a meaning only with train.spike_action = rollback"
    yield from _impossible_stages(config)
    if config.max_steps < 1:
        yield f"train.max_steps = {config.max_steps} must be at least 1"


def _impossible_stages(config: Config) -> Iterator[str]:
    vae, train = config.vae, config.train
    if vae.perceptual == "lpips" and vae.lpips is None:
        yield "vae.perceptual = lpips needs vae.lpips, the file with its weights; vae.perceptual = structure needs none"
    elif vae.perceptual == "lpips" and not vae.perceptual_weight:
        yield "vae.perceptual = lpips has no effect with vae.perceptual_weight = 0; the paper has 1.0"
    if vae.architecture == "reference" and vae.temporal:
        yield "vae.temporal: the reference architecture has vae.reference.temporal instead"
    temporal = vae.reference.temporal if vae.architecture == "reference" else vae.temporal
    for phase in train.phases:
        if phase.stage == "temporal":
            if not temporal:
                yield "train.phases: the stage temporal needs vae.temporal = true (vae.reference.temporal of published)"
            if phase.num_frames < 2 or train.micro_batch_size % phase.num_frames:
                yield (
                    f"train.phases: num_frames = {phase.num_frames} of the stage temporal must be at least 2 and "
                    f"divide train.micro_batch_size = {train.micro_batch_size}, which counts frames"
                )
        elif phase.num_frames != 1 or phase.trains != "all":
            yield f"train.phases: num_frames and trains belong to the stage temporal, not to {phase.stage}"


def _impossible_data(config: Config) -> Iterator[str]:
    data = config.data
    if data.shards and data.mixture:
        yield "data.shards and data.mixture: give one of them"
    total = sum(source.weight for source in data.mixture)
    for number, source in enumerate(data.mixture, 1):  # not by name: a URL may hold a password
        if not source.shards or not 0 <= source.weight < 1e9:
            yield f"data.mixture: data set {number} needs shards and a weight >= 0 (it has weight {source.weight})"
        elif 0 < source.weight < 1e-4 * total:
            yield f"data.mixture: the weight {source.weight} of data set {number} is below 1e-4 of all; leave it out"
    if data.mixture and not sum(source.weight for source in data.mixture) > 0:
        yield "data.mixture: at least one weight must be above 0"


def _impossible_sampling(config: Config) -> Iterator[str]:
    sampling, diffusion = config.sampling, config.diffusion
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        yield f"diffusion betas {diffusion.beta_start}, {diffusion.beta_end} must satisfy 0 < start <= end < 1"
    if sampling.window and sampling.sliding:
        yield "sampling.window (a mask) and sampling.sliding (frames that leave) exclude each other: give one of them"
    if sampling.sink and not sampling.window:
        yield f"sampling.sink = {sampling.sink} has a meaning only with sampling.window"
    for name, off in (("history", -1), ("variable", False), ("partition", 0)):
        if getattr(sampling, name) != off and not sampling.sliding:
            yield f"sampling.{name} = {getattr(sampling, name)} has a meaning only with sampling.sliding"
    if sampling.lookahead and not sampling.partition:
        yield "sampling.lookahead has a meaning only with sampling.partition"
    if sampling.cache == "exact" and sampling.sliding:
        yield "sampling.cache = exact cannot be kept with sampling.sliding: use sampling.window, or cache = none"
    if sampling.eta and sampling.solver != "ddim":
        yield f"sampling.eta = {sampling.eta} needs sampling.solver = ddim"
    if not 0 <= sampling.gap <= sampling.num_steps:
        yield f"sampling.gap = {sampling.gap} must lie between 0 and sampling.num_steps = {sampling.num_steps}"
    if sampling.num_steps >= config.diffusion.num_timesteps:
        yield (
            f"sampling.num_steps = {sampling.num_steps} must be less than "
            f"diffusion.num_timesteps = {config.diffusion.num_timesteps}"
        )
