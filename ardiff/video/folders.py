"""Folders of pictures as videos: PNG or JPEG, in the natural order of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ardiff.errors import UserError
from ardiff.video.frames import Frame, VideoError, VideoInfo, shrunk

PICTURES = frozenset((".png", ".jpg", ".jpeg"))
PICTURE_FORMATS = ("PNG", "JPEG")  # Pillow opens no others: for some it would start other programs


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, frame_2 before frame_10."""

    def natural(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", path.name)  # text and digits in turns, so that like meets like
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    found = (path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith("."))
    return sorted(found, key=natural)


def open_folder(path: Path, fps: Fraction) -> tuple[VideoInfo, Iterator[Frame]]:
    """What a folder of pictures is, and its frames. Raises VideoError when its first picture cannot be read."""
    if fps <= 0:
        raise UserError(f"{path}: cannot be shown with {fps} frames per second")
    try:
        pictures = pictures_in(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error})") from error
    if not pictures:
        raise VideoError(path, "cannot be opened as a video (a folder without PNG or JPEG pictures)")
    first = _Picture(path, pictures[0])
    size = first.size()
    info = VideoInfo(first.codec, *size, fps, len(pictures))
    return info, (_Picture(path, picture, size) for picture in pictures)


class _Picture:
    """A picture in a folder as a frame of a video; read and checked when something is first asked of it."""

    def __init__(self, folder: Path, file: Path, expected: tuple[int, int] | None = None) -> None:
        self.folder, self.file, self.expected = folder, file, expected
        self.codec = ""

    def size(self) -> tuple[int, int]:
        width, height = self._image.size
        return width, height

    def rgb(self) -> np.ndarray:
        return np.array(self._image)

    def thumbnail(self, side: int) -> np.ndarray:
        return np.array(self._image.resize(shrunk(self.size(), side), Image.Resampling.BOX))

    @cached_property
    def _image(self) -> Image.Image:
        try:
            with Image.open(self.file, formats=PICTURE_FORMATS) as opened:
                self.codec = (opened.format or "").lower()
                image: Image.Image = ImageOps.exif_transpose(opened)  # a phone's rotation
                if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # Pillow raises nearly anything when a picture is damaged
            raise VideoError(self.folder, f"picture {self.file.name} cannot be read ({error})") from error
        if self.expected not in (None, image.size):
            was, found = ("x".join(map(str, size)) for size in (self.expected or (), image.size))
            raise VideoError(self.folder, f"picture {self.file.name} changes the size from {was} to {found}")
        return image
