"""Measure how close samples, or the reconstructions of an AR-VAE, are to held-out data.

    python launch/evaluate.py --run runs/sky --data latents/validation --num_videos 64 --out evaluation.json
    python launch/evaluate.py --arvae runs/arvae --data frames/validation --train_data frames \\
        --sheet sheet.png --out reconstruction.json

Samples are measured by the Frechet distance between latents of single frames. For scale, the same distance is given for
pure noise, for the untrained network and, with --train_data, for as many real training clips (what a perfect model that
knows only the training set would reach: not 0, because both sets are small and their videos differ).

Reconstructions are measured by PSNR, SSIM, sharpness, flicker and, with --lpips, LPIPS, as a whole and per video. For
scale, the same is given for the mean colour of each frame and, with --train_data, for linear codes of as many numbers
per frame as the AR-VAE has: the principal components of training frames (PCA) and the cosine transform of the frame
(DCT).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config
from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.plan import Plan
from ardiff.data.urls import is_remote
from ardiff.errors import UserError
from ardiff.files import check_writable, write_json
from ardiff.metrics.comparison import ARVAE, choose_clips, compare, table
from ardiff.metrics.frechet import frechet_distance
from ardiff.metrics.linear_codes import PCA, Code, LargestBlockDCT, MeanColour, random_frames
from ardiff.metrics.sheet import ORIGINAL, write_sheet
from ardiff.models import build_dit
from ardiff.models.lpips import LPIPS, SMALLEST
from ardiff.randomness import Stream, normals
from ardiff.sampling.decoder import default_device
from ardiff.sampling.options import add_sampling_arguments, request_of
from ardiff.training.run_dir import versions
from ardiff.training.weights import find_checkpoint, is_export, load_arvae, load_dit, vector_of
from launch.sample import generate_with_bar

ONLY = {  # options that belong to one of the two
    "run": ("num_videos", "steps", "gap", "guidance", "batch_size", "weights"),
    "arvae": ("max_frames", "lpips", "sheet"),
}
TRAINING_FRAMES = 2048  # that PCA and DCT are fitted on, at most


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


def evaluate_run(options: argparse.Namespace) -> int:
    """Samples of a diffusion transformer against held-out latents."""
    network, config, space = load_dit(options.run, vector_of(options.weights, options.ema))
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
    settings = {"num_videos": num_videos, "num_frames": request.num_frames, "seed": options.seed}
    settings |= asdict(request.sampling)
    record = {"run": str(options.run), "weights": options.weights, "ema": options.ema, "data": options.data}
    write_json(options.out, {**record, "frechet": distances, "sampling": settings})
    if len(held_out) < held_out.shape[1]:
        print(
            f"note: {len(held_out)} held-out frames are few for {held_out.shape[1]} numbers each; hold out more videos"
        )
    print(f"Frechet distance of single frames to {len(held_out)} held-out frames ({options.data}):")
    for name, distance in distances.items():
        print(f"  {name:20s}{distance:10.4f}   ({len(sets[name])} frames)")
    return cli.EXIT_OK


def open_frames(source: str, option: str, image_size: int) -> ShardSet:
    """Frame shards for an AR-VAE of this frame size. Raises UserError for others."""
    if is_remote(source):
        raise UserError(f"{option} {source}: these frames are read from local folders; copy the shards to one")
    shards = open_shards(source, "frames")
    size = shards.manifest.details["size"]
    if size != image_size:
        raise UserError(
            f"{option} {source}: frames of {size} x {size}, but the AR-VAE is for {image_size} x {image_size}; "
            f"shard the videos again with --size {image_size}"
        )
    return shards


def open_lpips(path: Path | None, image_size: int, device: torch.device) -> LPIPS | None:
    """LPIPS with the weights of a file, if one is given."""
    if path is None:
        return None
    if image_size < SMALLEST:
        raise UserError(f"--lpips {path}: frames of {image_size} x {image_size} are too small, {SMALLEST} are needed")
    try:
        return LPIPS(path).to(device)
    except UserError as error:
        raise UserError(str(error).replace("vae.lpips = ", "--lpips ")) from error


def evaluate_arvae(options: argparse.Namespace) -> int:
    """Reconstructions of held-out frames, beside those of linear codes with as many numbers per frame."""
    device = default_device()
    exported = is_export(options.arvae)
    source = options.arvae if exported else find_checkpoint(options.arvae)  # a run's newest, for the record
    network, identity = load_arvae(source, vector_of(options.weights, options.ema))
    vae = network.config
    held_out = open_frames(options.data, "--data", vae.image_size)
    train = open_frames(options.train_data, "--train_data", vae.image_size) if options.train_data else None
    if train is not None and train.identity == held_out.identity:
        raise UserError(
            f"--train_data {options.train_data}: is what --data names; the codes are fitted on other videos"
        )
    lpips = open_lpips(options.lpips, vae.image_size, device)
    codes: dict[str, Code] = {"mean colour": MeanColour()}
    training_frames = random_frames(train, TRAINING_FRAMES, options.seed) if train is not None else None
    if training_frames is not None:
        numbers = vae.num_tokens * vae.channels
        codes |= {"PCA": PCA.fit(training_frames, numbers), "DCT": LargestBlockDCT.fit(training_frames, numbers)}
    clips = choose_clips(held_out.frames.tolist(), options.max_frames, options.num_frames)
    shown = [name for name in (*codes, ARVAE) if name != "mean colour"]
    with tqdm(unit="frames", desc="reconstructing", disable=None, total=sum(n for _, n in clips)) as bar:
        found = compare(network.to(device), held_out, clips, codes, lpips, shown if options.sheet else (), bar.update)
    if not math.isfinite(found.methods[ARVAE]["psnr"]):
        raise UserError(f"--arvae {options.arvae}: its reconstructions hold numbers that are not finite")
    if options.sheet:
        titles = [ORIGINAL, *(f"{name} {found.methods[name]['numbers']}" for name in shown)]
        write_sheet(options.sheet, found.rows, titles)
    settings = {name: getattr(options, name) for name in ("ema", "train_data", "max_frames", "num_frames", "seed")}
    settings["lpips"] = options.lpips and str(options.lpips)
    settings["training_frames"] = 0 if training_frames is None else len(training_frames)
    record = {
        "arvae": {"path": str(source), "id": identity, "tokens": vae.num_tokens, "channels": vae.channels},
        "data": {"path": options.data, "identity": held_out.identity, "frames": found.frames, "videos": len(clips)},
        "settings": settings,
        "methods": found.methods,
        "videos": found.videos,
        "latents": found.latents,
        "frames_per_second": found.frames_per_second,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }
    write_json(options.out, record)
    print("\n".join(table(found, options.data)))  # last: whoever reads it may stop reading
    return cli.EXIT_OK


def check_options(options: argparse.Namespace) -> None:
    """See that the options belong together and that results can be written. Raises UserError."""
    if options.run is None and options.arvae is None:
        raise UserError("missing --run DIR (a diffusion transformer) or --arvae CHECKPOINT (an AR-VAE); see --help")
    if options.run is not None and options.arvae is not None:
        raise UserError("--run and --arvae: evaluate one at a time, each has its own --data")
    mode, other = ("run", "arvae") if options.arvae is None else ("arvae", "run")
    given = {word.partition("=")[0] for word in sys.argv[1:]}
    for name in ONLY[other]:
        if f"--{name}" in given:
            raise UserError(f"--{name}: belongs to --{other}, not to --{mode}; leave it out")
    if mode == "arvae" and options.overrides:
        raise UserError(f"'{options.overrides[0]}': an AR-VAE is evaluated as it is; settings belong to --run")
    for name, least in (("max_frames", 1), ("num_frames", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if options.sheet is not None and options.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {options.sheet}: must be the name of a .png file")
    for option, path in (("--out", options.out), ("--sheet", options.sheet)):
        if path is not None:
            check_writable(option, path)


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Measure how close samples (--run) or an AR-VAE's reconstructions (--arvae) are to held-out data.",
        "python launch/evaluate.py --run runs/sky --data latents/validation --num_videos 64 --out evaluation.json\n"
        "  python launch/evaluate.py --arvae runs/arvae --data frames/validation --train_data frames "
        "--sheet sheet.png --out reconstruction.json",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--arvae", type=Path, metavar="CHECKPOINT", help="instead of --run: an AR-VAE, measured on "
                        "the first --num_frames of each video (default: all) or fewer, see --max_frames")  # fmt: skip
    parser.add_argument("--data", required=True, metavar="SHARDS", help="held-out latents; of an AR-VAE: frames")
    parser.add_argument(
        "--train_data", metavar="SHARDS", help="the same of training, for scale: of an AR-VAE, to fit PCA and DCT"
    )
    parser.add_argument("--max_frames", type=int, metavar="N", help="of an AR-VAE: frames that are measured, at most")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="of an AR-VAE: weights of LPIPS, to measure it too")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="of an AR-VAE: originals beside reconstructions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.takes_settings = True
    options, overrides = cli.parse_with_overrides(parser)
    options.overrides = overrides
    check_options(options)
    return evaluate_run(options) if options.arvae is None else evaluate_arvae(options)


if __name__ == "__main__":
    cli.run(main)
