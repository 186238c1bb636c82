"""What a video and a frame of it are, whether they come from a file or from a folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ardiff.errors import UserError


class VideoError(UserError):
    """A video that cannot be used: `path` and `reason` (one line, without the path)."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. Width and height are as displayed (a phone's rotation applied), fps is the average."""

    codec: str
    width: int
    height: int
    fps: Fraction
    num_frames: int  # declared by the container (0: it does not say) or, from `check`, decoded


class Frame(Protocol):
    """One frame as the decoder gives it, converted only when asked."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as displayed."""

    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""

    def thumbnail(self, side: int) -> np.ndarray:
        """uint8 RGB [H, W, 3], scaled down so that neither side is longer than `side`."""


def resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """Scale uint8 [H, W, 3] to a shorter side of `size` (antialiased bicubic); crop the centre square."""
    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    scale = size / min(height, width)
    new_width, new_height = max(size, round(width * scale)), max(size, round(height * scale))
    image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a thumbnail neither side of which is longer than `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
