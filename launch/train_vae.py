"""Train the auto-encoder (AR-VAE) on frame shards: reconstruction, adversarial, temporal, as train.phases say.

    python launch/train_vae.py --config arvae_tiny --data.shards FRAMES --run_dir RUN

Runs under `deepspeed` and `torchrun` as well; the same command again resumes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config, Phase
from ardiff.data.clips import FrameClips
from ardiff.data.mixture import Mixture, open_data
from ardiff.errors import UserError
from ardiff.metrics.reconstruction import Reconstruction, reconstruction_metrics
from ardiff.models.arvae import as_pictures
from ardiff.models.discriminator import PatchDiscriminator, check_size
from ardiff.models.lpips import LPIPS
from ardiff.models.perceptual import build_perceptual, measured_lpips
from ardiff.models.reconstruction import ReconstructionObjective
from ardiff.monitor.throughput import arvae_flops
from ardiff.monitor.writers import VALIDATION
from ardiff.training import program
from ardiff.training.initialise import initialise
from ardiff.training.job import Feed, Job, Preview
from ardiff.training.validation import open_held_out

log = logging.getLogger("ardiff")
NAME = "AR-VAE"
PREVIEW_FRAMES = 16
ARCHITECTURE = (  # what a run keeps of its AR-VAE; the rest of `vae` may change when it goes on
    *("image_size", "patch_size", "num_tokens", "channels", "hidden_size", "encoder_depth", "decoder_depth"),
    *("num_heads", "architecture", "reference", "temporal", "window"),
)
FIXED = (*(f"vae.{name}" for name in ARCHITECTURE), "data.stride")  # settings that a run keeps
VALIDATION_CLIP = 8  # frames in a row of a held-out video, for what can be seen in time only


def build_job(config: Config) -> Job:
    """The AR-VAE, its objective and its data. Raises UserError where they do not fit together."""
    if not (config.data.shards or config.data.mixture):
        raise UserError("--data.shards is needed: a folder of frame shards made by data_tools.shard_videos")
    feeds = _feeds(config)
    held_out = open_held_out(config, feeds[0].data, lambda held_out: _open_frames(held_out, 1))
    shown = held_out or feeds[0].data
    measured = "none (no held-out frame shards: name them with --data.validation)"
    if held_out is not None:
        every = config.train.validate_every
        measured = f"{held_out.source}, every {every} steps" if every else "never (train.validate_every = 0)"
    vae = config.vae
    adversarial = any(phase.stage == "adversarial" for phase in config.train.phases)
    lpips = measured_lpips(vae)  # now, as what follows: it may refuse what the user gave
    perceptual = build_perceptual(vae, lpips)
    if adversarial:
        check_size(vae.image_size, vae.image_size, vae.discriminator_layers)
    return Job(
        name=NAME,
        config=config,
        build_objective=lambda: ReconstructionObjective(vae, perceptual),
        feeds=feeds,
        preview=_preview(config, shown) if config.train.sample_every else None,
        validate=Quality(config, held_out, lpips) if held_out is not None and config.train.validate_every else None,
        build_discriminator=(lambda: PatchDiscriminator.of(vae)) if adversarial else None,
        enter=ReconstructionObjective.enter,  # type: ignore[arg-type]
        initialise=_initialise(config.train.init) if config.train.init else None,
        notes=[f"stages: {', '.join(_describe(phase) for phase in config.train.phases)}", f"validation: {measured}"],
    )


def _describe(phase: Phase) -> str:
    clips = f" on clips of {phase.num_frames} frames, {phase.trains} parameters" if phase.stage == "temporal" else ""
    return f"{phase.steps} steps {phase.stage}{clips}"


def _feeds(config: Config) -> list[Feed]:
    """Where each phase finds its clips: of one frame (most varied), or of several for a temporal decoder."""
    feeds: dict[int, Feed] = {}
    for phase in config.train.phases:
        count = phase.num_frames
        if count not in feeds:
            data = _open_frames(config, count)
            if (data.frames < (count - 1) * config.data.stride + 1).all():
                raise UserError(
                    f"train.phases: num_frames = {count} with data.stride = {config.data.stride}, but no video of "
                    f"{data.source} is as long as that; use shorter clips"
                )
            flops = arvae_flops(config.vae, count)
            tokens = count * config.vae.num_tokens
            feeds[count] = Feed(data, FrameClips(data, config, count), flops, tokens, counts_as=count)
    return [feeds[phase.num_frames] for phase in config.train.phases]


def _open_frames(config: Config, num_frames: int) -> Mixture:
    """Frame shards of the size that the auto-encoder takes."""
    data = open_data(config, "frames", num_frames)
    size = data.manifest.details["size"]
    if size != config.vae.image_size:
        raise UserError(
            f"{data.source}: frames of {size} x {size}, but vae.image_size = {config.vae.image_size}; "
            f"shard the videos again with --size {config.vae.image_size}"
        )
    return data


def _clips(data: Mixture, num_clips: int, num_frames: int, stride: int) -> Iterator[np.ndarray]:
    """Stretches of videos that lie evenly in the set, each from the middle of its video: uint8 [F, H, W, 3]."""
    for video in np.linspace(0, len(data) - 1, min(num_clips, len(data))).round().astype(int).tolist():
        count = min(num_frames, (int(data.frames[video]) - 1) // stride + 1)
        first = (int(data.frames[video]) - 1 - (count - 1) * stride) // 2
        yield data.read_frames(video, first, count, stride)


def _preview(config: Config, data: Mixture) -> Preview:
    """Moving pictures, originals on the left of their reconstructions; and strips, originals above."""

    def preview(network: nn.Module) -> dict[str, np.ndarray]:
        videos = {}
        for index, frames in enumerate(_clips(data, config.sampling.num_videos, PREVIEW_FRAMES, config.data.stride)):
            rebuilt = np.concatenate([as_pictures(piece.rebuilt) for piece in Reconstruction(network).pieces(frames)])
            videos[f"reconstruction/{index:02d}"] = np.concatenate([frames, rebuilt], axis=2)
            chosen = slice(None, None, max(1, len(frames) // 8))
            rows = [np.concatenate(list(part[chosen]), axis=1) for part in (frames, rebuilt)]
            videos[f"strip/{index:02d}"] = np.concatenate(rows)[None]
        return videos

    return preview


class Quality:
    """Quality of held-out reconstructions, and statistics of their latents: all measured by rank 0."""

    def __init__(self, config: Config, data: Mixture, lpips: LPIPS | None) -> None:
        self.config, self.data, self.lpips = config, data, lpips

    @property
    def identity(self) -> str:
        """Of the held-out data."""
        return self.data.identity

    def measure(self, objective: nn.Module, rank: int, world_size: int) -> dict[str, Any] | None:
        """The figures, on rank 0."""
        if rank:
            return None
        network: nn.Module = objective.network  # type: ignore[assignment]
        if self.lpips is not None:
            self.lpips.to(next(network.parameters()).device)
        num_clips = -(-self.config.train.validation_frames // VALIDATION_CLIP)
        clips = _clips(self.data, num_clips, VALIDATION_CLIP, self.config.data.stride)
        return reconstruction_metrics(network, clips, self.lpips)

    def combine(self, parts: list[Any]) -> dict[str, Any]:
        """The same, under the names of held-out figures."""
        return {f"{VALIDATION}{name}": value for name, value in parts[0].items()}


def _initialise(source: str) -> Any:
    """Weights that training starts from; the table of what they cover goes to the log."""

    def fill(network: nn.Module) -> None:
        coverage = initialise(network, Path(source))  # type: ignore[arg-type]
        for line in coverage.table().splitlines():
            log.info("%s", line)

    return fill


def main() -> int:
    """The program."""
    parser = program.arguments(
        "Train the auto-encoder (AR-VAE) on frame shards, in the stages that train.phases name.",
        "python launch/train_vae.py --config arvae_tiny --data.shards frames --run_dir runs/arvae",
        "arvae_tiny",
    )
    return program.main(parser, build_job, NAME, FIXED)


if __name__ == "__main__":
    cli.run(main)
