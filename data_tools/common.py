"""What the programs of this folder share: checked output folders and the settings they were filled with."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ardiff.errors import UserError
from ardiff.files import remove_leftovers, write_json
from ardiff.launching.orphans import when_parent_ends
from ardiff.locks import discard, hold

SETTINGS = "settings.json"
DERIVED = "derived"  # the key of settings that follow from the others
LOCK = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # said by some network file systems
LOCK_PATIENCE = 1.0  # seconds: a process that has just been killed may take a moment to go


@contextmanager
def alone(out: Path, lock: Path | None = None) -> Iterator[None]:
    """Keep other programs from filling `out` meanwhile; a killed one keeps nobody from it.

    The file `lock` (default: one in the folder `out`) exists meanwhile only. Raises UserError where another program is
    at work, and where the folder cannot be made.
    """
    lock = out / LOCK if lock is None else lock
    make_folder(lock.parent)
    until = time.monotonic() + LOCK_PATIENCE
    try:
        while (handle := hold(lock, wait=False)) is None:
            if time.monotonic() > until:
                raise UserError(f"--out {out}: another program is writing there; wait for its end or choose another")
            time.sleep(0.05)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"--out {out}: cannot be locked ({error.strerror}); nothing else may write there now", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        discard(lock, handle)


def make_folder(path: Path) -> None:
    """Create a folder. Raises UserError if impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder ({error.strerror})") from error


def output_folder(path: Path) -> Path:
    """Create a folder for results and clear it of what a killed run left. Raises UserError if impossible."""
    make_folder(path)
    remove_leftovers(path, own=True)
    return path


def split_folder(out: Path, split: str) -> Path:
    """Where the shards of a split lie: those of the train split in `out` itself."""
    return out if split == "train" else out / split


def claim_folder(
    folder: Path, settings: dict[str, Any], results: str, derive: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Note in `folder` what it is being filled with, so that a later run cannot mix in something else.

    `derive` works out further settings that follow from these; a later run with the same settings does not call it
    again but takes what is noted. Returns these. Raises UserError when there already are files that match the
    pattern `results`, made with other settings.
    """
    known = folder_settings(folder)
    existing = next(folder.glob(results), None)
    if existing is not None and known is None:
        raise UserError(f"--out {folder}: holds files of something else ({existing.name}); choose another --out")
    known = known or {}
    derived = known.pop(DERIVED, None)
    if existing is None and known and known.keys() != settings.keys():
        raise UserError(
            f"--out {folder}: was set up by another program or with other options (see its {SETTINGS}); choose another "
            "--out or delete that file"
        )
    changed = [
        f"{key} {known.get(key)} -> {settings.get(key)}"
        for key in sorted({*known, *settings})
        if known.get(key) != settings.get(key)
    ]
    if existing is not None and changed:
        raise UserError(
            f"--out {folder}: holds the results of other settings ({', '.join(changed)}); "
            "choose another --out or delete that folder"
        )
    if changed or not isinstance(derived, dict):
        derived = derive() if derive else {}
    write_json(folder / SETTINGS, {**settings, DERIVED: derived} if derive else settings)
    return derived


def folder_settings(folder: Path) -> dict[str, Any] | None:
    """The settings an earlier run noted in `folder`, or None."""
    file = folder / SETTINGS
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); choose another --out or delete it") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a record of settings; choose another --out or delete it")
    return value


def die_with_launcher() -> None:
    """End this process when its parent does: ranks whose launcher was killed would meet those of the next start."""
    when_parent_ends(lambda: os._exit(1))


def plural(count: int, thing: str) -> str:
    """A number and what it counts: "1 video", "2,000 videos"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def require(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise UserError unless low <= value <= high."""
    if not (value >= low and (high is None or value <= high)):  # not a number included
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} {value}: must be {limits}")
