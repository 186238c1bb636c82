"""Folders of shards as the inspecting tools see them: found, and their manifests checked before they are relied on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from ardiff.data.corpus import SPLITS
from ardiff.data.shards import MANIFEST, Manifest, ShardEntry, read_manifest
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from data_tools.common import plural
from data_tools.inspection.manifest_checks import frames_per_second, manifest_faults

MAX_MANIFEST = 1 << 26  # some hundred thousand shards


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set: in which file, at which byte and in which sample where known, and what."""

    file: str
    reason: str
    offset: int | None = None
    key: str | None = None

    @classmethod
    def of(cls, error: ShardError) -> Problem:
        """The same as an error of the tar reader."""
        return cls(error.path, error.reason, error.offset)

    def __str__(self) -> str:
        place = self.file
        if self.offset is not None:
            place += f", byte {self.offset}"
        if self.key is not None:
            place += f", sample {self.key}"
        return printable(f"{place}: {self.reason}")


@dataclass(frozen=True)
class Place:
    """Where a manifest is to be found; `name` is "" for what the user named, else the split in a subfolder of it."""

    name: str
    file: Path
    chosen: tuple[str, ...] | None = None  # file names of tars; None: all that the manifest lists


@dataclass(frozen=True)
class Part:
    """One data set with a sound manifest: what the user named (name "") or the split in a subfolder of it."""

    name: str
    file: Path  # its manifest
    manifest: Manifest
    chosen: tuple[ShardEntry, ...]

    @property
    def folder(self) -> Path:
        """Where its shards lie."""
        return self.manifest.folder

    @property
    def whole(self) -> bool:
        """Whether all of its shards were chosen."""
        return len(self.chosen) == len(self.manifest.shards)


@dataclass(frozen=True)
class Rules:
    """What the manifest says that every sample must be."""

    kind: str
    classes: tuple[str, ...]
    tokens: int = 0
    channels: int = 0
    flipped: bool = False  # every sample has mirrored latents
    text_dim: int | None = None  # every sample has text features of this width
    size: int = 0
    arvae: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Rules:
        """The rules of a manifest in which `manifest_faults` finds nothing."""
        details, classes = manifest.details, tuple(manifest.classes)
        if manifest.kind == "frames":
            return cls("frames", classes, size=details["size"])
        return cls(
            "latents",
            classes,
            details["tokens"],
            details["channels"],
            details.get("flipped") is True,
            details.get("text_dim"),
            arvae=details["arvae"]["id"],
        )


@dataclass(frozen=True)
class ShardJob:
    """A shard that is to be checked."""

    folder: Path
    entry: ShardEntry
    rules: Rules
    fast: bool = False

    @property
    def tar(self) -> Path:
        """The shard itself."""
        return self.folder / self.entry.file

    @property
    def index(self) -> Path:
        """The index beside it."""
        return self.tar.with_suffix(".index.npy")

    @property
    def marker(self) -> Path:
        """The note that it is complete."""
        return self.tar.with_suffix(".done.json")


def jobs_of(parts: Sequence[Part], fast: bool = False) -> list[ShardJob]:
    """All chosen shards, part by part."""
    return [ShardJob(part.folder, entry, Rules.of(part.manifest), fast) for part in parts for entry in part.chosen]


def printable(text: str) -> str:
    """`text` on one line and without control characters: names and descriptions in shards may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def locate(source: str) -> list[Place]:
    """Where the manifests of `source` are: a folder, a manifest, or tars as a brace or glob pattern.

    A folder (or its manifest.json) stands for the data sets in its subfolders validation and test as well. Raises
    UserError when there is no such folder, manifest or tar.
    """
    path = Path(source)
    if path.suffix == ".tar":
        names = _expand(source)
        return [Place("", names[0].parent / MANIFEST, tuple(name.name for name in names))]
    if path.suffix == ".json" and path.name != MANIFEST:
        return [Place("", path)]
    folder = path.parent if path.name == MANIFEST else path
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder, manifest or tar files")
    places = [Place("", folder / MANIFEST)]
    for split in SPLITS[1:]:
        if (folder / split / MANIFEST).is_file() or next((folder / split).glob("*.tar"), None):
            places.append(Place(split, folder / split / MANIFEST))
    return places


def _expand(pattern: str) -> list[Path]:
    try:
        names = [Path(name) for name in braceexpand.braceexpand(pattern)]
    except ValueError as error:
        raise UserError(f"{pattern}: its braces do not match") from error
    if any(character in pattern for character in "*?["):
        names = sorted(match for name in names for match in name.parent.glob(name.name))
    if not names:
        raise UserError(f"{pattern}: no file matches")
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UserError(f"{pattern}: names {repeated.name} more than once")
    if len({name.parent for name in names}) > 1:
        raise UserError(f"{pattern}: shards of one folder at a time, please")
    return names


def open_part(place: Place) -> Part:
    """Read and check one manifest. Raises UserError when it is missing or not sound, or does not list a chosen tar."""
    if place.file.is_file() and place.file.stat().st_size > MAX_MANIFEST:
        raise UserError(f"{place.file}: larger than {MAX_MANIFEST >> 20} MiB, which no manifest is")
    try:
        manifest = read_manifest(place.file)
    except UserError as error:
        if not place.file.is_file():
            raise
        remedy = "the program that made the shards writes it anew and keeps them"
        raise UserError(printable(f"{error}; {remedy}")) from error
    faults = manifest_faults(manifest)
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(printable(f"{place.file}: {faults[0]}{more}; the program that made the shards writes it anew"))
    known = {entry.file: entry for entry in manifest.shards}
    chosen = known if place.chosen is None else dict.fromkeys(place.chosen)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"{place.file.parent / unknown[0]}: not among the {len(known)} shards that {place.file} lists")
    return Part(place.name, place.file, manifest, tuple(known[name] for name in chosen))


def open_parts(source: str) -> list[Part]:
    """All data sets of `source` (see `locate`). Raises UserError."""
    return [open_part(place) for place in locate(source)]


def rate_of(manifest: Manifest) -> float | None:
    """Frames per second of what lies in the shards, if all videos have the same."""
    return frames_per_second(manifest.details.get("fps"))


def total(entries: Sequence[ShardEntry]) -> str:
    """How much some shards hold, in words."""
    videos, frames = sum(entry.samples for entry in entries), sum(entry.frames for entry in entries)
    return f"{plural(videos, 'video')}, {plural(frames, 'frame')}, {plural(len(entries), 'shard')}"
