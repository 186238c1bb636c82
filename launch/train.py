"""Train the diffusion transformer on latent shards.

    deepspeed launch/train.py --config ardiff_xl --ds_config ds_configs/zero2.json --data.shards DIR --run_dir RUN

The same file works under torchrun and plain python. The same command again resumes from the newest valid checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config, Phase
from ardiff.data.clips import LatentClips
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture, open_data
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.monitor.heatmaps import schedule_heat_maps
from ardiff.monitor.throughput import dit_flops
from ardiff.sampling.decoder import Decoder
from ardiff.sampling.generate import default_request, generate
from ardiff.training import program
from ardiff.training.job import Feed, Job, Preview, Validate
from ardiff.training.validation import HeldOutClips, HeldOutLoss, check_latents, open_held_out

NAME = "DiT"
FIXED = ("model.", "diffusion.", "data.normalize", "data.stride")  # settings that a run keeps


def build_job(config: Config) -> Job:
    """The DiT, its objective and its data. Raises UserError where they do not fit together."""
    model = config.model
    if not (config.data.shards or config.data.mixture):
        raise UserError("--data.shards is needed: a folder of latent shards made by data_tools.extract_latents")
    _refuse_settings_of_auto_encoders(config)
    data = _open_latents(config)
    classes = len(data.classes)
    if model.num_classes and model.num_classes != classes:
        raise UserError(f"model.num_classes = {model.num_classes}, but the data have {classes} classes")
    span = (model.num_frames - 1) * config.data.stride + 1
    if model.mask != "frame_causal" and (data.frames < span).any():
        raise UserError(
            f"{(data.frames < span).sum()} videos are shorter than a clip ({span} frames): under model.mask = "
            f"{model.mask} frames would read their padding; leave them out or use frame_causal"
        )
    space = LatentSpace.of(data.manifest, config.data.normalize)
    preview, note = _preview(config, space)
    validate, measured = _validation(config, data, space)
    flops = dit_flops(model, num_context=space.text_tokens if model.context_dim else None)
    feed = Feed(data, LatentClips(data, space, config), flops, model.num_frames * model.tokens_per_frame)
    return Job(
        name=NAME,
        config=config,
        build_objective=lambda: DiffusionObjective(build_dit(model, config.diffusion.prediction), config),
        feeds=[feed] * len(config.train.phases),
        latent_space=space,
        preview=preview,
        validate=validate,
        pictures=lambda: schedule_heat_maps(config),
        notes=[note, f"validation: {measured}"],
    )


def _open_latents(config: Config) -> Mixture:
    """Latent shards of the size that the network takes."""
    model = config.model
    data = open_data(config, "latents", model.num_frames)
    details = data.manifest.details
    found, needed = (details["tokens"], details["channels"]), (model.tokens_per_frame, model.in_channels)
    if found != needed:
        raise UserError(
            f"{data.source}: latents of {found[0]} tokens x {found[1]} channels, but model.tokens_per_frame x "
            f"model.in_channels = {needed[0]} x {needed[1]}"
        )
    return data


def _validation(config: Config, data: Mixture, space: LatentSpace) -> tuple[Validate | None, str]:
    """The loss on held-out videos, and what is to be said of it."""
    every = config.train.validate_every
    if not every and config.data.validation is None:
        return None, "never (train.validate_every = 0)"
    held_out = open_held_out(config, data, _open_latents)
    if held_out is None:
        return None, "none (no held-out latents: name them with --data.validation)"
    check_latents(held_out, space, config.model.num_classes)
    clips = HeldOutClips(held_out, space, config)
    if not every:
        return None, "never (train.validate_every = 0)"
    short = f" ({clips.num_left_out} videos are too short)" if clips.num_left_out else ""
    note = f"{held_out.source}, {len(clips)} clips of {clips.num_videos} videos{short}, every {every} steps"
    return HeldOutLoss(clips, config.train.micro_batch_size), note


def _refuse_settings_of_auto_encoders(config: Config) -> None:
    fresh = Config()
    for section, name in (
        ("train", "init"),
        ("data", "crop_scale"),
    ):
        if getattr(getattr(config, section), name) != getattr(getattr(fresh, section), name):
            raise UserError(f"{section}.{name} is a setting of launch/train_vae.py; leave it out")
    for phase in config.train.phases:
        if phase.stage != Phase().stage:
            raise UserError(f"train.phases: the stage {phase.stage} is one of launch/train_vae.py; leave it out")


def _preview(config: Config, space: LatentSpace) -> tuple[Preview | None, str]:
    """A function that draws sample videos, when there is an AR-VAE to decode them."""
    if os.environ.get("RANK", "0") != "0":
        return None, ""  # rank 0 draws; the others need not load an AR-VAE each
    if not config.train.sample_every:
        return None, "no sample videos (train.sample_every = 0)"
    try:
        decoder = Decoder(space, config.data.arvae)
    except UserError as error:
        return None, f"no sample videos in TensorBoard: {error}"

    def draw(network: nn.Module) -> dict[str, np.ndarray]:
        request = default_request(config, config.sampling.num_videos, config.train.seed)
        videos = decoder.decode(generate(network, config, request))
        return {f"samples/{i:02d}": video for i, video in enumerate(videos)}

    return draw, f"sample videos every {config.train.sample_every} steps, decoded by AR-VAE {space.arvae_id}"


def main() -> int:
    """The program."""
    parser = program.arguments(
        "Train the diffusion transformer on latent shards.",
        "deepspeed launch/train.py --config ardiff_xl --ds_config ds_configs/zero2.json "
        "--data.shards /data/latents --run_dir runs/sky",
        "ardiff_xl",
    )
    return program.main(parser, build_job, NAME, FIXED)


if __name__ == "__main__":
    cli.run(main)
