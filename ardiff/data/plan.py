"""The order of the data as a pure function of (seed, epoch, position).

A video of N frames gets max(1, N // clip length) visits per epoch, each with a crop of its own. Two orders, both
computed without a table of visits, so the state of a run is one number: the position.

- `global`: a true permutation of all visits, a Feistel network on their numbers (cycle-walking, Black and Rogaway
  2002). For data on local disks, or small enough for the cache.
- `lanes`: for data that every node fetches. The shards are permuted, their visits put in a row and the row cut into
  `lanes` equal parts (what is left over is dropped, another part each epoch). A batch takes equally many visits from
  every lane and a rank owns neighbouring lanes, so a node reads its own shards only, one after the other. Within a
  lane, windows of `window` visits are permuted. (After the canonical nodes of MosaicML's streaming.)
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
LANES, WINDOW = 256, 4096


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


class Places(NamedTuple):
    """Where samples stand in an order, as arrays [n]: the nth of a lane, from 0 (`global` has one lane only)."""

    lane: np.ndarray
    nth: np.ndarray
    position: np.ndarray


class Plan:
    """Which clip is read at which position, for clips of `num_frames` frames taken every `stride`-th.

    Raises UserError for an unknown order, and for `lanes` when there are fewer visits than lanes.
    """

    def __init__(
        self,
        manifest: ShardSet | Manifest | str | Path,
        seed: int,
        order: str = "global",
        num_frames: int = 16,
        stride: int = 1,
        lanes: int = LANES,
        window: int = WINDOW,
    ) -> None:
        if order not in ("global", "lanes"):
            raise UserError(f"data.order = '{order}' must be 'global' or 'lanes'")
        if isinstance(manifest, (str, Path)):
            manifest = read_manifest(Path(manifest))
        self.shards = shards = manifest if isinstance(manifest, ShardSet) else ShardSet(manifest)
        self.seed, self.num_frames, self.stride = seed, num_frames, stride
        self.lanes, self.window = (lanes, window) if order == "lanes" else (1, 0)
        self.order = f"lanes {lanes} window {window}" if order == "lanes" else order
        self._frames = shards.frames
        self._span = (num_frames - 1) * stride + 1  # frames of the video that a clip covers
        visits = np.maximum(1, self._frames // (num_frames * stride))
        self._visits_end = np.cumsum(visits)
        videos_end = np.searchsorted(shards.shard_of_video, np.arange(len(shards.manifest.shards)), side="right")
        self._shard_end = np.concatenate([[0], self._visits_end])[videos_end]  # visits of a shard are neighbours
        self._shard_visits = np.diff(self._shard_end, prepend=0)
        self.visits_per_lane = int(self._visits_end[-1]) // self.lanes
        if self.visits_per_lane < 1:
            raise UserError(
                f"{shards.source}: {self._visits_end[-1]} clips per epoch cannot fill data.lanes = {lanes}; use "
                "data.order = global or fewer lanes"
            )
        self._shard_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def visits_per_epoch(self) -> int:
        """Length of an epoch."""
        return self.visits_per_lane * self.lanes

    @property
    def num_short(self) -> int:
        """Videos shorter than a clip: they are padded, and the padding is masked in the loss."""
        return int((self._frames < self._span).sum())

    def visits(self, position: int, size: int) -> Visits:
        """The visits at positions position .. position + size - 1; epochs follow one another without a gap.

        With lanes both must be multiples of their number, and the visits are sorted by lane, so that cutting them into
        equal stretches gives each rank the lanes that it owns.
        """
        return self.at(places(position, size, self.lanes))

    def batch(self, position: int, size: int) -> list[Visit]:
        """As `visits`, one tuple each."""
        visits = self.visits(position, size)
        rows = zip(visits.video, visits.first_frame, visits.position, strict=True)
        return [Visit(int(video), int(first), int(place)) for video, first, place in rows]

    def at(self, where: Places) -> Visits:
        """The visits at these places of the order."""
        epoch, inside = np.divmod(where.nth, self.visits_per_lane)
        return self._clips(self._number(where.lane, epoch, inside), where.position)

    def substitute(self, where: Places, attempt: int) -> Visits:
        """Another visit for each place, from the same lane: a function of seed, position and attempt."""
        keys = hashed(self.seed, Stream.SUBSTITUTE, where.position * 4096 + attempt)
        inside = (keys % np.uint64(self.visits_per_lane)).astype(np.int64)
        epoch = where.nth // self.visits_per_lane
        return self._clips(self._number(where.lane, epoch, inside), where.position)

    def _clips(self, numbers: np.ndarray, positions: np.ndarray) -> Visits:
        """Visit numbers [n] -> videos, each with the crop of its position."""
        video = np.searchsorted(self._visits_end, numbers, side="right")
        choices = np.maximum(1, self._frames[video] - self._span + 1)
        first = (hashed(self.seed, Stream.CROP, positions) % choices.astype(np.uint64)).astype(np.int64)
        available = (self._frames[video] - first + self.stride - 1) // self.stride
        return Visits(video, first, positions, np.minimum(available, self.num_frames))

    def _number(self, lane: np.ndarray, epoch: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Number of the visit that stands at place `inside` of a lane in an epoch; all arrays [n]."""
        if not self.window:
            keys = hashed(self.seed, Stream.ORDER, epoch[:, None] * ROUNDS + np.arange(ROUNDS))
            return permute(inside, np.array([self.visits_per_epoch]), keys)
        window, place = np.divmod(inside, self.window)
        size = np.minimum(self.window, self.visits_per_lane - window * self.window)
        chunk = (epoch * self.lanes + lane) * (self.visits_per_lane // self.window + 1) + window
        keys = hashed(self.seed, Stream.ORDER, chunk[:, None] * ROUNDS + np.arange(ROUNDS))
        row = lane * self.visits_per_lane + window * self.window + permute(place, size, keys)
        numbers = np.empty(len(row), dtype=np.int64)
        for each in np.unique(epoch):
            order, ends = self._shard_order(int(each))
            chosen = epoch == each
            nth = np.searchsorted(ends, row[chosen], side="right")
            shard = order[nth]
            before_end = ends[nth] - row[chosen]
            numbers[chosen] = self._shard_end[shard] - before_end
        return numbers

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where their visits end in the row of all visits."""
        if epoch not in self._shard_orders:
            keys = hashed(self.seed, Stream.SHARDS, np.arange(len(self._shard_end)) + epoch * len(self._shard_end))
            order = np.argsort(keys, kind="stable")
            if len(self._shard_orders) > 4:
                self._shard_orders.pop(next(iter(self._shard_orders)))
            self._shard_orders[epoch] = (order, np.cumsum(self._shard_visits[order]))
        return self._shard_orders[epoch]


def places(position: int, size: int, lanes: int) -> Places:
    """Lane, index in it and global position of the samples position .. position + size - 1, sorted by lane.

    Position p is the (p // lanes)-th of lane p % lanes, whatever the batch size.
    """
    assert position % lanes == 0 and size % lanes == 0
    rounds = size // lanes
    lane = np.repeat(np.arange(lanes), rounds)
    nth = np.tile(position // lanes + np.arange(rounds, dtype=np.int64), lanes)
    return Places(lane, nth, nth * lanes + lane)


def permute(numbers: np.ndarray, counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Map numbers [n], each in 0..count-1, through the permutation of its row of uint64 keys [n, ROUNDS].

    counts [n] or [1]. Equal keys and counts give one permutation.
    """
    half = np.maximum(1, (np.frexp(np.maximum(counts - 1, 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    half = np.broadcast_to(half, numbers.shape)
    mask = (np.uint64(1) << half) - np.uint64(1)
    counts = np.broadcast_to(counts, numbers.shape)
    values = numbers.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):  # the network permutes a power of 4 >= count: walk on until inside
        left, right = values[todo] >> half[todo], values[todo] & mask[todo]
        with np.errstate(over="ignore"):
            for turn in range(keys.shape[1]):
                left, right = right, left ^ (mix(right + keys[todo, turn]) & mask[todo])
        values[todo] = (left << half[todo]) | right
        todo = todo[values[todo] >= counts[todo].astype(np.uint64)]
    return values.astype(np.int64)
