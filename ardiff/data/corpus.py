"""corpus.jsonl: which videos there are and which of them can be used, one JSON object per line.

Written by data_tools.scan_videos, read by every program that needs the sources. It may be edited by hand, for
captions, labels or splits, so reading checks every line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ardiff.errors import UserError
from ardiff.files import write_text

OK = "ok"
SPLITS = ("train", "validation", "test")
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class CorpusEntry:
    """One source video, or a segment of one: a scene. Only with status "ok" are the fields after it all meaningful.

    Segments of one file have its path and sha256 in common, and differ in id, first_frame and num_frames.
    """

    id: str  # digits, unique; the key of the video in shards
    path: str  # of a video file or of a folder of pictures
    status: str  # "ok" or the reason why the video is not used
    codec: str | None = None
    width: int = 0
    height: int = 0
    fps: str | None = None  # an exact fraction such as "30000/1001"
    first_frame: int = 0  # where the segment starts in the file
    num_frames: int = 0
    label: str | None = None  # name of the class
    caption: str | None = None
    split: str | None = None  # one of SPLITS; None for rejected videos
    sha256: str | None = None  # ardiff.video.fingerprint of the path; None when it cannot be read
    class_index: int | None = None  # the label's number, from 0, in a list of classes that was given
    duplicate_of: str | None = None  # id of the entry that this one looks nearly identical to
    perceptual_hash: str | None = None  # of a few of its frames; see data_tools.scanning.near_duplicates

    @property
    def ok(self) -> bool:
        """Whether the video is to be used."""
        return self.status == OK


def read_corpus(path: Path) -> list[CorpusEntry]:
    """All entries, rejected ones included, in the order of the file; relative paths count from its folder.

    Raises UserError, with the number of the line, for everything that is not a well-formed corpus.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it is made by data_tools.scan_videos") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    entries, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = parse_entry(line)
            if entry.id in seen:
                raise ValueError(f'id "{entry.id}" was already used in line {seen[entry.id]}')
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        seen[entry.id] = number
        entries.append(entry if Path(entry.path).is_absolute() else _rooted(entry, path.parent))
    if not entries:
        raise UserError(f"{path}: lists no videos")
    try:
        check_classes(entries)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return entries


def write_corpus(path: Path, entries: Iterable[CorpusEntry]) -> None:
    """Write all entries, atomically."""
    write_text(path, "".join(format_entry(entry) + "\n" for entry in entries))


def usable(path: Path, entries: Sequence[CorpusEntry], split: str | None = None) -> list[CorpusEntry]:
    """The ok entries (of one split). Raises UserError, naming the corpus `path`, when none is ok."""
    found = [entry for entry in entries if entry.ok]
    if not found:
        raise UserError(f"{path}: none of its {len(entries)} videos is usable; the status of each says why")
    return [entry for entry in found if split in (None, entry.split)]


def classes(entries: Iterable[CorpusEntry]) -> list[str]:
    """The names of the classes; a name's place in this list is its class number.

    The labels of the ok entries, sorted. Where they have a class_index that decides instead, and numbers that no
    entry has are called "class 7".
    """
    labels = {entry.label: entry.class_index for entry in entries if entry.ok and entry.label is not None}
    numbered = {index: label for label, index in labels.items() if index is not None}
    if not numbered:
        return sorted(labels)
    return [numbered.get(number, f"class {number}") for number in range(max(numbered) + 1)]


def check_classes(entries: Iterable[CorpusEntry]) -> None:
    """Raise ValueError unless the labelled ok entries have one class_index per label, or all of them none."""
    index_of, label_of = dict[str, int | None](), dict[int, str]()
    for entry in entries:
        if not entry.ok or entry.label is None:
            continue
        label, index = entry.label, entry.class_index
        if index_of.setdefault(label, index) != index:
            both = f"{json.dumps(index_of[label])} and {json.dumps(index)}"
            raise ValueError(f"label {label!r} has class_index {both} (id {entry.id})")
        if index is not None and label_of.setdefault(index, label) != label:
            raise ValueError(f"class_index {index} is that of {label_of[index]!r} and of {label!r} (id {entry.id})")
    without = next((label for label, index in index_of.items() if index is None), None)
    if without is not None and label_of:
        raise ValueError(f"label {without!r} has no class_index, but others have; give it to all labels or to none")


def format_entry(entry: CorpusEntry) -> str:
    """One line of the file, without the line break."""
    return json.dumps(asdict(entry))


def parse_entry(line: str) -> CorpusEntry:
    """The entry in one line. Raises ValueError that says what is wrong with it."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, found {line.strip()[:40]}")
    known = {item.name: item.type for item in fields(CorpusEntry)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; the fields are {', '.join(known)}")
    for name in ("id", "path", "status"):
        if not values.get(name):
            raise ValueError(f"field '{name}' is missing")
    for name, value in values.items():
        _check_type(name, value, str(known[name]))
    entry = CorpusEntry(**values)
    _check_values(entry)
    return entry


def _check_type(name: str, value: Any, declared: str) -> None:
    """`declared` is the annotation as text: "int", "str", "int | None" or "str | None"."""
    allowed: tuple[type, ...] = (int,) if declared.startswith("int") else (str,)
    if declared.endswith("None"):
        allowed += (type(None),)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise ValueError(f"field '{name}' must be {declared.replace('None', 'null')}, found {json.dumps(value)}")


def _check_values(entry: CorpusEntry) -> None:
    for name in ("id", "duplicate_of"):
        value = getattr(entry, name)
        if value is not None and not re.fullmatch(r"[0-9]{1,90}", value):
            raise ValueError(f"field '{name}' must be digits, found {value!r}")
    if not entry.ok:
        return
    if not entry.fps or not re.fullmatch(r"[1-9][0-9]*/[1-9][0-9]*", entry.fps):
        raise ValueError(f"field 'fps' must be a fraction such as \"25/1\", found {json.dumps(entry.fps)}")
    for name, low in (("width", 1), ("height", 1), ("num_frames", 1), ("first_frame", 0)):
        if getattr(entry, name) < low:
            raise ValueError(f"field '{name}' must be at least {low}, found {getattr(entry, name)}")
    if entry.split not in SPLITS:
        raise ValueError(f"field 'split' must be one of {', '.join(SPLITS)}, found {json.dumps(entry.split)}")
    if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256 or ""):
        raise ValueError("field 'sha256' must be the hex digest of the file")
    if entry.class_index is not None and (entry.label is None or not 0 <= entry.class_index < MAX_CLASSES):
        raise ValueError(f"field 'class_index' must belong to a label and be at least 0, found {entry.class_index}")


def _rooted(entry: CorpusEntry, folder: Path) -> CorpusEntry:
    return CorpusEntry(**{**asdict(entry), "path": str(folder / entry.path)})
