"""Distributions of training timesteps that cannot work, each told with the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from ardiff.config.sections import TIMESTEPS, DiffusionConfig, ModelConfig

WITH_BLOCKS = ("pavdm", "ad_matched", "teacher_forced")  # follow diffusion.staircase.block
WITH_PREFIX = (*WITH_BLOCKS, "rolling")


def timestep_problems(diffusion: DiffusionConfig, num_frames: int) -> Iterator[str]:
    """One sentence for each setting of `diffusion` that cannot work for clips of `num_frames` frames."""
    yield from _shares(diffusion)
    yield from _mixture(diffusion)
    stairs, used = diffusion.staircase, diffusion.used_timesteps
    if min(stairs.num_steps, stairs.block) < 1 or stairs.prefix < 0 or not 0 <= stairs.jitter < 1e3:
        yield (
            f"diffusion.staircase: num_steps = {stairs.num_steps} and block = {stairs.block} must be at least 1, "
            f"prefix = {stairs.prefix} and jitter = {stairs.jitter} at least 0"
        )
        return
    if used & set(WITH_PREFIX) and stairs.prefix >= num_frames:
        yield (
            f"diffusion.staircase.prefix = {stairs.prefix} must leave something to train on of model.num_frames = "
            f"{num_frames}"
        )
        return
    if used & {"pavdm", "ad_matched"} and stairs.num_steps > diffusion.num_timesteps:
        yield (
            f"diffusion.staircase.num_steps = {stairs.num_steps} must not exceed diffusion.num_timesteps = "
            f"{diffusion.num_timesteps}"
        )
    if "ad_matched" in used and not 0 <= stairs.gap <= stairs.num_steps:
        yield (
            f"diffusion.staircase.gap = {stairs.gap} must lie between 0 and diffusion.staircase.num_steps = "
            f"{stairs.num_steps}"
        )
    if "pavdm" in used:
        yield from _chunks(diffusion, num_frames)
    options = diffusion.conditioning
    if options.probability and not 1 <= options.max_frames < num_frames:
        yield (
            f"diffusion.conditioning.max_frames = {options.max_frames} must lie between 1 and model.num_frames - 1 = "
            f"{num_frames - 1}"
        )


def mask_problems(diffusion: DiffusionConfig, model: ModelConfig) -> Iterator[str]:
    """One sentence for each setting of `diffusion` that the attention mask makes impossible or pointless."""
    stairs, options = diffusion.staircase, diffusion.conditioning
    if options.probability and options.where != "prefix" and model.mask != "bidirectional":
        yield (
            f"diffusion.conditioning.where = {options.where} needs model.mask = bidirectional: under {model.mask} no "
            "frame reads the given ones that follow it"
        )
    if (
        model.mask == "block_causal"
        and diffusion.used_timesteps & set(WITH_BLOCKS)
        and (stairs.block % model.block or stairs.prefix % model.block)
    ):
        yield (
            f"diffusion.staircase.block = {stairs.block} and diffusion.staircase.prefix = {stairs.prefix} must be "
            f"multiples of model.block = {model.block} under model.mask = block_causal"
        )


def _shares(diffusion: DiffusionConfig) -> Iterator[str]:
    for name, share in (
        ("shared_probability", diffusion.shared_probability),
        ("init_probability", diffusion.init_probability),
        ("staircase.variable_length", diffusion.staircase.variable_length),
        ("staircase.prefix_dropout", diffusion.staircase.prefix_dropout),
        ("conditioning.probability", diffusion.conditioning.probability),
    ):
        if not 0 <= share <= 1:
            yield f"diffusion.{name} = {share} must lie between 0 and 1"


def _mixture(diffusion: DiffusionConfig) -> Iterator[str]:
    parts = diffusion.mixture
    if parts and diffusion.timesteps != "mixture":
        yield f"diffusion.mixture has a meaning only with diffusion.timesteps = mixture, not {diffusion.timesteps}"
    if diffusion.timesteps != "mixture":
        return
    if not sum(part.weight for part in parts) > 0:
        yield "diffusion.mixture needs a list of {timesteps: NAME, weight: W} with at least one weight above 0"
    known = [name for name in TIMESTEPS if name != "mixture"]
    for part in parts:
        if part.timesteps not in known or not 0 <= part.weight < 1e9:
            yield (
                f"diffusion.mixture: {{timesteps: {part.timesteps}, weight: {part.weight}}} needs one of "
                f"{', '.join(known)} and a weight >= 0"
            )


def _chunks(diffusion: DiffusionConfig, num_frames: int) -> Iterator[str]:
    stairs = diffusion.staircase
    noisy = num_frames - stairs.prefix
    if noisy % stairs.block or stairs.prefix % stairs.block:
        yield (
            f"pavdm: model.num_frames - diffusion.staircase.prefix = {num_frames} - {stairs.prefix} = {noisy} noisy "
            f"frames, and the prefix, must be multiples of diffusion.staircase.block = {stairs.block}"
        )
        return
    chunks = noisy // stairs.block
    if stairs.num_steps % chunks:
        yield (
            f"pavdm: diffusion.staircase.num_steps = {stairs.num_steps} is no multiple of the {chunks} chunks of a "
            f"clip, (model.num_frames - prefix) / block = ({num_frames} - {stairs.prefix}) / {stairs.block}"
        )
    if chunks < 2 and stairs.variable_length:
        yield (
            f"pavdm: diffusion.staircase.variable_length = {stairs.variable_length} needs at least 2 noisy chunks, "
            f"model.num_frames = {num_frames} gives {chunks}"
        )
