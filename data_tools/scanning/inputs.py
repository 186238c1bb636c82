"""Finding the videos that a scan is asked for: in folders, and in lists with their labels, captions and splits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ardiff.errors import UserError
from ardiff.video import EXTENSIONS, PICTURES
from data_tools.common import plural
from data_tools.scanning.lists import LISTS, ClassList, Row, read_list


@dataclass(frozen=True)
class Source:
    """A video file or folder of pictures, and what is known about it without looking into it."""

    path: str  # absolute
    label: str | None = None
    caption: str | None = None
    split: str | None = None
    missing: bool = False  # it is in a list, but not there
    origin: str | None = None  # the list and line that it is from


def find_sources(inputs: Sequence[Path], root: Path | None = None, class_list: ClassList | None = None) -> list[Source]:
    """All videos of folders, files and lists, sorted by path.

    In folders a video's label is the name of the sub-folder in which it lies, as is that of a listed video that has
    neither a label nor a caption; the paths of lists count from `root`, or else from the list's folder. A video that
    is found several times is one: lists add to what folders tell. Raises UserError for inputs that do not exist or
    contradict each other, and for labels that are not in `class_list`.
    """
    if root is not None:
        _require_use(root, inputs)
    found = dict[str, Source]()
    for given in inputs:
        sources = _listed(given, root, class_list) if _is_list(given) else _walked(given)
        for source in sources:
            known = found.get(source.path)
            found[source.path] = source if known is None else _merged(known, source)
    if class_list is not None:
        class_list.require(source.label for source in found.values() if source.label is not None)
    listed = [source for source in found.values() if source.origin]
    if listed and all(source.missing for source in found.values()):
        first = f"{listed[0].path} ({listed[0].origin})"
        few = f"none of the {len(listed)} listed videos exists; the first is {first}"
        if len(listed) == 1:
            few = f"{first}: the only listed video does not exist"
        raise UserError(f"{few}; --root says from where relative paths count")
    return sorted(found.values(), key=lambda source: Path(source.path).parts)


def _require_use(root: Path, inputs: Sequence[Path]) -> None:
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    if not any(map(_is_list, inputs)):
        raise UserError(f"--root {root}: is for the paths in lists, and none of the inputs is a list; leave it out")


def _is_list(given: Path) -> bool:
    return given.suffix.lower() in LISTS and not given.is_dir()


def _merged(one: Source, other: Source) -> Source:
    """What is known about a video from two inputs. Lists go before folders, and the first caption is kept."""
    first, second = (one, other) if one.origin or not other.origin else (other, one)
    for name in ("label", "split"):
        values = getattr(first, name), getattr(second, name)
        if first.origin and second.origin and None not in values and values[0] != values[1]:
            raise UserError(
                f"{first.path}: has {name} {values[0]!r} in {first.origin}, but {values[1]!r} in {second.origin}"
            )
    filled = {item.name: getattr(second, item.name) for item in fields(Source) if getattr(first, item.name) is None}
    return replace(first, **filled)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would replace links by their targets)


def _walked(given: Path) -> Iterator[Source]:
    root = _absolute(given)
    if not root.exists():
        raise UserError(f"{given}: no such file or folder")
    if not root.is_dir():
        if root.suffix.lower() in PICTURES:
            raise UserError(f"{given}: is a single picture; give the folder that holds the frames of a video")
        yield Source(str(root))
        return
    for path in _walk(root):
        yield Source(str(path), label=_folder_label(path, root))


def _folder_label(path: Path, root: Path) -> str | None:
    """The first of the folders that lead from `root` to a video."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return folders[0] if folders and folders[0] != ".." else None


def _walk(root: Path) -> Iterator[Path]:
    """Every video file below a folder, and every folder of pictures."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        extensions = {name: os.path.splitext(name)[1].lower() for name in names if not name.startswith(".")}  # noqa: PTH122
        videos = [name for name, extension in extensions.items() if extension in EXTENSIONS]
        for name in videos:
            yield Path(folder, name)
        pictures = sum(extension in PICTURES for extension in extensions.values())
        previews = bool(videos) or (pictures == 1 and bool(subfolders))
        if pictures and not previews:
            yield Path(folder)


def _listed(given: Path, root: Path | None, class_list: ClassList | None) -> Iterator[Source]:
    if not given.exists():
        raise UserError(f"{given}: no such file or folder")
    base = _absolute(root if root is not None else given.parent)
    rows = read_list(given)
    numbered = sum(row.number is not None for row in rows)
    if numbered and class_list is None:
        what = "the names of folders are the labels, or the numbers where there are none"
        print(f"{given}: has {plural(numbered, 'class number')}, but there is no --labels; {what}", file=sys.stderr)
    for row in rows:
        path = _absolute(base / row.path)
        yield Source(
            path=str(path),
            label=_label(row, given, path, base, class_list),
            caption=row.caption,
            split=row.split,
            missing=not path.exists(),
            origin=f"{given}, line {row.line}",
        )


def _label(row: Row, given: Path, path: Path, base: Path, class_list: ClassList | None) -> str | None:
    if row.label is not None:
        return row.label
    folder = _folder_label(path, base)
    if row.number is None:
        return None if row.caption is not None or row.has_label_column else folder
    if class_list is None:
        return folder if folder is not None else str(row.number)
    name = class_list.names.get(row.number)
    if name is None:
        numbers = f"{min(class_list.names)} to {max(class_list.names)}"
        raise UserError(
            f"{given}, line {row.line}: class {row.number} is not in --labels {class_list.path}, which has {numbers}"
        )
    if folder is not None and folder != name and folder in class_list.index:
        raise UserError(
            f"{given}, line {row.line}: class {row.number} is {name!r} in --labels {class_list.path}, "
            f"but the video lies in {folder!r}"
        )
    return name
