"""Which frames of a video are taken, and which videos share a shard: pure functions of the corpus and the settings."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from ardiff.data.corpus import CorpusEntry, classes, usable
from ardiff.errors import UserError

T = TypeVar("T")
TAR_BLOCK = 512
INFO_BYTES = 3 * TAR_BLOCK  # of the description of a sample in a tar, about


@dataclass(frozen=True)
class Rate:
    """Every `stride`-th frame of a segment or, with `fps`, the frames nearest to the times 0, 1 / fps, 2 / fps, ...

    The time of a source frame is its number divided by the frame rate that the corpus gives.
    """

    stride: int = 1
    fps: Fraction | None = None

    def problem(self, entry: CorpusEntry) -> str | None:
        """Why a video cannot be had at this rate: frames are never doubled, that would teach a model to stutter."""
        if self.fps is None or Fraction(entry.fps or 0) >= self.fps:
            return None
        return f"has {entry.fps} frames per second, fewer than --fps {self.fps}; choose a lower one, or --stride"

    def count(self, entry: CorpusEntry) -> int:
        """How many frames of a segment are taken."""
        if self.fps is None:
            return -(-entry.num_frames // self.stride)
        return (entry.num_frames - Fraction(1, 2)) // self._step(entry) + 1

    def positions(self, entry: CorpusEntry) -> list[int]:
        """Their positions in the source, ascending; of two frames that are equally near, the earlier one."""
        if self.fps is None:
            return list(range(entry.first_frame, entry.first_frame + entry.num_frames, self.stride))
        up, down = self._step(entry).as_integer_ratio()
        return [entry.first_frame - (down - 2 * k * up) // (2 * down) for k in range(self.count(entry))]

    def of_frames(self, entry: CorpusEntry) -> Fraction:
        """Frames per second of what is taken."""
        return self.fps or Fraction(entry.fps or 0) / self.stride

    def as_json(self) -> dict[str, Any]:
        """For settings and manifests; where `sampled_fps` is given, it says the rate and not `stride`."""
        return {"stride": self.stride, "sampled_fps": as_text(self.fps) if self.fps else None}

    def of_sample(self) -> dict[str, Any]:
        """For the description of a sample: its frame k was shown at k * stride / fps, or k / sampled_fps, seconds."""
        return {"sampled_fps": as_text(self.fps)} if self.fps else {"stride": self.stride}

    def _step(self, entry: CorpusEntry) -> Fraction:
        """Source frames per frame taken, at least 1."""
        assert self.fps is not None
        return Fraction(entry.fps or 0) / self.fps


def as_text(rate: Fraction) -> str:
    """A frame rate as corpora and manifests have it: "8/1", "30000/1001"."""
    return f"{rate.numerator}/{rate.denominator}"


def add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for which frames of a video are taken."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stride", type=int, metavar="N", help="take every n-th frame (default 1)")
    which.add_argument("--fps", metavar="X", help="take X frames per second, such as 8 or 30000/1001; slower videos "
                       "are left out")  # fmt: skip


def parse_rate(stride: int | None, fps: str | None) -> Rate:
    """The rate that the options --stride and --fps ask for. Raises UserError."""
    if fps is None:
        if stride is not None and stride < 1:
            raise UserError(f"--stride {stride}: must be at least 1")
        return Rate(stride or 1)
    rate = Fraction(fps) if re.fullmatch(r"\d{1,6}(\.\d{1,6}|/0*[1-9]\d{0,5})?", fps) else Fraction(0)
    if rate <= 0:
        raise UserError(f"--fps {fps}: must be a number or a fraction above 0, such as 8, 12.5 or 30000/1001")
    return Rate(fps=rate)


@dataclass(frozen=True)
class Source:
    """The segments of one video that lie in one shard, in the order of time: decoded in one pass."""

    path: str
    sha256: str
    segments: tuple[CorpusEntry, ...]

    def positions(self, rate: Rate) -> list[int]:
        """Positions of all frames that any of the segments needs, ascending and distinct."""
        if len(self.segments) == 1:
            return rate.positions(self.segments[0])
        return sorted({position for entry in self.segments for position in rate.positions(entry)})


def tar_bytes(payload: int) -> int:
    """Bytes that a member of that size takes in a tar."""
    return TAR_BLOCK - payload // -TAR_BLOCK * TAR_BLOCK


def plan_shards(
    entries: Iterable[CorpusEntry], size: Callable[[CorpusEntry], int], target: float
) -> list[list[Source]]:
    """Assign videos to shards of about `target` bytes, sources in mixed order so that no shard holds just one class.

    `size` is the bytes of a segment in a shard. The segments of a source share a shard if that can hold them.
    """
    by_source: dict[tuple[str, str], list[CorpusEntry]] = {}
    for entry in entries:
        by_source.setdefault((entry.path, entry.sha256 or ""), []).append(entry)
    groups = [sorted(group, key=lambda entry: (entry.first_frame, entry.id)) for group in by_source.values()]
    groups.sort(key=lambda group: hashlib.sha256(group[0].id.encode()).digest())
    shards = []
    for shard in fill(groups, size, target):
        sources = [Source(part[0].path, part[0].sha256 or "", tuple(part)) for part in shard]
        shards.append(sorted(sources, key=lambda source: source.segments[0].id))
    return shards


def fill(groups: Iterable[Sequence[T]], size: Callable[[T], int], target: float) -> list[list[list[T]]]:
    """Fill shards in turn with items of `size(item)` bytes; a group is only divided if it is larger than a shard.

    Returns, per shard, the parts of groups in it. A shard holds at least one item, however large.
    """
    shards: list[list[list[T]]] = []
    room = 0.0
    for group in groups:
        whole = sum(map(size, group)) <= target
        here: list[T] | None = None  # what of this group is in the shard at hand
        for part in [list(group)] if whole else [[item] for item in group]:
            needed = sum(map(size, part))
            if not shards or needed > room:
                shards.append([])
                room, here = target, None
            if here is None:
                here = []
                shards[-1].append(here)
            here.extend(part)
            room -= needed
    return shards


def usable_at(
    path: Path, corpus: Sequence[CorpusEntry], rate: Rate, max_frames: int | None = None
) -> tuple[list[CorpusEntry], dict[str, str]]:
    """The entries of the corpus at `path` that can be had at this rate, and path -> reason of the other ok ones.

    Raises UserError when none is left, or none to train on.
    """
    entries, skipped = list[CorpusEntry](), dict[str, str]()
    for entry in usable(path, corpus):
        problem = rate.problem(entry)
        if problem is None and max_frames is not None and rate.count(entry) > max_frames:
            problem = f"gives more than {max_frames} frames; choose a larger --stride, a lower --fps or scenes"
        if problem is None:
            entries.append(entry)
        else:
            skipped[entry.path] = problem
    if not entries:
        raise UserError(f"{path}: none of its videos can be used; the first {next(iter(skipped.values()))}")
    if not any(entry.split == "train" for entry in entries):
        raise UserError(f"{path}: no usable video is in the train split; none is left to train on")
    return entries, skipped


def class_numbers(corpus: Sequence[CorpusEntry]) -> dict[str, int]:
    """Label -> number, as `ardiff.data.corpus.classes` orders them."""
    places = {name: number for number, name in enumerate(classes(corpus))}
    given = {entry.label: entry.class_index for entry in corpus if entry.ok and entry.label is not None}
    return {label: places[label] if number is None else number for label, number in given.items()}


def common_fps(entries: Iterable[CorpusEntry], rate: Rate) -> Fraction | None:
    """Frames per second of what is taken, if it is the same for all videos."""
    rates = {rate.of_frames(entry) for entry in entries}
    return rates.pop() if len(rates) == 1 else None


def video_info(entry: CorpusEntry, class_numbers: dict[str, int], rate: Rate) -> dict[str, Any]:
    """The description of a sample; `fps`, `width` and `height` are the source's."""
    return {
        "id": entry.id,
        "path": entry.path,
        "sha256": entry.sha256,
        "fps": entry.fps,
        "first_frame": entry.first_frame,
        "width": entry.width,
        "height": entry.height,
        "label": entry.label,
        "class": None if entry.label is None else class_numbers[entry.label],
        "caption": entry.caption,
        "num_frames": rate.count(entry),
        **rate.of_sample(),
    }
