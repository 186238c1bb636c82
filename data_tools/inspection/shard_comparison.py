"""What differs between two data sets: settings, classes, shards, videos, their content and what is said of them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ardiff.data.corpus import SPLITS
from ardiff.data.shards import Manifest
from ardiff.data.tar import ShardError
from data_tools.common import plural
from data_tools.inspection.index_checks import check_index
from data_tools.inspection.shard_folders import Part, Problem, ShardJob, jobs_of, open_parts, printable
from data_tools.inspection.shard_listing import read_descriptions
from data_tools.inspection.shard_workers import for_each_shard

SHOWN = 10  # videos named per difference; --json names all
FIELDS = ("class", "label", "caption", "fps", "stride", "num_frames", "width", "height", "path", "arvae")
OTHER_FIELDS = "other fields"


class Video(NamedTuple):
    """One sample, boiled down: what it was made of, its content and its description."""

    source: str  # sha256 and first frame of the source, or else the id
    key: str
    content: bytes  # digest of the checksums of its arrays or pictures
    description: tuple[int, ...]  # checksum per entry of FIELDS, and of all the rest


@dataclass
class Difference:
    """What differs in one split; empty where the two are equal."""

    split: str
    first: str  # folders
    second: str
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)  # lines
    shards: tuple[int, int, int] | None = None  # of the first, of the second, in common; None: all in common
    only_first: list[str] = field(default_factory=list)  # keys
    only_second: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)  # keys of common videos, in the second
    description: list[str] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)  # which fields of the description
    common: int = 0
    mean: float | None = None  # largest difference of a channel's means, in deviations of the first
    std: float | None = None  # largest ratio of a channel's deviations, less 1
    missing: str | None = None  # the folder that has no such split

    @property
    def found(self) -> bool:
        """Whether anything differs."""
        parts = (self.settings, self.classes, self.shards, self.only_first, self.only_second, self.content)
        return any(parts) or bool(self.description or self.mean or self.std or self.missing)

    def lines(self) -> Iterator[str]:
        """The differences in words."""
        if self.missing:
            yield f"{self.split}: not in {self.missing}"
            return
        if not self.found:
            yield f"{self.split}: equal, {plural(self.common, 'video')}"
            return
        for name, (one, other) in self.settings.items():
            yield printable(f"{self.split}: setting {name}: {json.dumps(one)} and {json.dumps(other)}")
        yield from (printable(f"{self.split}: {line}") for line in self.classes)
        if self.shards:
            yield f"{self.split}: {self.shards[0]} and {self.shards[1]} shards, {self.shards[2]} of them in common"
        for keys, what in (
            (self.only_first, f"only in {self.first}"),
            (self.only_second, f"only in {self.second}"),
            (self.content, f"of the {self.common} common ones with other content"),
            (self.description, f"of the {self.common} common ones with another description"),
        ):
            if keys:
                shown = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
                yield f"{self.split}: {plural(len(keys), 'video')} {what}: {shown}"
        if self.fields:
            counts = ", ".join(f"{name} {count}" for name, count in self.fields.most_common())
            yield f"{self.split}: descriptions differ in {counts}"
        if self.mean or self.std:
            moved = f"means differ by up to {self.mean:.3g} standard deviations, these by up to {self.std:.3g}"
            yield f"{self.split}: {moved} of the first's"


def compare(source: str, other: str, workers: int = 0, timeout: float = 600) -> tuple[list[Difference], list[Problem]]:
    """The differences per split, and what could not be read and was left out of the comparison.

    `workers` and `timeout` as in `for_each_shard`. Raises UserError when either is no data set.
    """
    ours = {part.name: part for part in open_parts(source)}
    theirs = {part.name: part for part in open_parts(other)}
    parts = [*ours.values(), *theirs.values()]
    jobs = jobs_of(parts)
    problems: list[Problem] = []
    videos: list[list[Video]] = [[] for _ in jobs]
    sizes = [job.entry.bytes for job in jobs]
    for outcome in for_each_shard(summarize_shard, jobs, sizes, workers, timeout, "reading"):
        if outcome.failure:
            problems.append(Problem(str(jobs[outcome.item].tar), f"could not be read: {outcome.failure}"))
        else:
            videos[outcome.item], found = outcome.value
            problems += found
    of_part: dict[int, list[Video]] = {}
    first = 0
    for part in parts:
        end = first + len(part.chosen)
        of_part[id(part)] = [video for shard in videos[first:end] for video in shard]
        first = end
    differences = []
    for name in ("", *SPLITS[1:]):
        one, two = ours.get(name), theirs.get(name)
        if one and two:
            differences.append(_difference(one, two, of_part[id(one)], of_part[id(two)]))
        elif one or two:
            missing = source if two else other
            differences.append(Difference(name or SPLITS[0], source, other, missing=missing))
    return differences, sorted(problems, key=str)


def summarize_shard(job: ShardJob, report: Callable[[Any], None]) -> None:
    """Boil down all samples of a shard: reports (videos, problems)."""
    problems: list[Problem] = []
    rows = check_index(job, problems)
    videos: list[Video] = []
    if rows is None or problems:
        report((videos, problems))
        return
    starts = np.searchsorted(rows["sample"], np.arange(job.entry.samples + 1))
    content = np.stack([rows[name].astype("<i8") for name in ("member", "frames", "crc32")], axis=1)
    try:
        for number, sample in enumerate(read_descriptions(job.tar)):
            info = sample.info
            part = content[starts[number] : starts[number + 1]] if number < job.entry.samples else content[:0]
            source = f"{info.get('sha256')}:{info.get('first_frame', 0)}" if info.get("sha256") else f"id {sample.key}"
            rest = {name: value for name, value in info.items() if name not in FIELDS}
            described = (*(_checksum(info.get(name)) for name in FIELDS), _checksum(rest))
            videos.append(Video(source, sample.key, hashlib.sha256(part.tobytes()).digest()[:16], described))
    except ShardError as error:
        problems.append(Problem.of(error))
    except OSError as error:
        problems.append(Problem(str(job.tar), f"cannot be read ({error.strerror})"))
    report((videos, problems))


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _difference(one: Part, two: Part, ours: Sequence[Video], theirs: Sequence[Video]) -> Difference:
    result = Difference(one.name or SPLITS[0], str(one.folder), str(two.folder))
    result.settings = _settings(one.manifest, two.manifest)
    result.classes = list(_classes(one.manifest.classes, two.manifest.classes))
    digests = [{entry.sha256 for entry in part.chosen} for part in (one, two)]
    if digests[0] != digests[1]:
        result.shards = (len(one.chosen), len(two.chosen), len(digests[0] & digests[1]))
    known, found = _by_source(ours), _by_source(theirs)
    result.only_first = sorted(video.key for source, video in known.items() if source not in found)
    for source, video in found.items():
        before = known.get(source)
        if before is None:
            result.only_second.append(video.key)
            continue
        result.common += 1
        if before.content != video.content:
            result.content.append(video.key)
        if before.description != video.description:
            result.description.append(video.key)
            names = (*FIELDS, OTHER_FIELDS)
            both = zip(names, before.description, video.description, strict=True)
            result.fields.update(name for name, first, second in both if first != second)
    for keys in (result.only_second, result.content, result.description):
        keys.sort()
    _compare_statistics(one.manifest, two.manifest, result)
    return result


def _by_source(videos: Sequence[Video]) -> dict[tuple[str, int], Video]:
    """Videos by what they were made of; copies of one source are numbered in the order of their keys."""
    result: dict[tuple[str, int], Video] = {}
    copies = Counter[str]()
    for video in sorted(videos, key=lambda video: video.key):
        result[video.source, copies[video.source]] = video
        copies[video.source] += 1
    return result


def _settings(one: Manifest, two: Manifest) -> dict[str, tuple[Any, Any]]:
    flat = [dict(_flat({**manifest.details, "kind": manifest.kind})) for manifest in (one, two)]
    names = sorted({*flat[0], *flat[1]})
    return {name: (flat[0].get(name), flat[1].get(name)) for name in names if flat[0].get(name) != flat[1].get(name)}


def _flat(details: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings with nested names; mean and std are compared as numbers."""
    for name, value in details.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", text) for inner, text in value.items())
        elif name not in ("mean", "std"):
            yield name, value


def _classes(one: list[str], two: list[str]) -> Iterator[str]:
    for here, there, which in ((one, two, "first"), (two, one, "second")):
        only = [name for name in here if name not in set(there)]
        if only:
            words = "1 class" if len(only) == 1 else f"{len(only):,} classes"
            yield f"{words} only in the {which}: {', '.join(only[:SHOWN])}"
    if one != two and sorted(one) == sorted(two):
        yield "the same classes are numbered in another order"


def _compare_statistics(one: Manifest, two: Manifest, result: Difference) -> None:
    details = one.details, two.details
    if {one.kind, two.kind} != {"latents"} or details[0]["channels"] != details[1]["channels"]:
        return
    mean, std = (np.array([detail[name] for detail in details]) for name in ("mean", "std"))
    if np.array_equal(mean[0], mean[1]) and np.array_equal(std[0], std[1]):
        return
    scale = np.maximum(std[0], 1e-12)
    result.mean = float((np.abs(mean[1] - mean[0]) / scale).max())
    result.std = float((np.abs(std[1] - std[0]) / scale).max())
