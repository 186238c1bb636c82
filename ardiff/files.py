"""Writing files so that a reader, or a program started again after a kill, never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ardiff.errors import UserError

CHUNK = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{platform.node()}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def json_problem(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON file that a program wrote, for a reader who does not know Python."""
    if not error.doc.strip():
        return "it is empty"
    ended = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return f"it is not JSON: {'cut short' if ended else 'damaged'} at line {error.lineno}, column {error.colno}"


def check_writable(option: str, path: Path) -> None:
    """Raise UserError where a file cannot be made, before the work that it is for."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {folder} is not a folder that can be written to; choose another place")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remove_leftovers(folder: Path, own: bool = False) -> None:
    """Delete temporary files that killed processes of this machine left behind in `folder`.

    With `own` also those under the id of this process, which must not be writing there: in containers a program that
    is started again often gets the id of the one that was killed.
    """
    for path in folder.glob(f".*.tmp.{platform.node()}.*"):
        owner = path.name.rsplit(".", 1)[-1]
        if owner.isdigit() and (own if int(owner) == os.getpid() else not _is_running(int(owner))):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # dead, but not yet seen by its parent
