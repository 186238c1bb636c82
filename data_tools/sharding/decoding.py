"""What the decoding processes do: a video file, or a shard of pictures, becomes frames of the size of the AR-VAE.

Torch is not needed here and not imported: such a process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ardiff.data.tar import ShardError
from ardiff.files import sha256
from ardiff.video import VideoError, fingerprint, frames_at, resize_and_crop
from data_tools.sharding.sampling import Rate, Source

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow opens no others: for some it would start other programs
CHUNK_BYTES = 4 << 20  # what is sent at a time: large enough that sending costs little, small enough to be at hand soon


@dataclass(frozen=True)
class VideoItem:
    """Segments of a video file (or of a folder of pictures) that are wanted at a frame rate."""

    source: Source
    rate: Rate
    size: int


@dataclass(frozen=True)
class PicturesItem:
    """Samples of a shard of pictures that are wanted, by their numbers in it: ascending."""

    path: str
    sha256: str
    samples: tuple[int, ...]
    frames: tuple[int, ...]  # of each
    size: int


@dataclass(frozen=True)
class Chunk:
    """Some of an item's frames: from number `first` on, uint8 [F, S, S, 3]."""

    first: int
    frames: np.ndarray


@dataclass(frozen=True)
class Description:
    """What the shard says of wanted sample number `number`."""

    number: int
    key: str
    info: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why the item at hand cannot be used (one line)."""

    reason: str


Report = Callable[[Any], None]


def decode_item(item: VideoItem | PicturesItem, report: Report) -> None:
    """Report all frames of an item in order, as chunks, or the problem with it."""
    try:
        if isinstance(item, VideoItem):
            _report_chunks(_video_frames(item), item.size, report)
        else:
            _report_chunks(_pictures(item, report), item.size, report)
    except VideoError as error:
        report(Problem(error.reason))
    except ShardError as error:
        report(Problem(f"byte {error.offset}: {error.reason}"))


def unchanged(path: str, expected: str) -> Path:
    """The file of a corpus entry. Raises VideoError if it is not the one that was scanned."""
    source = Path(path)
    try:
        found = fingerprint(source)
    except OSError as error:
        raise VideoError(source, f"cannot be read ({error.strerror})") from error
    if found != expected:
        raise VideoError(source, "has changed since it was scanned; run data_tools.scan_videos again")
    return source


def _video_frames(item: VideoItem) -> Iterator[np.ndarray]:
    source = item.source
    for _, frame in frames_at(unchanged(source.path, source.sha256), source.positions(item.rate)):
        yield resize_and_crop(frame, item.size)


def _pictures(item: PicturesItem, report: Report) -> Iterator[np.ndarray]:
    from ardiff.data.shards import FRAME_MEMBER, read_samples

    path = Path(item.path)
    try:
        found = sha256(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from error
    if found != item.sha256:
        raise VideoError(path, "is not the shard that the manifest lists; copy it again or make it anew")
    wanted = dict(zip(item.samples, item.frames, strict=True))
    for number, sample in enumerate(read_samples(path)):
        if number not in wanted:
            continue
        pictures = [data for name, data in sorted(sample.members.items()) if FRAME_MEMBER.match(name)]
        if len(pictures) != wanted[number]:
            raise VideoError(path, f"sample {sample.key} has {len(pictures)} pictures, not {wanted[number]}")
        report(Description(number, sample.key, sample.info))
        for data in pictures:
            yield _picture(path, sample.key, data, item.size)


def _picture(path: Path, key: str, data: bytes, size: int) -> np.ndarray:
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        if picture.size != (size, size):  # before it is decoded: it may claim to be of any size
            raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels instead of {size} x {size}")
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise VideoError(path, f"a picture of {key} cannot be used ({error})") from error


def _report_chunks(frames: Iterable[np.ndarray], size: int, report: Report) -> None:
    length = max(1, CHUNK_BYTES // (3 * size * size))
    first, ready = 0, list[np.ndarray]()
    for frame in frames:
        ready.append(frame)
        if len(ready) == length:
            report(Chunk(first, np.stack(ready)))
            first, ready = first + length, []
    if ready:
        report(Chunk(first, np.stack(ready)))
