"""Fetching one file from an object store or a web server, with patience for outages."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ardiff.data.urls import redact, split_credentials
from ardiff.errors import UserError
from ardiff.files import replacing

log = logging.getLogger("ardiff")
Check = Callable[[Path], None]
PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds before the second attempt; doubled each time
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

DENIED = re.compile(r"\b40[13]\b|unauthorized|forbidden|access ?denied|credentials", re.IGNORECASE)
HINT = "; give a user, password or token in the URL, or the store's own variables (a run's config.yaml keeps neither)"


class UnavailableError(Exception):
    """A file is not there."""


class DamagedError(Exception):
    """A file was fetched, but is not what it should be."""


class DiskError(Exception):
    """A file cannot be written where it belongs."""


def download(url: str, address: str, target: Path, check: Check, patience: float) -> None:
    """Fetch one file, atomically: it gets its name when `check`, which may raise DamagedError, has not raised.

    `url` is for messages; `address` may hold credentials besides. Raises UnavailableError, DiskError, and UserError
    when the source cannot be reached for `patience` seconds.
    """
    begin, pause = time.monotonic(), PAUSE
    while True:
        try:
            with replacing(target) as temporary:
                system, path = _file_system(address)
                system.get_file(path, str(temporary))
                check(temporary)
            return
        except ImportError as error:
            raise UserError(f"{url}: needs a package that is not installed ({error})") from error
        except FileNotFoundError:
            raise UnavailableError("not found") from None
        except DamagedError:
            raise
        except Exception as error:  # every store has exceptions of its own
            number = error.errno if isinstance(error, OSError) else None
            if number in DISK_ERRNOS or (number and _is_below(getattr(error, "filename", None), target.parent)):
                raise DiskError(os.strerror(number or 0)) from error
            reason = redact(" ".join(f"{type(error).__name__}: {error}".split()), address)
            if time.monotonic() - begin + pause > patience:
                hint = HINT if DENIED.search(reason) and not any(split_credentials(address)[1]) else ""
                # not from the error: a traceback would show what is hidden here
                raise UserError(f"{url}: cannot be reached for {patience:.0f} s ({reason}){hint}") from None
            # An outage must not turn good shards into bad samples: wait for its end, and say so.
            log.warning("%s: %s; trying again in %.0f s", url, reason, pause)
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)


def _file_system(url: str) -> tuple[Any, str]:
    """What fsspec reads a URL with, and what the file is called there.

    fsspec's own `url_to_fs` takes the "::" of an IPv6 address for a file system within another one.
    """
    import fsspec

    kind = fsspec.get_filesystem_class(url.partition("://")[0])
    return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)


def _is_below(path: object, folder: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)
