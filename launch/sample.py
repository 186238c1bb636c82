"""Sample videos from a trained run.

    python launch/sample.py --run runs/sky --num_videos 8 --num_frames 128 --steps 50 --gap 5 --out samples

Writes one mp4 per video, contact_sheet.png (a row per video), latents.npy and samples.json (how they were made).
"""

from __future__ import annotations

import argparse
import math
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config
from ardiff.data.latent_space import LatentSpace
from ardiff.data.text import half_features
from ardiff.errors import UserError
from ardiff.files import replacing, write_json
from ardiff.sampling import ad_levels
from ardiff.sampling.generate import Decoder, Request, cache_mode, default_device, generate
from ardiff.training.weights import load_dit
from ardiff.video import contact_sheet, frames_at, probe, resize_and_crop, write_mp4


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of the sampler, shared with launch/evaluate.py; None means: as in the run's configuration."""
    parser.add_argument("--run", type=Path, required=True, help="a run_dir, a checkpoint of it, or an export")
    parser.add_argument("--num_videos", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--num_frames", type=int, help="frames per video (default: a training clip)")
    parser.add_argument("--steps", type=int, help="DDIM steps per frame (default sampling.num_steps)")
    parser.add_argument("--gap", type=int, help="steps between the starts of neighbouring frames: 0 synchronous, "
                        "--steps frame by frame (default sampling.gap)")  # fmt: skip
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default sampling.guidance)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="videos sampled at a time (default %(default)s)")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged or plain weights")


def request_of(options: argparse.Namespace, config: Config) -> Request:
    """What the command line asks for. Raises UserError where it makes no sense."""
    for name in ("num_videos", "num_frames", "steps", "batch_size", "prefix_frames"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("fps", "guidance"):
        value = getattr(options, name, None)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value}: must be a number above 0")
    sampling, model = config.sampling, config.model
    num_steps = options.steps or sampling.num_steps
    gap = options.gap if options.gap is not None else min(sampling.gap, num_steps)
    guidance = options.guidance if options.guidance is not None else sampling.guidance
    labels = [i % model.num_classes for i in range(options.num_videos)] if model.num_classes else None
    if guidance != 1.0 and labels is None and not model.context_dim:
        raise UserError(f"--guidance {guidance}: this model has no classes or texts to guide towards; leave it at 1")
    ad_levels(options.num_frames or model.num_frames, num_steps, gap, model.block)  # refuses what is impossible
    return Request(
        num_videos=options.num_videos,
        num_frames=options.num_frames or model.num_frames,
        num_steps=num_steps,
        gap=gap,
        guidance=guidance,
        labels=labels,
        seed=options.seed,
        batch_size=options.batch_size,
        cache=cache_mode(model),
    )


def generate_with_bar(network: torch.nn.Module, config: Config, request: Request) -> Tensor:
    """`generate` on the GPU if there is one, with a progress bar on stderr."""
    network.to(default_device())
    with tqdm(unit="rows", desc="sampling", disable=None) as bar:

        def advance(row: int, rows: int) -> None:
            bar.total = rows
            bar.update(row - bar.n)

        return generate(network, config, request, advance)


def _encode_prefix(path: Path, frames: int, config: Config, decoder: Decoder) -> Tensor:
    size = decoder.network.config.image_size
    positions = prefix_positions(path, frames, decoder.space, config.data.stride)
    return decoder.encode(np.stack([resize_and_crop(frame, size) for _, frame in frames_at(path, positions)]))


def prefix_positions(path: Path, frames: int, space: LatentSpace, stride: int) -> list[int]:
    """Which frames of a clip follow one another as quickly as those of the training clips do."""
    if space.sampled_fps is None:
        return [k * space.stride * stride for k in range(frames)]
    step = probe(path).fps / Fraction(space.sampled_fps) * stride
    if step < 1:
        raise UserError(
            f"--prefix {path}: has fewer frames per second than the training clips ({space.sampled_fps} / {stride})"
        )
    return [math.ceil(k * step - Fraction(1, 2)) for k in range(frames)]  # of two that are equally near, the earlier


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Sample videos from a trained run.",
        "python launch/sample.py --run runs/sky --num_videos 8 --num_frames 128 --steps 50 --gap 5 --out samples",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--label", help="class (name or number) of all videos (default: all classes in turn)")
    parser.add_argument("--text", type=Path, metavar="NPY", help="text features [N, D] of all videos")
    parser.add_argument("--prefix", type=Path, metavar="VIDEO", help="a clip that every video continues")
    parser.add_argument("--prefix_frames", type=int, help="frames taken of it (default: half a training clip)")
    parser.add_argument("--arvae", type=Path, help="decodes the samples (default: the one that made the latents)")
    parser.add_argument("--fps", type=float, help="of the mp4 files (default: that of the training videos)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()

    network, config, space = load_dit(options.run, options.weights)
    request = request_of(options, config)
    if options.label is not None:
        request.labels = [_class_number(options.label, space.classes, config)] * request.num_videos
    request.text_tokens = space.text_tokens
    if options.text is not None:
        request.text = _text_features(options.text, config, space)
    decoder = Decoder(space, options.arvae or config.data.arvae)
    if options.prefix is not None:
        frames = options.prefix_frames or max(1, config.model.num_frames // 2)
        if frames >= request.num_frames:
            raise UserError(f"--prefix_frames {frames}: must leave something of --num_frames {request.num_frames}")
        request.prefix = _encode_prefix(options.prefix, frames, config, decoder)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    latents = generate_with_bar(network, config, request)
    fps = options.fps or (space.fps / config.data.stride if space.fps else config.sampling.fps)
    rows = []
    for i, video in enumerate(tqdm(latents, unit="videos", desc="decoding", disable=None)):
        pictures = decoder.decode(video[None])[0]
        write_mp4(options.out / f"video_{i:06d}.mp4", pictures, fps)
        if i < 16:
            rows.append(pictures)
    contact_sheet(options.out / "contact_sheet.png", rows)
    with replacing(options.out / "latents.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, latents.numpy().astype(np.float16), allow_pickle=False)
    settings = {key: value for key, value in vars(request).items() if key not in ("prefix", "text")}
    settings |= {
        "text": str(options.text) if options.text else None,
        "run": str(options.run),
        "prefix": str(options.prefix) if options.prefix else None,
        "fps": fps,
    }
    write_json(options.out / "samples.json", settings)
    print(f"{request.num_videos} videos of {request.num_frames} frames and contact_sheet.png in {options.out}")
    return cli.EXIT_OK


def _text_features(path: Path, config: Config, space: LatentSpace) -> Tensor:
    width = config.model.context_dim
    if not width:
        raise UserError(f"--text {path}: the model was trained without text (model.context_dim = 0)")
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--text {path}: not a .npy file of text features ({error})") from error
    features = half_features(str(path), found)
    if features.shape[1] != width or len(features) > space.text_tokens:
        raise UserError(f"--text {path}: {features.shape} must be [N, {width}] with N from 1 to {space.text_tokens}")
    return torch.from_numpy(features.astype(np.float32))


def _class_number(label: str, classes: list[str], config: Config) -> int:
    count = config.model.num_classes
    if not count:
        raise UserError(f"--label {label}: the model was trained without classes (model.num_classes = 0)")
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < count:
        return int(label)
    raise UserError(f"--label {label}: must be a number below {count} or one of {', '.join(classes)}")


if __name__ == "__main__":
    cli.run(main)
