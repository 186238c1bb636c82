"""What is in a data set, by its manifest and indexes: a line per shard and a summary; or a line per sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.data.shards import ShardEntry
from ardiff.data.tar import Member
from data_tools.inspection.index_checks import check_index
from data_tools.inspection.sample_checks import JSON_MEMBER, MAX_JSON, parse_description
from data_tools.inspection.shard_checks import check_size, read_groups
from data_tools.inspection.shard_folders import Part, Problem, Rules, ShardJob, printable, rate_of, total

SHOWN_CLASSES = 20


@dataclass
class ShardLine:
    """One shard: its entry in the manifest and what is wrong with its files at first sight."""

    entry: ShardEntry
    problems: list[Problem]


@dataclass
class Listing:
    """One data set: its shards, and how many videos each class has ("" for those without one)."""

    part: Part
    shards: list[ShardLine] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """The listing as one object."""
        manifest, chosen = self.part.manifest, self.part.chosen
        details = {name: value for name, value in manifest.details.items() if name not in ("mean", "std")}
        shards = [
            {
                "file": line.entry.file,
                "samples": line.entry.samples,
                "frames": line.entry.frames,
                "bytes": line.entry.bytes,
                "problems": [f"{Path(problem.file).name}: {problem.reason}" for problem in line.problems],
            }
            for line in self.shards
        ]
        return {
            "folder": str(self.part.folder),
            "kind": manifest.kind,
            "videos": sum(entry.samples for entry in chosen),
            "frames": sum(entry.frames for entry in chosen),
            "seconds": self.seconds,
            "classes": dict(self.classes),
            "details": details,
            "shards": shards,
        }

    @property
    def seconds(self) -> float | None:
        """Running time of all videos, if they have one frame rate."""
        rate = rate_of(self.part.manifest)
        return sum(entry.frames for entry in self.part.chosen) / rate if rate else None

    def lines(self) -> Iterator[str]:
        """The listing as a table and a summary."""
        width = max(4, *(len(line.entry.file) for line in self.shards))
        yield f"{self.part.folder}"
        yield f"  {'file':{width}}  {'samples':>8}  {'frames':>9}  {'MB':>9}  state"
        for line in self.shards:
            entry = line.entry
            state = "; ".join(f"{Path(problem.file).name} {problem.reason}" for problem in line.problems) or "ok"
            numbers = f"{entry.samples:>8}  {entry.frames:>9}  {entry.bytes / 1e6:>9.2f}"
            yield printable(f"  {entry.file:{width}}  {numbers}  {state}")
        yield printable(f"  {self.summary()}")

    def summary(self) -> str:
        """One line about the whole."""
        manifest = self.part.manifest
        parts = [f"{manifest.kind}: {total(self.part.chosen)}"]
        if self.seconds is not None:
            parts.append(f"{duration(self.seconds)} at {rate_of(manifest):.6g} frames per second")
        if manifest.kind == "latents":
            details = manifest.details
            parts.append(f"{details['tokens']} tokens x {details['channels']} channels")
            parts.append(f"AR-VAE {details['arvae']['id']}")
        else:
            parts.append(f"{manifest.details['size']} x {manifest.details['size']} pixels")
        return f"{', '.join(parts)}; {describe_classes(self.classes, len(manifest.classes))}"


@dataclass(frozen=True)
class Described:
    """A sample as it describes itself; its members by extension, with their places in the tar."""

    key: str
    info: dict[str, Any]
    members: dict[str, Member]


def list_shards(part: Part) -> Listing:
    """The shards of one data set, with the state of their files (see `check_index` and `check_size`)."""
    result, rules = Listing(part), Rules.of(part.manifest)
    for entry in part.chosen:
        job, line = ShardJob(part.folder, entry, rules), ShardLine(entry, [])
        check_size(job, line.problems)
        rows = check_index(job, line.problems)
        if rows is not None and not line.problems:
            _, first = np.unique(rows["sample"], return_index=True)
            labels, counts = np.unique(rows["label"][first], return_counts=True)
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                result.classes["" if label < 0 else rules.classes[label]] += count
        result.shards.append(line)
    return result


def read_descriptions(tar: Path) -> Iterator[Described]:
    """What a shard says of its samples, without reading them; {} for one that cannot be read.

    Raises ShardError where the tar cannot be read on, OSError when it cannot be read at all.
    """
    with tar.open("rb") as stream:
        for group in read_groups(stream, tar):
            members = {member.extension: member for member in group}
            info: dict[str, Any] = {}
            text = members.get(JSON_MEMBER)
            if text is not None and text.size <= MAX_JSON:
                stream.seek(text.offset)
                try:
                    info = parse_description(stream.read(text.size))
                except ValueError:
                    info = {}
            yield Described(group[0].key, info, members)


def sample_row(sample: Described, classes: Sequence[str]) -> dict[str, Any]:
    """What a listing shows of a sample."""
    label = sample.info.get("class")
    plain = {name: sample.info.get(name) for name in ("num_frames", "caption", "path")}
    plain = {name: value if isinstance(value, (str, int)) else None for name, value in plain.items()}
    return {
        "key": sample.key,
        "frames": plain["num_frames"],
        "class": classes[label] if isinstance(label, int) and 0 <= label < len(classes) else None,
        "caption": plain["caption"],
        "source": plain["path"],
    }


def describe_classes(counts: Counter[str], listed: int) -> str:
    """How many videos the classes have, the most frequent first."""
    if not listed:
        return "no classes"
    named = [(name, count) for name, count in counts.most_common() if name]
    shown = [f"{name} {count:,}" for name, count in named[:SHOWN_CLASSES]]
    if len(named) > SHOWN_CLASSES:
        shown.append(f"{len(named) - SHOWN_CLASSES} more")
    if counts[""]:
        shown.append(f"without one {counts['']:,}")
    words = "1 class" if listed == 1 else f"{listed:,} classes"
    return f"{words} ({', '.join(shown)})"


def duration(seconds: float) -> str:
    """A running time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
