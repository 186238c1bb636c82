"""Writing frames as mp4, GIF or a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from ardiff.errors import UserError
from ardiff.files import replacing

SMPTE170M = 6  # ITU-T H.273 matrix coefficients: what swscale uses for RGB to YUV unless told otherwise


class Mp4Writer:
    """Writes frames as H.264 yuv420p, which every player shows, as they come. Atomic; equal frames, equal bytes.

    That pixel format needs even sides: an odd one is extended by repeating the last row or column. `crf` is
    x264's quality: smaller is better, 18 is about visually lossless. A context manager: the file appears at its end.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float | Fraction, crf: int = 16) -> None:
        self.path, self.height, self.width, self.crf = path, height, width, crf
        self.rate = Fraction(fps).limit_denominator(1001)
        if self.rate <= 0:
            raise UserError(f"{path}: cannot be written with {fps} frames per second")
        self._open = ExitStack()

    def __enter__(self) -> Mp4Writer:
        # x264 notes its number of threads in the file, so one that depends on the machine is not taken. Its macroblock
        # tree reads memory that it has not set where AVX-512 is used: equal frames would not give equal bytes.
        threads = "4" if self.height * self.width > 512 * 512 else "1"
        options = {"crf": str(self.crf), "threads": threads, "mbtree": "0"}
        with ExitStack() as opened:
            temporary = opened.enter_context(replacing(self.path))
            # The format is explicit because the temporary name does not end in .mp4.
            self._container = opened.enter_context(av.open(f"file:{temporary}", "w", format="mp4"))
            self._stream = self._container.add_stream("libx264", rate=self.rate, options=options)
            self._stream.height, self._stream.width = self.height + self.height % 2, self.width + self.width % 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.colorspace = SMPTE170M
            self._open = opened.pop_all()
        return self

    def add(self, frames: np.ndarray) -> None:
        """Append uint8 [F, H, W, 3]."""
        padding = ((0, self.height % 2), (0, self.width % 2), (0, 0))
        for frame in _as_frames(frames):
            even = np.ascontiguousarray(np.pad(frame, padding, mode="edge"))
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

    def __exit__(self, *error: Any) -> None:
        with self._open:
            if error[0] is None:
                self._container.mux(self._stream.encode(None))
            else:
                self._open.__exit__(*error)


def write_mp4(path: Path, frames: np.ndarray, fps: float | Fraction, crf: int = 16) -> None:
    """Write uint8 [F, H, W, 3] with an `Mp4Writer`."""
    height, width = _as_frames(frames).shape[1:3]
    with Mp4Writer(path, height, width, fps, crf) as writer:
        writer.add(frames)


def gif_bytes(frames: np.ndarray, fps: float | Fraction) -> bytes:
    """An endlessly looping GIF of uint8 [F, H, W, 3]; the format counts time in hundredths of a second."""
    images = [Image.fromarray(frame) for frame in _as_frames(frames)]
    buffer = io.BytesIO()
    duration = max(20, round(1000 / float(fps)))  # milliseconds; browsers slow down what is shorter
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
    return buffer.getvalue()


def contact_sheet(
    path: Path, videos: Sequence[np.ndarray], max_columns: int = 16, min_side: int = 96, gap: int = 2
) -> None:
    """Write a PNG with one row per video: uint8 [F, H, W, 3], all of one frame size.

    Longer videos are subsampled evenly to `max_columns` frames, the first and last included. Frames smaller
    than `min_side` pixels are enlarged by a whole factor, so that small ones can be seen.
    """
    rows = [_as_frames(video) for video in videos]
    if not rows or len({row.shape[1:] for row in rows}) != 1 or max_columns < 1:
        raise UserError(f"{path}: a contact sheet needs at least one column and video, all of one frame size")
    rows = [row[np.linspace(0, len(row) - 1, min(len(row), max_columns)).round().astype(int)] for row in rows]
    height, width = rows[0].shape[1:3]
    scale = max(1, -(-min_side // min(height, width)))
    height, width = height * scale, width * scale
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, 32, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = frame.repeat(scale, 0).repeat(scale, 1)
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _as_frames(frames: np.ndarray) -> np.ndarray:
    """Refuse what is not a video, before a library does so in words of its own."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not empty; found {frames.dtype} {frames.shape}")
    return frames
