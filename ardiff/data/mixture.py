"""Several data sets as one: which set a sample comes from follows from its position, in fixed proportions.

The sets take turns as evenly as their weights allow (error diffusion in whole numbers), so every batch holds its share
of each, and how many samples of a set came before any position is known without counting. Every set keeps an order and
epochs of its own. Weights may change when a run is continued: the list of changes is part of its state.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ardiff.config import Config, Source
from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.plan import Places, Plan, Visits, places
from ardiff.data.remote import ShardCache
from ardiff.data.shards import Manifest, Moments
from ardiff.data.tar import ShardError
from ardiff.data.urls import split_credentials
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed

log = logging.getLogger("ardiff")
UNIT = 1 << 20  # weights are rounded to this fraction, and counts stay exact up to 2^43 samples


class Change(NamedTuple):
    """From this position on the sets are mixed with these weights."""

    position: int
    weights: list[float]


class Mixture:
    """The videos of all sets in a row, and the plan that visits them.

    frames [V] and labels [V] are as those of a `ShardSet`; classes are the names of all sets, in order of appearance.
    Raises UserError where the sets do not fit together.
    """

    def __init__(self, plans: Sequence[Plan], weights: Sequence[float]) -> None:
        assert len(plans) == len(weights) and plans
        self.plans, self.sets = list(plans), [plan.shards for plan in plans]
        self.lanes, self.order = plans[0].lanes, plans[0].order
        self.history = [Change(0, [float(weight) for weight in weights])]
        _check_equal(self.sets)
        self.classes: list[str] = list(dict.fromkeys(name for part in self.sets for name in part.manifest.classes))
        self.manifest = self._common_manifest()
        self.frames = np.concatenate([part.frames for part in self.sets])
        self.labels = np.concatenate([self._labels(part) for part in self.sets])
        self._first_video = np.cumsum([0, *(len(part) for part in self.sets)])
        identities = [part.identity for part in self.sets]
        self.identity = (
            identities[0] if len(identities) == 1 else hashlib.sha256(json.dumps(identities).encode()).hexdigest()
        )

    def __len__(self) -> int:
        return len(self.frames)

    def _common_manifest(self) -> Manifest:
        """What the manifests of all sets say together."""
        first = self.sets[0].manifest
        shards = [shard for part in self.sets for shard in part.manifest.shards]
        details = dict(first.details)
        if len(self.sets) > 1 and first.kind == "latents":
            details["mean"], details["std"] = Moments.merge(shard.statistics for shard in shards)
        rates = [part.manifest.details.get("fps") for part in self.sets]
        if len(set(rates)) > 1:
            log.warning("data.mixture: frame rates differ (%s per second)", ", ".join(map(str, rates)))
            details["fps"] = None
        if any("text_tokens" in part.manifest.details for part in self.sets):
            details["text_tokens"] = max(int(part.manifest.details.get("text_tokens", 0)) for part in self.sets)
        return Manifest(first.folder, first.kind, shards, self.classes, details)

    def _labels(self, part: ShardSet) -> np.ndarray:
        numbers = [self.classes.index(name) for name in part.manifest.classes]
        return np.array([*numbers, -1], dtype=np.int32)[part.labels]  # label -1, none, takes the last

    @property
    def source(self) -> str:
        """Where the data lie, for messages."""
        return ", ".join(part.source for part in self.sets)

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text."""
        return int(self.manifest.details.get("text_tokens", 0))

    @property
    def is_remote(self) -> bool:
        """Whether shards of any set have to be fetched."""
        return any(part.is_remote for part in self.sets)

    @property
    def visits_per_epoch(self) -> int:
        """Clips in one epoch of every set."""
        return sum(plan.visits_per_epoch for plan in self.plans)

    @property
    def num_short(self) -> int:
        """Videos shorter than a clip."""
        return sum(plan.num_short for plan in self.plans)

    def set_of(self, video: int) -> tuple[ShardSet, int]:
        """The set that a video belongs to, and its number in it."""
        number = int(np.searchsorted(self._first_video, video, side="right")) - 1
        return self.sets[number], video - int(self._first_video[number])

    def read_clips(
        self,
        out: np.ndarray,
        videos: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
        stride: int,
        flipped: np.ndarray,
    ) -> list[tuple[int, ShardError]]:
        """See `ShardSet.read_clips`."""
        if len(self.sets) == 1:
            return self.sets[0].read_clips(out, videos, first, count, stride, flipped)
        failed = []
        number = np.searchsorted(self._first_video, videos, side="right") - 1
        for each, part in enumerate(self.sets):
            rows = np.flatnonzero(number == each)
            if not len(rows):
                continue
            clips = np.zeros((len(rows), *out.shape[1:]), dtype=out.dtype)
            local = videos[rows] - self._first_video[each]
            found = part.read_clips(clips, local, first[rows], count[rows], stride, flipped[rows])
            out[rows] = clips
            failed += [(int(rows[row]), error) for row, error in found]
        return failed

    def read_frames(self, video: int, first: int, count: int, stride: int = 1, flipped: bool = False) -> np.ndarray:
        """See `ShardSet.read_frames`."""
        part, local = self.set_of(video)
        return part.read_frames(local, first, count, stride, flipped)

    def read_text(self, video: int) -> np.ndarray:
        """See `ShardSet.read_text`."""
        part, local = self.set_of(video)
        return part.read_text(local)

    def place_of(self, video: int) -> tuple[str, int]:
        """See `ShardSet.place_of`."""
        part, local = self.set_of(video)
        return part.place_of(local)

    def key_of(self, video: int) -> str:
        """See `ShardSet.key_of`."""
        part, local = self.set_of(video)
        return part.key_of(local)

    def prepare(self, videos: np.ndarray) -> None:
        """Bring the shards of these videos into the cache, in the order of their first use."""
        for video in videos:
            part, local = self.set_of(int(video))
            part.prepare(local)

    def visits(self, position: int, size: int) -> Visits:
        """The clips at positions position .. position + size - 1; see `Plan.visits`."""
        return self._gather(places(position, size, self.lanes), None)

    def substitutes(self, positions: np.ndarray, attempt: int) -> Visits:
        """Other clips for the samples at these positions [n], from the same sets and lanes."""
        return self._gather(Places(positions % self.lanes, positions // self.lanes, positions), attempt)

    def _gather(self, where: Places, attempt: int | None) -> Visits:
        if len(self.plans) == 1:
            plan = self.plans[0]
            return plan.at(where) if attempt is None else plan.substitute(where, attempt)
        number, own = self._assign(where)
        result = Visits(*(np.empty(len(number), dtype=np.int64) for _ in Visits._fields))
        for each, plan in enumerate(self.plans):
            chosen = number == each
            if not chosen.any():
                continue
            there = Places(where.lane[chosen], own[chosen], where.position[chosen])
            visits = plan.at(there) if attempt is None else plan.substitute(there, attempt)
            for column, values in zip(result, visits, strict=True):
                column[chosen] = values
            result.video[chosen] += self._first_video[each]
        return result

    def _assign(self, where: Places) -> tuple[np.ndarray, np.ndarray]:
        """Which set each place belongs to, and its index in that set's own lane [n] each."""
        number = np.zeros(len(where.lane), dtype=np.int64)
        own = np.zeros_like(number)
        lanes = np.arange(self.lanes)
        before = np.zeros((len(self.plans), self.lanes), dtype=np.int64)  # of each set and lane, at the change
        starts = [change.position // self.lanes for change in self.history]
        for start, end, change in zip(starts, [*starts[1:], None], self.history, strict=True):
            inside = (where.nth >= start) & (True if end is None else where.nth < end)
            if inside.any():
                lane, index = where.lane[inside], where.nth[inside]
                number[inside], count = _turns(index - start, lane, change.weights)
                own[inside] = before[number[inside], lane] + count
            if end is not None:
                before += _counts(np.full(self.lanes, end - start), lanes, change.weights)
        return number, own

    def continue_with(self, history: Sequence[Sequence], position: int) -> bool:
        """Take over the changes of a run up to `position`, where this run's weights begin; True if they are new."""
        weights = self.history[-1].weights
        before = [Change(int(at), [float(weight) for weight in old]) for at, old in history if at <= position]
        self.history = before or [Change(0, weights)]
        changed = shares(self.history[-1].weights) != shares(weights)
        if changed and self.history[-1].position == position:
            self.history.pop()
        if changed:
            self.history.append(Change(position, weights))
        return changed

    def check(self, global_batch_size: int, world_size: int, batch: str = "train.global_batch_size") -> None:
        """Refuse batches that the data or the order cannot give, with the arithmetic. Raises UserError.

        batch: what the number of clips in a batch is called.
        """
        if self.visits_per_epoch < global_batch_size:
            raise UserError(
                f"{self.source}: {len(self)} videos give {self.visits_per_epoch} clips per epoch, fewer than "
                f"{batch} = {global_batch_size}; use more data or a smaller batch"
            )
        for plan, share in zip(self.plans, shares(self.history[-1].weights), strict=True):
            if plan.visits_per_epoch < share * global_batch_size:
                raise UserError(
                    f"data.mixture: {plan.shards.source} gives {plan.visits_per_epoch} clips per epoch, fewer than its "
                    f"share of a batch, {share:.3g} x {global_batch_size}; give it less weight"
                )
        if self.lanes > 1 and (global_batch_size % self.lanes or self.lanes % world_size):
            fitting = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise UserError(
                f"data.order = lanes: {batch} = {global_batch_size} must be a multiple of data.lanes = {self.lanes}, "
                f"and the {world_size} ranks one of {', '.join(map(str, fitting))}"
            )


def open_data(config: Config, kind: str, num_frames: int) -> Mixture:
    """Open what `config.data` names, for clips of `num_frames` frames. Raises UserError, see `open_shards`."""
    data = config.data
    sources = data.mixture or [Source(data.shards or "")]
    cache = ShardCache(Path(data.cache_dir), int(data.cache_gb * 1e9)) if data.cache_dir else None
    plans: list[Plan] = []
    for source in sources:
        name = split_credentials(source.shards)[0] if cache is None else cache.without_credentials(source.shards)
        shards = open_shards(name, kind, cache, data.verify)
        _check_distinct(name, shards.manifest)
        if data.flip_probability and not shards.has_flipped:
            raise UserError(
                f"data.flip_probability = {data.flip_probability}, but {name} has no latents of mirrored "
                "frames; extract them with data_tools.extract_latents --flip"
            )
        if config.model.context_dim and kind == "latents":
            width = shards.manifest.details.get("text_dim") if shards.has_text else None
            if width != config.model.context_dim:
                found = "no text features" if width is None else f"text features of width {width}"
                raise UserError(f"model.context_dim = {config.model.context_dim}, but {name} has {found}")
        # Sets of one size must not go through the same permutation in step.
        seed = (
            config.train.seed if not plans else int(hashed(config.train.seed, Stream.SETS, np.array([len(plans)]))[0])
        )
        plans.append(Plan(shards, seed, data.order, num_frames, data.stride, data.lanes, data.lane_window))
    if cache is not None:
        _check_cache(plans, cache)
    return Mixture(plans, [source.weight for source in sources])


def _check_distinct(source: str, manifest: Manifest) -> None:
    """Refuse a pattern that names a shard twice: its videos would be seen twice as often."""
    name, count = Counter(shard.file for shard in manifest.shards).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source}: names {name} {count} times; use data.mixture to give some videos more weight")


def _check_cache(plans: list[Plan], cache: ShardCache) -> None:
    """Tell of a cache that would fetch the same shards again and again."""
    shards = [(plan, shard) for plan in plans if plan.shards.is_remote for shard in plan.shards.manifest.shards]
    everything = sum(shard.bytes for _, shard in shards)
    if everything <= cache.limit:
        return
    lanes = plans[0].lanes
    if lanes == 1:
        log.warning(
            "%.1f GB of remote shards do not fit data.cache_gb = %g: with data.order = global nearly every clip "
            "fetches a shard; use data.order = lanes or a larger cache",
            everything / 1e9,
            cache.limit / 1e9,
        )
        return
    # A node has one shard open in each of its lanes, and fetches the next ones.
    nodes = max(1, int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))
    own = -(-lanes // nodes)
    needed = 2 * own * max(shard.bytes for _, shard in shards)
    if needed > cache.limit:
        log.warning(
            "data.cache_gb = %g holds less than two shards for each of the %d lanes of a node (%.1f GB): shards will "
            "be fetched several times; use fewer data.lanes, smaller shards or a larger cache",
            cache.limit / 1e9,
            own,
            needed / 1e9,
        )


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1."""
    return [weight / sum(weights) for weight in weights]


def _turns(index: np.ndarray, lane: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For the index-th samples of lanes [n]: whose turn it is, and how many turns that set had in the lane before.

    The first set takes its share of all turns, the second its share of the turns left, and so on.
    """
    number, count = np.full(len(index), len(weights) - 1), index.astype(np.int64)
    undecided = np.ones(len(index), dtype=bool)
    for each, share in enumerate(_units(weights)):
        phase = _phase(lane, each)
        before = (count * share + phase) // UNIT
        mine = undecided & ((count * share + share + phase) // UNIT > before)
        number[mine] = each
        count = np.where(mine, before, np.where(undecided, count - before, count))
        undecided &= ~mine
    return number, count


def _counts(index: np.ndarray, lane: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """How many of the first `index` samples of lanes [n] belong to each set: [sets, n]."""
    rest, found = index.astype(np.int64), []
    for each, share in enumerate(_units(weights)):
        taken = (rest * share + _phase(lane, each)) // UNIT
        found.append(taken)
        rest = rest - taken
    return np.stack([*found, rest])


def _units(weights: Sequence[float]) -> list[int]:
    """The share of every set but the last in what the sets before it leave, in units."""
    return [round(UNIT * weight / max(sum(weights[i:]), 1e-300)) for i, weight in enumerate(weights[:-1])]


def _phase(lane: np.ndarray, level: int) -> np.ndarray:
    """Where in a turn lanes begin, in units: spread out evenly, and otherwise for every set, so that the lanes of one
    batch hold the share of each (a Kronecker sequence: the square roots of primes are independent).
    """
    step = int(UNIT * math.sqrt(_prime(level)) % UNIT)
    return (lane * step + UNIT // 2) % UNIT


def _prime(number: int) -> int:
    """The prime of that number, from 0: 2, 3, 5, ..."""
    found = [2]
    while len(found) <= number:
        found.append(next(n for n in itertools.count(found[-1] + 1) if all(n % p for p in found)))
    return found[number]


def _check_equal(sets: Sequence[ShardSet]) -> None:
    """Refuse sets whose latents do not mean the same thing or whose pictures are of different sizes."""
    first = sets[0]
    for other in sets[1:]:
        for name in ("tokens", "channels", "size"):
            one, two = first.manifest.details.get(name), other.manifest.details.get(name)
            if one != two:
                raise UserError(f"data.mixture: {first.source} has {name} {one}, {other.source} has {two}")
        arvaes = [part.manifest.details.get("arvae") for part in (first, other)]
        ids = [arvae.get("id") if isinstance(arvae, dict) else arvae for arvae in arvaes]
        if ids[0] != ids[1]:
            raise UserError(
                f"data.mixture: {first.source} holds latents of AR-VAE {ids[0]}, {other.source} of {ids[1]}; extract "
                "one of them anew with the other's AR-VAE"
            )
