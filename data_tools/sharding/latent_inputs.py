"""What latents are extracted from: the videos of a corpus, or shards of pictures; and which shard each belongs to."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ardiff.data.corpus import SPLITS, classes, read_corpus
from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.shards import MANIFEST
from ardiff.errors import UserError
from ardiff.files import sha256
from data_tools.common import split_folder
from data_tools.sharding.decoding import PicturesItem, VideoItem
from data_tools.sharding.sampling import (
    Rate,
    Source,
    class_numbers,
    common_fps,
    fill,
    plan_shards,
    usable_at,
    video_info,
)
from data_tools.sharding.tasks import complete_shard

Size = Callable[[str, int], int]  # bytes of a sample in a shard, given its key and its number of frames
NAME_BYTES = 100  # of the name in a tar header


class Unit(Protocol):
    """What one process decodes in one pass for one shard: some samples of a video file or of a shard of pictures."""

    @property
    def path(self) -> str:
        """The file, for messages."""

    @property
    def frames(self) -> tuple[int, ...]:
        """How many frames each of its samples has."""

    @property
    def decoded(self) -> int:
        """How many frames are decoded: fewer than the samples have together where these overlap."""

    def places(self) -> list[np.ndarray]:
        """Per sample, which of the decoded frames belong to it, ascending: int64 [F]."""

    def item(self, size: int) -> VideoItem | PicturesItem:
        """What a decoding process is given."""

    def described(self) -> list[tuple[str, dict[str, Any]]] | None:
        """Key and description of each sample, where they are known before it is decoded."""


@dataclass(frozen=True)
class VideoUnit:
    """Segments of a video."""

    source: Source
    rate: Rate
    class_numbers: dict[str, int] = field(repr=False)

    @property
    def path(self) -> str:
        """The file, for messages."""
        return self.source.path

    @property
    def frames(self) -> tuple[int, ...]:
        """How many frames each of its samples has."""
        return tuple(self.rate.count(entry) for entry in self.source.segments)

    @property
    def decoded(self) -> int:
        """How many frames are decoded."""
        return len(self.source.positions(self.rate))

    def places(self) -> list[np.ndarray]:
        """Per sample, which of the decoded frames belong to it."""
        decoded = self.source.positions(self.rate)
        return [np.searchsorted(decoded, self.rate.positions(entry)) for entry in self.source.segments]

    def item(self, size: int) -> VideoItem:
        """What a decoding process is given."""
        return VideoItem(self.source, self.rate, size)

    def described(self) -> list[tuple[str, dict[str, Any]]]:
        """Key and description of each sample."""
        return [(entry.id, video_info(entry, self.class_numbers, self.rate)) for entry in self.source.segments]


@dataclass(frozen=True)
class PicturesUnit:
    """Samples of a shard of pictures, by their numbers in it."""

    path: str
    sha256: str = field(repr=False)
    samples: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def decoded(self) -> int:
        """How many frames are decoded."""
        return sum(self.frames)

    def places(self) -> list[np.ndarray]:
        """Per sample, which of the decoded frames belong to it."""
        ends = np.cumsum(self.frames)
        return [np.arange(end - length, end) for end, length in zip(ends, self.frames, strict=True)]

    def item(self, size: int) -> PicturesItem:
        """What a decoding process is given."""
        return PicturesItem(self.path, self.sha256, self.samples, self.frames, size)

    def described(self) -> None:
        """The shard itself describes them."""
        return


@dataclass(frozen=True)
class LatentTask:
    """One latent shard that is to be written."""

    folder: Path
    name: str
    split: str
    units: tuple[Unit, ...]

    @cached_property
    def samples(self) -> int:
        """How many samples it has if nothing is left out."""
        return sum(len(unit.frames) for unit in self.units)

    @cached_property
    def frames(self) -> int:
        """How many frames it has if nothing is left out."""
        return sum(sum(unit.frames) for unit in self.units)

    def finished(self) -> bool:
        """Whether an earlier run, or another process, has completed it."""
        return complete_shard(self.folder, self.name, self.samples) is not None


@dataclass
class Inputs:
    """All that there is to be encoded.

    settings: what it is, for the record in the output folder. details: per split, of the manifest. keys: of all
    samples. plan: gives the shards of `target` bytes per split. skipped: path -> why it cannot be had.
    """

    settings: dict[str, Any]
    details: dict[str, dict[str, Any]]
    classes: list[str]
    skipped: dict[str, str]
    keys: Callable[[], list[str]]
    plan: Callable[[Size, float], dict[str, list[tuple[Unit, ...]]]]

    def tasks(self, out: Path, size: Size, target: float) -> list[LatentTask]:
        """The shards of all splits, of about `target` bytes each."""
        return [
            LatentTask(split_folder(out, split), f"latents-{number:06d}", split, units)
            for split, shards in self.plan(size, target).items()
            for number, units in enumerate(shards)
        ]


def from_corpus(path: Path, rate: Rate) -> Inputs:
    """The ok videos of a corpus at a frame rate. Raises UserError."""
    corpus = read_corpus(path)
    entries, skipped = usable_at(path, corpus, rate)
    numbers = class_numbers(corpus)
    by_split = {split: [entry for entry in entries if entry.split == split] for split in SPLITS}
    by_split = {split: chosen for split, chosen in by_split.items() if chosen}
    common = {**rate.as_json(), "corpus_sha256": sha256(path)}
    details = {}
    for split, chosen in by_split.items():
        fps = common_fps(chosen, rate)
        details[split] = {**common, "fps": float(fps) if fps else None}

    def plan(size: Size, target: float) -> dict[str, list[tuple[Unit, ...]]]:
        return {
            split: [
                tuple(VideoUnit(source, rate, numbers) for source in sources)
                for sources in plan_shards(chosen, lambda entry: size(entry.id, rate.count(entry)), target)
            ]
            for split, chosen in by_split.items()
        }

    return Inputs(common, details, classes(corpus), skipped, lambda: [entry.id for entry in entries], plan)


def from_frames(folder: Path, image_size: int, named: bool) -> Inputs:
    """The samples of a folder of shards of pictures, in their order; splits as they lie there.

    `named` tells whether the keys of the samples are wanted. Raises UserError, also when the pictures are not of
    `image_size`.
    """
    found = {"train": open_shards(folder, "frames")}
    for split in SPLITS[1:]:
        if (folder / split / MANIFEST).is_file():
            found[split] = open_shards(folder / split, "frames")
    for shards in found.values():
        size = shards.manifest.details["size"]
        if size != image_size:
            raise UserError(
                f"--frames {shards.manifest.folder}: pictures of {size} x {size}, but the AR-VAE is for {image_size} x "
                f"{image_size}; shard the videos again with --size {image_size}"
            )
    details = {split: _details(shards) for split, shards in found.items()}
    digest = hashlib.sha256()
    for shards in found.values():
        digest.update(bytes.fromhex(sha256(shards.manifest.folder / MANIFEST)))
    keys = {split: _keys(shards) if named else [""] * len(shards) for split, shards in found.items()}

    def plan(size: Size, target: float) -> dict[str, list[tuple[Unit, ...]]]:
        return {split: _plan_pictures(shards, keys[split], size, target) for split, shards in found.items()}

    return Inputs(
        {"frames_sha256": digest.hexdigest()},
        details,
        found["train"].manifest.classes,
        {},
        lambda: [key for of_split in keys.values() for key in of_split],
        plan,
    )


def _details(shards: ShardSet) -> dict[str, Any]:
    """What is taken over from the manifest of pictures."""
    details = shards.manifest.details
    try:
        fps = float(Fraction(details["fps"])) if details.get("fps") else None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{shards.manifest.folder / MANIFEST}: fps {details['fps']!r} is not a frame rate") from error
    return {
        "stride": details.get("stride", 1),
        "sampled_fps": details.get("sampled_fps"),
        "fps": fps,
        "corpus_sha256": details.get("corpus_sha256"),
    }


def _plan_pictures(shards: ShardSet, keys: Sequence[str], size: Size, target: float) -> list[tuple[Unit, ...]]:
    """Shards of pictures are taken in turn, whole where a latent shard can hold them."""
    first = np.searchsorted(shards.shard_of_video, np.arange(len(shards.manifest.shards) + 1))
    groups = [range(low, high) for low, high in itertools.pairwise(first)]

    def unit(videos: list[int]) -> PicturesUnit:
        number = int(shards.shard_of_video[videos[0]])
        entry = shards.manifest.shards[number]
        return PicturesUnit(
            str(shards.manifest.folder / entry.file),
            entry.sha256,
            tuple(int(video - first[number]) for video in videos),
            tuple(int(shards.frames[video]) for video in videos),
        )

    planned = fill(groups, lambda video: size(keys[video], int(shards.frames[video])), target)
    return [tuple(unit(part) for part in parts) for parts in planned]


def _keys(shards: ShardSet) -> list[str]:
    """The keys of all samples, from the tar header before the first picture of each."""
    keys = []
    for number, entry in enumerate(shards.manifest.shards):
        path = shards.manifest.folder / entry.file
        with path.open("rb") as stream:
            for video in np.flatnonzero(shards.shard_of_video == number):
                header = shards.place_of(int(video))[1] - 512
                name = os.pread(stream.fileno(), NAME_BYTES, header)
                keys.append(name.partition(b".")[0].decode("ascii", "replace"))
    return keys
