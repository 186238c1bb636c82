"""Reading videos: what they are, their frames, and a fingerprint of their content."""

from __future__ import annotations

import errno
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.video.files import open_file
from ardiff.video.folders import open_folder, pictures_in
from ardiff.video.frames import Frame, VideoError, VideoInfo

FOLDER_FPS = 25  # of a folder of pictures, which does not say


def probe(path: Path, fps: Fraction | float = FOLDER_FPS) -> VideoInfo:
    """Read the headers and the first frame only. Raises VideoError when there is no readable video stream.

    `fps` is the frame rate of a folder of pictures; files say it themselves.
    """
    with _open(path, fps) as (info, frames):
        width, height = next(frames).size()
    return VideoInfo(info.codec, width, height, info.fps, info.num_frames)


def check(path: Path, fps: Fraction | float = FOLDER_FPS, visit: Callable[[Frame], object] | None = None) -> VideoInfo:
    """Decode the whole video strictly, without converting it; `num_frames` is the number of decoded frames.

    `visit` is called with every frame in order. Raises VideoError when anything is damaged, missing or changes its
    size midway; `fps` as in `probe`.
    """
    with _open(path, fps) as (info, frames):
        count, first_size = 0, (info.width, info.height)
        for frame in frames:
            size = frame.size()
            first_size = first_size if count else size
            if visit is not None:
                visit(frame)
            count += 1
    return VideoInfo(info.codec, *first_size, info.fps, count)


def decode(path: Path, first_frame: int = 0, num_frames: int | None = None, stride: int = 1) -> Iterator[np.ndarray]:
    """Iterate over every stride-th of the source frames first_frame ... first_frame + num_frames - 1.

    Yields uint8 RGB [H, W, 3], one at a time; memory does not grow with the length. Without `num_frames` all
    frames to the end, and then the count is compared with the declared one. Frames before `first_frame` are
    decoded and dropped, so that positions are exact in every file. Raises VideoError when the video is
    damaged or too short.
    """
    if first_frame < 0 or stride < 1 or (num_frames is not None and num_frames < 1):
        raise UserError(
            f"{path}: cannot take {num_frames} frames from {first_frame} with stride {stride}; "
            "the number and the stride must be at least 1, the first at least 0"
        )
    end = None if num_frames is None else first_frame + num_frames
    wanted = itertools.count(first_frame, stride) if end is None else range(first_frame, end, stride)
    for _, frame in _take(path, wanted, end):
        yield frame


def frames_at(path: Path, positions: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Iterate over (position, uint8 RGB [H, W, 3]) of the source frames at `positions`: sorted, distinct, from 0.

    One strict pass over the video serves them all and stops after the last one. Raises VideoError as `decode` does.
    """
    if any(first >= second for first, second in itertools.pairwise(positions)) or any(at < 0 for at in positions[:1]):
        raise ValueError("positions of frames must be sorted, distinct and at least 0")
    if len(positions):
        yield from _take(path, positions, positions[-1] + 1)


def fingerprint(path: Path) -> str:
    """Hex sha256 that changes with the content: of a file's bytes, or of the names and bytes of a folder's pictures.

    Raises OSError when something cannot be read or a folder holds no pictures.
    """
    if not path.is_dir():
        return sha256(path)
    pictures = pictures_in(path)
    if not pictures:
        raise FileNotFoundError(errno.ENOENT, "a folder without pictures", str(path))
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.name.encode("utf-8", "surrogateescape") + b"\0" + bytes.fromhex(sha256(picture)))
    return digest.hexdigest()


def _take(path: Path, wanted: Iterable[int], end: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames at the ascending positions `wanted`; stops after frame end - 1, which must exist."""
    ahead = iter(wanted)
    first = following = next(ahead)
    position = 0
    with _open(path) as (_, frames):
        for frame in frames:
            if position == following:
                yield position, frame.rgb()
                following = next(ahead, -1)
            position += 1
            if position == end:
                return
    if position <= first or end is not None:
        missing = first if end is None else end - 1
        raise VideoError(path, f"has {position} frames, so there is no frame {missing}")


@contextmanager
def _open(path: Path, fps: Fraction | float = FOLDER_FPS) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """What a file or a folder of pictures declares, and its frames in display order; `fps` is that of a folder."""
    if path.is_dir():
        yield open_folder(path, Fraction(fps).limit_denominator(1001))
        return
    with open_file(path) as opened:
        yield opened
