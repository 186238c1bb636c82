"""Samples on disk: mp4, GIF, PNG frames and npz, written as the frames come."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ardiff.files import replacing
from ardiff.video import Mp4Writer, gif_bytes

FORMATS = ("mp4", "gif", "png", "npz")
SHEET_COLUMNS = 16


class VideoOutput:
    """The files of one video of `num_frames` frames; a context manager, and the files are there at its end.

    mp4 and PNG are written frame by frame; GIF and npz need the whole video in memory. `sheet` keeps frames spread
    evenly over the video for the contact sheet.
    """

    def __init__(
        self, folder: Path, name: str, formats: Sequence[str], num_frames: int, size: tuple[int, int], fps: float
    ) -> None:
        self.folder, self.name, self.formats, self.fps, self.size = folder, name, formats, fps, size
        self.kept = set(np.linspace(0, num_frames - 1, min(num_frames, SHEET_COLUMNS)).round().astype(int).tolist())
        self.sheet: list[np.ndarray] = []
        self.num_frames = 0
        self._whole: list[np.ndarray] = []
        self._latents: list[np.ndarray] = []
        self._open = ExitStack()
        self._mp4: Mp4Writer | None = None

    @property
    def files(self) -> list[str]:
        """What is written, relative to the folder."""
        return [f"{self.name}/" if kind == "png" else f"{self.name}.{kind}" for kind in self.formats]

    def __enter__(self) -> VideoOutput:
        if "mp4" in self.formats:
            self._mp4 = self._open.enter_context(Mp4Writer(self.folder / f"{self.name}.mp4", *self.size, self.fps))
        if "png" in self.formats:
            (self.folder / self.name).mkdir(exist_ok=True)
            for old in (self.folder / self.name).glob("frame_*.png"):  # of a longer video
                old.unlink()
        return self

    def add(self, frames: np.ndarray, latents: np.ndarray) -> None:
        """The next frames uint8 [n, H, W, 3] and their latents [n, L, C]."""
        if self._mp4 is not None:
            self._mp4.add(frames)
        for i, frame in enumerate(frames, start=self.num_frames):
            if "png" in self.formats:
                with replacing(self.folder / self.name / f"frame_{i:06d}.png") as temporary:
                    Image.fromarray(frame).save(temporary, format="PNG")
            if i in self.kept:
                self.sheet.append(frame)
        if {"gif", "npz"} & set(self.formats):
            self._whole.append(frames)
        self._latents.append(latents.astype(np.float16))
        self.num_frames += len(frames)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            if "gif" in self.formats:
                self._write("gif", gif_bytes(np.concatenate(self._whole), self.fps))
            if "npz" in self.formats:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, frames=np.concatenate(self._whole), latents=self.latents)
                self._write("npz", buffer.getvalue())
        self._whole.clear()
        self._open.__exit__(*error)

    @property
    def latents(self) -> np.ndarray:
        """float16 [F, L, C] of all frames so far."""
        return np.concatenate(self._latents)

    def _write(self, kind: str, content: bytes) -> None:
        with replacing(self.folder / f"{self.name}.{kind}") as temporary:
            temporary.write_bytes(content)
