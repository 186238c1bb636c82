"""Locks between processes, as files: freed when the process that holds one ends, however it ends.

Such a file may be deleted by who holds it exclusively, so that no heap of them gathers: a lock on a file that has lost
its name counts for nothing, and is taken again on the file that has the name now.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def hold(path: Path, shared: bool = False, wait: bool = True) -> int | None:
    """Lock the file at `path`, which is made if need be, until the descriptor that is returned gets closed.

    None without `wait` where another process has it. Raises OSError where the file cannot be made or locked.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(handle, how)
            if _has_name(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclude other threads and processes, waiting for them."""
    handle = hold(path)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def discard(path: Path, handle: int) -> None:
    """Delete the file of a lock that is held exclusively, and free it."""
    path.unlink(missing_ok=True)
    os.close(handle)


def _has_name(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
