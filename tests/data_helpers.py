"""What several test files share: small data sets on disk, networks that are not at their zero start, chi-square."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ardiff.data.shards import Manifest, Moments, Sample, encode_array, write_manifest, write_shard

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
CLASSES = ("run", "sit", "wave")
LENGTHS = ((5, 1, 16), (20, 7), (33, 2, 1, 9))  # frames of every video of every shard


def latents_of(video: int, length: int, tokens: int, channels: int) -> np.ndarray:
    """The latents [N, L, C] of a video of the test data set."""
    return np.random.default_rng(video).normal(0.3, 2.0, (length, tokens, channels)).astype(np.float16)


def class_of(video: int) -> int | None:
    """Every fourth video has no label."""
    return None if video % 4 == 3 else video % 3


def latent_samples(first_video: int, lengths: Sequence[int], tokens: int, channels: int) -> Iterator[Sample]:
    """The samples of one shard."""
    for video, length in enumerate(lengths, first_video):
        info = {"id": f"{video:06d}", "num_frames": length, "fps": "25/1", "class": class_of(video)}
        array = latents_of(video, length, tokens, channels)
        yield Sample(f"{video:06d}", info, {"latents.npy": encode_array(array)})


def write_latents(
    folder: Path, lengths: Sequence[Sequence[int]] = LENGTHS, tokens: int = 2, channels: int = 4
) -> Manifest:
    """A folder of latent shards latents-000000.tar, ... with its manifest."""
    shards, first_video = [], 0
    for number, part in enumerate(lengths):
        moments = Moments(channels)
        for video, length in enumerate(part, first_video):
            moments.add(latents_of(video, length, tokens, channels))
        samples = latent_samples(first_video, part, tokens, channels)
        shards.append(write_shard(folder, f"latents-{number:06d}", samples, moments))
        first_video += len(part)
    mean, std = Moments.merge(shard.statistics for shard in shards)
    arvae = {"id": "0" * 16, "path": "nowhere"}
    details = {"tokens": tokens, "channels": channels, "mean": mean, "std": std, "fps": 25.0, "arvae": arvae}
    return write_manifest(folder, "latents", shards, list(CLASSES), details)


def all_latents(lengths: Sequence[Sequence[int]] = LENGTHS, tokens: int = 2, channels: int = 4) -> list[np.ndarray]:
    """What `write_latents` wrote, video by video."""
    flat = itertools.chain.from_iterable(lengths)
    return [latents_of(video, length, tokens, channels) for video, length in enumerate(flat)]


def picture(video: int, frame: int, size: int) -> bytes:
    """One frame as JPEG; every frame of every video looks different."""
    y, x = np.mgrid[0:size, 0:size]
    channels = [(x * 7 + 31 * frame) % 256, (y * 9 + 53 * video) % 256, np.full_like(x, (40 * frame) % 256)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """A picture as uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_frames(folder: Path, lengths: Sequence[Sequence[int]] = ((3, 1), (6,)), size: int = 16) -> Manifest:
    """A folder of frame shards frames-000000.tar, ... with its manifest."""
    shards, first_video = [], 0
    for number, part in enumerate(lengths):
        samples = [
            Sample(
                f"{video:06d}",
                {"id": f"{video:06d}", "num_frames": length, "class": class_of(video)},
                {f"{frame:05d}.jpg": picture(video, frame, size) for frame in range(length)},
            )
            for video, length in enumerate(part, first_video)
        ]
        shards.append(write_shard(folder, f"frames-{number:06d}", samples))
        first_video += len(part)
    return write_manifest(folder, "frames", shards, list(CLASSES), {"size": size, "fps": "25/1"})


def randomize(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Random weights everywhere: a fresh DiT outputs zero, so no path through it could be seen."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic, as a share of its limit at p = 1e-6: below 1 the two agree.

    The limit is Wilson and Hilferty's approximation. Outcomes that are expected less than 5 times are pooled.
    """
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    if not freedom:
        return statistic  # one outcome only: every deviation is an error
    quantile = 4.753424  # of the normal distribution at 1 - 1e-6
    spread = 2 / (9 * freedom)
    return statistic / (freedom * (1 - spread + quantile * spread**0.5) ** 3)
