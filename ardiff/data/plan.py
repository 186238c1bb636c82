"""The order of the data as a pure function of (seed, epoch, position).

A video of N frames gets max(1, N // clip length) visits per epoch, each with a crop of its own. `global` order is a
true permutation of all visits: a Feistel network on their numbers (cycle-walking, Black and Rogaway 2002), so no table
is kept and the visit at any position is found at once. The state of a run is one number: the position.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ardiff.data.dataset import ShardSet
from ardiff.data.shards import Manifest, read_manifest
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed, mix

ROUNDS = 8


class Visit(NamedTuple):
    """One training clip: which video, from which frame, and its place in the order of the whole run."""

    video: int
    first_frame: int
    position: int


class Visits(NamedTuple):
    """Many visits as arrays [n]."""

    video: np.ndarray
    first_frame: np.ndarray
    position: np.ndarray
    num_frames: np.ndarray  # real frames of the clip; fewer than asked for where the video is shorter


class Plan:
    """Which clip is read at which position, for clips of `num_frames` frames taken every `stride`-th."""

    def __init__(
        self,
        manifest: ShardSet | Manifest | str | Path,
        seed: int,
        order: str = "global",
        num_frames: int = 16,
        stride: int = 1,
    ) -> None:
        if order != "global":
            raise UserError(f"data.order = '{order}' must be 'global'")
        if isinstance(manifest, (str, Path)):
            manifest = read_manifest(Path(manifest))
        shards = manifest if isinstance(manifest, ShardSet) else ShardSet(manifest)
        self.seed, self.num_frames, self.stride = seed, num_frames, stride
        self._frames = shards.frames
        self._span = (num_frames - 1) * stride + 1  # frames of the video that a clip covers
        visits = np.maximum(1, self._frames // (num_frames * stride))
        self._visits_end = np.cumsum(visits)

    @property
    def visits_per_epoch(self) -> int:
        """Length of an epoch."""
        return int(self._visits_end[-1])

    @property
    def num_short(self) -> int:
        """Videos shorter than a clip: they are padded, and the padding is masked in the loss."""
        return int((self._frames < self._span).sum())

    def visits(self, position: int, size: int) -> Visits:
        """The visits at positions position .. position + size - 1; epochs follow one another without a gap."""
        positions = np.arange(position, position + size, dtype=np.int64)
        epochs, places = np.divmod(positions, self.visits_per_epoch)
        numbers = np.empty(size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            numbers[chosen] = permute(places[chosen], self.visits_per_epoch, self.seed, int(epoch))
        video = np.searchsorted(self._visits_end, numbers, side="right")
        choices = np.maximum(1, self._frames[video] - self._span + 1)
        first = (hashed(self.seed, Stream.CROP, positions) % choices.astype(np.uint64)).astype(np.int64)
        available = (self._frames[video] - first + self.stride - 1) // self.stride
        return Visits(video, first, positions, np.minimum(available, self.num_frames))

    def batch(self, position: int, size: int) -> list[Visit]:
        """As `visits`, one tuple each."""
        visits = self.visits(position, size)
        rows = zip(visits.video, visits.first_frame, visits.position, strict=True)
        return [Visit(int(video), int(first), int(place)) for video, first, place in rows]


def permute(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Map places [n] in 0..count-1 through the permutation of (seed, epoch)."""
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = hashed(seed, Stream.ORDER, np.arange(ROUNDS) + np.int64(epoch) * ROUNDS)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # the network permutes a power of 4 >= count: walk on until inside
        left, right = values[outside] >> half, values[outside] & mask
        with np.errstate(over="ignore"):
            for key in keys:
                left, right = right, left ^ (mix(right + key) & mask)
        values[outside] = (left << half) | right
        outside[outside] = values[outside] >= count
    return values.astype(np.int64)
