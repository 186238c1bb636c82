"""A mutated data set as training reads it: every clip is what it was, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.tar import ShardError


def read_for_training(folder: Path, kind: str) -> tuple[list[bytes], int]:
    """The bytes of everything that can be read, with checksums compared, and how many reads were refused.

    Raises UserError when the data set cannot be opened at all.
    """
    shards = open_shards(folder, kind, verify=True)
    good: list[bytes] = []
    refused = 0
    for video in range(len(shards)):
        for read in _reads(shards, video):
            try:
                array = read()
            except ShardError:
                refused += 1
                continue
            good.append(np.ascontiguousarray(array).tobytes())
    return good, refused


def _reads(shards: ShardSet, video: int) -> list:
    frames = int(shards.frames[video])
    if shards.manifest.kind == "frames":
        return [lambda frame=frame: shards.read_frames(video, frame, 1) for frame in range(min(frames, 100))]
    reads = [lambda: shards.read_latents(video, 0, min(frames, 1000))]
    if shards.has_flipped:
        reads.append(lambda: shards.read_latents(video, 0, min(frames, 1000), flipped=True))
    if shards.has_text:
        reads.append(lambda: shards.read_text(video))
    return reads
