"""Lists of videos and of classes, as data sets bring them.

A list of videos is, by its extension:

- .csv with a header: a column `path`, `video` or `file`; if wanted `label`, `caption` (or `prompt`, `text`), `split`;
- .jsonl: one object per line with the same names;
- .txt: lines of `prompt||path`, of `path number` as UCF-101's trainlist01.txt, or of a path alone.

A list of classes has lines of `number name`, as UCF-101's classInd.txt, or of a name alone.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ardiff.data.corpus import SPLITS
from ardiff.errors import UserError
from ardiff.video import EXTENSIONS

LISTS = frozenset((".csv", ".jsonl", ".txt"))
COLUMNS = {
    "path": ("path", "video", "file"),
    "label": ("label",),
    "caption": ("caption", "prompt", "text"),
    "split": ("split",),
}
MANY = 5  # mistakes that one message names
SPLIT_NAMES = {**{name: name for name in SPLITS}, "val": "validation", "valid": "validation"}


@dataclass(frozen=True)
class Row:
    """One line of a list of videos. `path` is as written there, `number` that of a class."""

    line: int
    path: str
    label: str | None = None
    caption: str | None = None
    split: str | None = None
    number: int | None = None
    has_label_column: bool = False  # then a row without a label is meant to have none


@dataclass(frozen=True)
class ClassList:
    """The classes of a data set: their names by the numbers in the list, and their numbers counted from 0 by name."""

    path: Path
    names: dict[int, str]
    index: dict[str, int]

    def require(self, labels: Iterable[str]) -> None:
        """Raise UserError that names the labels which are no classes, each with the nearest class."""
        unknown = sorted(set(labels) - set(self.index))
        if unknown:
            some = (
                f"{label!r} (nearest: {difflib.get_close_matches(label, self.index, 1, 0)[0]!r})" for label in unknown
            )
            more = f" and {len(unknown) - MANY} more" if len(unknown) > MANY else ""
            raise UserError(f"--labels {self.path}: has no class {', '.join(islice(some, MANY))}{more}")


def read_list(path: Path) -> list[Row]:
    """All rows of a list of videos. Raises UserError with the number of the line for what cannot be understood."""
    read: dict[str, Callable[[Path, str], Iterator[Row]]] = {".csv": _csv, ".jsonl": _jsonl, ".txt": _txt}
    rows = list(read[path.suffix.lower()](path, _text(path)))
    if not rows:
        raise UserError(f"{path}: lists no videos")
    return rows


def read_classes(path: Path) -> ClassList:
    """Read a list of classes. Raises UserError with the number of the line for what is none."""
    names, lines = dict[int, str](), list(_lines(_text(path)))
    numbered = bool(lines) and all(re.fullmatch(r"[0-9]+\s+\S.*", text) for _, text in lines)
    for line, text in lines:
        number, name = len(names), text
        if numbered:
            digits, name = text.split(maxsplit=1)
            number = int(digits)
        if number in names or name in names.values():
            raise UserError(f"{path}, line {line}: class {text!r} is there twice")
        names[number] = name
    if not names:
        raise UserError(f"{path}: lists no classes; a line is such as '1 ApplyEyeMakeup'")
    first = min(names)
    if first > 1:
        raise UserError(f"{path}: the numbers of the classes begin with {first}, not with 0 or 1")
    return ClassList(path, names, {name: number - first for number, name in names.items()})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"{path}: cannot be read as a list ({reason})") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: dict[str, str] | None = None
    header: list[str] = []
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                header = [field.strip() for field in fields]
                columns = _columns(path, header)
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: has {len(fields)} fields, but the header has {len(header)}; "
                    'text with commas must be in "quotes"'
                )
            yield _row(path, reader.line_num, dict(zip(header, fields, strict=True)), columns)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is not csv ({error})") from error


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: must be a JSON object, found {line[:40]}")
        yield _row(path, number, values, _columns(path, values, number))


def _txt(path: Path, text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        prompt, bars, video = line.rpartition("||")
        if bars:
            yield _row(path, number, {"path": video, "caption": prompt}, {"path": "path", "caption": "caption"})
            continue
        numbered = re.fullmatch(r"(.*\S)\s+([0-9]+)", line)
        # A folder of pictures has no extension to tell: then a word before the number is enough.
        if numbered and (Path(numbered[1]).suffix.lower() in EXTENSIONS or not Path(line).suffix):
            yield Row(number, numbered[1], number=int(numbered[2]))
        else:
            yield Row(number, line)


def _columns(path: Path, names: Iterable[str], line: int = 1) -> dict[str, str]:
    """Which of the names hold what; the names are compared without regard to case."""
    found = dict[str, str]()
    for name in names:
        for meaning, known in COLUMNS.items():
            if name.strip().lower() in known:
                if meaning in found:
                    raise UserError(f"{path}, line {line}: both {found[meaning]!r} and {name!r} are a {meaning}")
                found[meaning] = name
    if "path" not in found:
        raise UserError(f"{path}, line {line}: none of {', '.join(COLUMNS['path'])} is there; found {', '.join(names)}")
    return found


def _row(path: Path, line: int, values: dict[str, Any], columns: dict[str, str]) -> Row:
    texts = dict[str, str | None]()
    for meaning, name in columns.items():
        value = values[name]
        if isinstance(value, int) and not isinstance(value, bool) and meaning == "label":
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}, line {line}: {name!r} must be text, found {json.dumps(value)[:40]}")
        texts[meaning] = (value or "").strip() or None
    if texts["path"] is None:
        raise UserError(f"{path}, line {line}: the path is empty")
    split = texts.get("split")
    if split is not None and split.lower() not in SPLIT_NAMES:
        raise UserError(f"{path}, line {line}: split {split!r} is none of {', '.join(SPLITS)}")
    return Row(
        line,
        texts["path"],
        texts.get("label"),
        texts.get("caption"),
        None if split is None else SPLIT_NAMES[split.lower()],
        has_label_column="label" in columns,
    )
