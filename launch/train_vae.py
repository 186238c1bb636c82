"""Train the frame auto-encoder (AR-VAE) on frame shards.

    python launch/train_vae.py --config arvae_tiny --data.shards FRAMES --run_dir RUN

Runs under `deepspeed` and `torchrun` as well; the same command again resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config
from ardiff.data.clips import FrameClips
from ardiff.data.mixture import open_data
from ardiff.errors import UserError
from ardiff.models.arvae import ReconstructionObjective
from ardiff.monitor.throughput import arvae_flops
from ardiff.training import program
from ardiff.training.job import Job

NAME = "AR-VAE"
FRAMES_PER_CLIP = 1  # frames are encoded one by one; a batch of single frames is the most varied
PREVIEW_FRAMES = 16


def build_job(config: Config) -> Job:
    """The AR-VAE, its objective and its data. Raises UserError where they do not fit together."""
    if not (config.data.shards or config.data.mixture):
        raise UserError("--data.shards is needed: a folder of frame shards made by data_tools.shard_videos")
    if config.vae.architecture != "ardiff":
        raise UserError(
            f"vae.architecture = {config.vae.architecture}: published auto-encoders are converted, not trained "
            "(launch/convert.py); use vae.architecture=ardiff"
        )
    data = open_data(config, "frames", FRAMES_PER_CLIP)
    size = data.manifest.details["size"]
    if size != config.vae.image_size:
        raise UserError(
            f"{data.source}: frames of {size} x {size}, but vae.image_size = {config.vae.image_size}; "
            f"shard the videos again with --size {config.vae.image_size}"
        )

    def preview(network: nn.Module) -> dict[str, np.ndarray]:
        """Originals on the left, reconstructions on the right."""
        videos = {}
        for index in range(min(config.sampling.num_videos, len(data))):
            frames = data.read_frames(index, 0, min(PREVIEW_FRAMES, int(data.frames[index])))
            video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float().div(255)
            video = video.to(next(network.parameters()).device)
            rebuilt = network.decode(network.encode(video)).float().clamp(0, 1)  # type: ignore[operator]
            pixels = rebuilt[0].mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            videos[f"reconstruction/{index:02d}"] = np.concatenate([frames, pixels], axis=2)
        return videos

    return Job(
        name=NAME,
        config=config,
        build_objective=lambda: ReconstructionObjective(config.vae),
        data=data,
        collate=FrameClips(data, config, FRAMES_PER_CLIP),
        flops_per_clip=FRAMES_PER_CLIP * arvae_flops(config.vae),
        tokens_per_clip=FRAMES_PER_CLIP * config.vae.num_tokens,
        preview=preview if config.train.sample_every else None,
    )


def main() -> int:
    """The program."""
    parser = program.arguments(
        "Train the frame auto-encoder (AR-VAE) on frame shards.",
        "python launch/train_vae.py --config arvae_tiny --data.shards frames --run_dir runs/arvae",
        "arvae_tiny",
    )
    return program.main(parser, build_job, NAME, ("vae.", "data.stride"))


if __name__ == "__main__":
    cli.run(main)
