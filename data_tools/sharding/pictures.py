"""Pictures from frames: how they are made, and about how many bytes they have."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ardiff.data.corpus import CorpusEntry
from ardiff.video import frames_at, resize_and_crop
from data_tools.pool import run_in_processes
from data_tools.sharding.sampling import Rate

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
MEASURED_VIDEOS = 16  # of which a picture is made to learn how many bytes pictures have
MEASURED_FRAME = 100  # at most: not the first one, which is often black, and not far to decode


@dataclass(frozen=True)
class FrameSettings:
    """How pictures are made; equal settings and sources give equal bytes."""

    size: int
    rate: Rate
    picture_format: str
    quality: int

    def as_json(self) -> dict[str, Any]:
        """For settings and manifests."""
        rest = {"size": self.size, "picture_format": self.picture_format, "quality": self.quality}
        return {**rest, **self.rate.as_json()}


def encode_picture(frame: np.ndarray, settings: FrameSettings) -> bytes:
    """Scale and crop a frame, uint8 [H, W, 3], and give the bytes of its file."""
    buffer = io.BytesIO()
    # Full chroma resolution: halving it a second time, after scaling down, would blur small coloured things.
    how = {"jpg": {"quality": settings.quality, "subsampling": 0}, "webp": {"quality": settings.quality}}
    image = Image.fromarray(resize_and_crop(frame, settings.size))
    image.save(buffer, format=FORMATS[settings.picture_format], **how.get(settings.picture_format, {}))
    return buffer.getvalue()


def picture_bytes(entries: Sequence[CorpusEntry], settings: FrameSettings, workers: int, timeout: float) -> int:
    """Bytes of an average picture, estimated from one picture each of a few videos."""
    mixed = sorted(entries, key=lambda entry: hashlib.sha256(entry.id.encode()).digest())[:MEASURED_VIDEOS]
    items = [(entry, settings) for entry in mixed]
    # The processes that write shards will be forked from the same server: it imports what they need as well.
    preload = ("data_tools.sharding.frame_shards",)
    events = run_in_processes(measure, items, min(workers, len(items)), timeout, preload)
    found = [event.value for event in events if isinstance(event.value, int)]
    # With no picture at all no video can be decoded, which will be told of each.
    return round(sum(found) / len(found)) if found else 3 * settings.size**2


def measure(item: tuple[CorpusEntry, FrameSettings], report: Callable[[int], None]) -> None:
    """Report the bytes of one picture of a video."""
    entry, settings = item
    positions = settings.rate.positions(entry)
    for _, frame in frames_at(Path(entry.path), [positions[min(len(positions) // 2, MEASURED_FRAME)]]):
        report(len(encode_picture(frame, settings)))
