"""What videos are made from, as users give it: classes, text features, clips to continue, lists of prompts."""

from __future__ import annotations

import math
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ardiff.config import Config
from ardiff.data.latent_space import LatentSpace
from ardiff.data.text import half_features
from ardiff.errors import UserError
from ardiff.sampling.decoder import Decoder
from ardiff.video import PICTURES, check, frames_at, probe, resize_and_crop


class Prompt(NamedTuple):
    """A line of a list of prompts: the text, and the clip that the video continues."""

    text: str
    clip: Path | None


def read_prompts(path: Path) -> list[Prompt]:
    """Lines `prompt||clip` as in PA-VDM's test set, or a prompt alone; clips relative to the list or to here."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as text ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text, separator, name = (part.strip() for part in line.partition("||"))
        clip = None
        if separator:
            clip = next((there for there in (path.parent / name, Path(name)) if name and there.exists()), None)
            if clip is None:
                raise UserError(f"--prompts {path}, line {number}: no clip '{name}'; lines are prompt||clip")
        found.append(Prompt(text, clip))
    if not found:
        raise UserError(f"--prompts {path}: holds no prompts; lines are prompt||clip, or a prompt alone")
    return found


def text_features(path: Path, config: Config, space: LatentSpace) -> Tensor:
    """Text features [N, D] from a .npy file, as training saw them."""
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


def class_number(label: str, classes: list[str], config: Config) -> int:
    """The class of a name or a number."""
    count = config.model.num_classes
    if not count:
        raise UserError(f"--label {label}: the model was trained without classes (model.num_classes = 0)")
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < count:
        return int(label)
    raise UserError(f"--label {label}: must be a number below {count} or one of {', '.join(classes)}")


def is_picture(path: Path) -> bool:
    """Whether a clip is a single frame."""
    return path.suffix.lower() in PICTURES and path.is_file()


def encode_clip(path: Path, num_frames: int, config: Config, decoder: Decoder, option: str, *, end: bool) -> Tensor:
    """The first (`end`: the last) frames of a clip, or a picture, as latents of the model [num_frames, L, C]."""
    size = decoder.image_size
    if is_picture(path):
        if num_frames != 1:
            raise UserError(f"{option} {path}: a picture is one frame, but {num_frames} frames are asked for")
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{option} {path}: cannot be read as a picture ({error})") from error
        frames = [resize_and_crop(np.asarray(upright), size)]
    else:
        positions = prefix_positions(path, num_frames, decoder.space, config.data.stride, option)
        if end:
            last = (probe(path).num_frames or check(path).num_frames) - 1 - positions[-1]
            if last < 0:
                raise UserError(f"{option} {path}: has too few frames for {num_frames} at the model's frame rate")
            positions = [position + last for position in positions]
        frames = [resize_and_crop(frame, size) for _, frame in frames_at(path, positions)]
    return decoder.encode(np.stack(frames))[0]


def prefix_positions(path: Path, frames: int, space: LatentSpace, stride: int, option: str = "--prefix") -> list[int]:
    """Which frames of a clip follow one another as quickly as those of the training clips do."""
    if space.sampled_fps is None:
        return [k * space.stride * stride for k in range(frames)]
    step = probe(path).fps / Fraction(space.sampled_fps) * stride
    if step < 1:
        raise UserError(
            f"{option} {path}: has fewer frames per second than the training clips ({space.sampled_fps} / {stride})"
        )
    return [math.ceil(k * step - Fraction(1, 2)) for k in range(frames)]  # of two that are equally near, the earlier
