"""Measure how close samples are to held-out data: Frechet distance between latents of single frames.

    python launch/evaluate.py --run runs/sky --data latents/validation --num_videos 64 --out evaluation.json

For scale, the same distance is given for pure noise, for the untrained network and, with --train_data, for as many
real training clips (what a perfect model that knows only the training set would reach: not 0, because both sets are
small and their videos differ).
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config
from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.plan import Plan
from ardiff.errors import UserError
from ardiff.files import write_json
from ardiff.metrics.frechet import frechet_distance
from ardiff.models import build_dit
from ardiff.randomness import Stream, normals
from ardiff.training.weights import load_dit
from launch.sample import add_sampling_arguments, generate_with_bar, request_of


def frame_features(latents: Tensor, space: LatentSpace) -> Tensor:
    """Latents of the model [V, F, L, C] -> one feature vector a frame [V*F, L*C], as the decoder sees them."""
    return torch.from_numpy(space.to_model(space.to_arvae(latents).numpy())).flatten(0, 1).flatten(1)


def all_features(shards: ShardSet, space: LatentSpace) -> Tensor:
    """Features of all frames of a data set."""
    videos = [shards.read_latents(i, 0, int(shards.frames[i])) for i in range(len(shards))]
    return torch.from_numpy(space.to_model(np.concatenate(videos))).flatten(1)


def clip_features(
    shards: ShardSet, space: LatentSpace, num_videos: int, num_frames: int, stride: int, seed: int
) -> Tensor:
    """Features of the frames of random clips, as many as there are samples."""
    visits = Plan(shards, seed, num_frames=num_frames, stride=stride).batch(0, num_videos)
    clips = [shards.read_latents(visit.video, visit.first_frame, num_frames, stride) for visit in visits]
    return torch.from_numpy(space.to_model(np.concatenate(clips))).flatten(1)


def open_latents(source: str, config: Config, space: LatentSpace) -> ShardSet:
    """Latent shards that this model could have made. Raises UserError for those of another AR-VAE or shape."""
    shards = open_shards(source, "latents")
    found, model = LatentSpace.of(shards.manifest, space.normalize), config.model
    shape = (shards.manifest.details["tokens"], shards.manifest.details["channels"])
    if found.arvae_id != space.arvae_id or shape != (model.tokens_per_frame, model.in_channels):
        raise UserError(
            f"{source}: latents of AR-VAE {found.arvae_id}, {shape[0]} x {shape[1]} numbers a frame; the model was "
            f"trained on AR-VAE {space.arvae_id}, {model.tokens_per_frame} x {model.in_channels}"
        )
    return shards


def untrained(config: Config) -> torch.nn.Module:
    """The network as it was before the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return build_dit(config.model, config.diffusion.prediction).eval()


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Measure how close samples are to held-out data.",
        "python launch/evaluate.py --run runs/sky --data latents/validation --num_videos 64 --out evaluation.json",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--data", required=True, metavar="LATENTS", help="held-out latent shards")
    parser.add_argument("--train_data", metavar="LATENTS", help="latent shards of training, for scale")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.takes_settings = True
    options, overrides = cli.parse_with_overrides(parser)
    options.overrides = overrides

    if options.run is None:
        raise UserError("missing --run DIR, a run_dir, a checkpoint of it, or an export; see --help")
    if options.out.is_dir():
        raise UserError(f"--out {options.out}: is a folder; name a file such as {options.out / 'evaluation.json'}")
    network, config, space = load_dit(options.run, options.weights)
    request, config = request_of(options, config)
    request.text_tokens, num_videos = space.text_tokens, len(request.videos)
    if num_videos * request.num_frames < 2:
        raise UserError("--num_videos 1 --num_frames 1: a distance needs at least 2 frames")
    held_out = all_features(open_latents(options.data, config, space), space)
    shape = (request.num_frames, config.model.tokens_per_frame, config.model.in_channels)
    noise = np.stack([normals(options.seed, Stream.SAMPLES, i, shape) for i in range(num_videos)])
    sets = {
        "samples": frame_features(generate_with_bar(network, config, request), space),
        "untrained network": frame_features(generate_with_bar(untrained(config), config, request), space),
        "noise": frame_features(torch.from_numpy(noise), space),
    }
    if options.train_data:
        train = open_latents(options.train_data, config, space)
        sets["training clips"] = clip_features(
            train, space, num_videos, request.num_frames, config.data.stride, options.seed
        )
    distances = {name: frechet_distance(held_out, features) for name, features in sets.items()}
    if len(held_out) < held_out.shape[1]:
        print(
            f"note: {len(held_out)} held-out frames are few for {held_out.shape[1]} numbers each; hold out more videos"
        )
    print(f"Frechet distance of single frames to {len(held_out)} held-out frames ({options.data}):")
    for name, distance in distances.items():
        print(f"  {name:20s}{distance:10.4f}   ({len(sets[name])} frames)")
    settings = {"num_videos": num_videos, "num_frames": request.num_frames, "seed": options.seed}
    settings |= asdict(request.sampling)
    write_json(options.out, {"run": str(options.run), "data": options.data, "frechet": distances, "sampling": settings})
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
