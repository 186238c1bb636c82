"""Shards in object stores or behind http: fetched whole into a bounded cache on a local disk, checked, then read there.

The cache is shared by all processes of a node. A file's name is its sha256, so equal names of different data sets
cannot be confused; it appears under that name only when its content has been compared. The least recently used shards
make room for new ones.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from ardiff.data.shards import MANIFEST, Manifest, ShardEntry, read_manifest
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from ardiff.files import replacing, sha256

log = logging.getLogger("ardiff")
# What fsspec knows beyond these, such as shells, ssh or archives within archives, is refused.
PROTOCOLS = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds before the second attempt; doubled each time
START_PATIENCE = 15.0  # seconds of trying to reach a data set at the start
PATIENCE = 1200.0  # and in a run; less than train.collective_timeout_minutes, or the other ranks give up first
TELL_AFTER = 30.0
RESERVED = ".room"
CONNECTIONS = 16  # for the many small index files
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
NOTE_EVERY = 30.0  # seconds between notes of a shard's last use


def is_remote(source: str) -> bool:
    """Whether a data set is named by a URL. Raises UserError for a kind of URL that is not read."""
    protocol, separator, rest = source.partition("://")
    if source.startswith("pipe:") or (separator and (protocol not in PROTOCOLS or "::" in source)):
        raise UserError(f"{source}: shards are read from folders or from {', '.join(PROTOCOLS[:-1])} URLs only")
    return bool(separator and rest)


class ShardCache:
    """A folder of at most `limit` bytes of shards."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: cannot be made ({error.strerror})") from error
        self._noted: dict[str, float] = {}
        self._hopeless: dict[str, str] = {}  # shards that could not be had, and why

    def manifest(self, url: str) -> Manifest:
        """Fetch manifest and indexes of a remote data set; the folder of the result holds them."""
        url = url.removesuffix(MANIFEST).rstrip("/")
        folder = self.folder / "sets" / hashlib.sha256(url.encode()).hexdigest()[:16]
        with self._locked(folder.name):
            try:
                self._download(f"{url}/{MANIFEST}", folder / MANIFEST)
            except _UnavailableError as error:
                raise UserError(f"{url}/{MANIFEST}: cannot be fetched ({error})") from error
            manifest = read_manifest(folder)

            def fetch(shard: ShardEntry) -> None:
                name = Path(shard.file).with_suffix(".index.npy").name
                if not (folder / name).is_file() or sha256(folder / name) != shard.index_sha256:
                    self._download(f"{url}/{name}", folder / name)

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                try:
                    list(pool.map(fetch, manifest.shards))
                except _UnavailableError as error:
                    raise UserError(f"{url}: an index cannot be fetched ({error})") from error
        return manifest

    def open(self, shard: ShardEntry, url: str) -> int:
        """A file descriptor, to be closed by the caller, of a shard of the data set at `url`, fetched if need be.

        Raises ShardError when it cannot be had or is not what the manifest says, UserError when it is larger than the
        cache. The shard may be evicted while it is open: it can be read, but takes room until it is closed.
        """
        target = self.folder / f"{shard.sha256}.tar"
        handle = self._open(target, shard)
        if handle is not None:
            return handle
        if shard.sha256 in self._hopeless:
            raise ShardError(f"{url}/{shard.file}", 0, self._hopeless[shard.sha256])
        if shard.bytes > self.limit:
            raise UserError(
                f"data.cache_gb = {self.limit / 1e9:g}, but {url}/{shard.file} alone has {shard.bytes / 1e9:g} GB"
            )
        with self._locked(shard.sha256):
            handle = self._open(target, shard)  # another process may have fetched it meanwhile
            if handle is None:
                with self._room(shard):
                    handle = self._fetch(shard, url, target)
        return handle

    def _open(self, target: Path, shard: ShardEntry) -> int | None:
        """Open the copy that is there, if there is one; its last use is noted now and then."""
        try:
            handle = os.open(target, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != shard.bytes:
            os.close(handle)
            return None
        now = time.monotonic()
        if now - self._noted.get(shard.sha256, -NOTE_EVERY) >= NOTE_EVERY:
            os.utime(handle)
            self._noted[shard.sha256] = now
        return handle

    def _fetch(self, shard: ShardEntry, url: str, target: Path) -> int:
        """Fetch a shard, a second time if the first copy is damaged, and return it open."""
        for attempt in range(2):
            try:
                handle = self._download(f"{url.rstrip('/')}/{shard.file}", target, shard)
                assert handle is not None
                return handle
            except _UnavailableError as error:
                reason = f"cannot be fetched ({error})"
                break
            except _DamagedError as error:
                reason = f"fetched twice, and not what the manifest says: {error}"
                if attempt == 0:
                    log.warning("%s/%s: %s; fetching it again", url, shard.file, error)
        self._hopeless[shard.sha256] = reason
        raise ShardError(f"{url}/{shard.file}", 0, reason)

    def _download(self, url: str, target: Path, shard: ShardEntry | None = None) -> int | None:
        """Fetch one file, atomically. A shard is compared with its entry before it gets its name, and returned open:
        under that name it may be evicted at once.
        """
        import fsspec

        patience = PATIENCE if shard is not None else START_PATIENCE
        begin, pause = time.monotonic(), PAUSE
        while True:
            handle = None
            try:
                with replacing(target) as temporary:
                    system, path = fsspec.core.url_to_fs(url)
                    system.get_file(path, str(temporary))
                    if shard is not None:
                        _compare(temporary, shard)
                        handle = os.open(temporary, os.O_RDONLY)
                return handle
            except ImportError as error:
                raise UserError(f"{url}: needs a package that is not installed ({error})") from error
            except FileNotFoundError as error:
                raise _UnavailableError("not found") from error
            except _DamagedError:
                raise
            except Exception as error:  # every store has exceptions of its own
                number = error.errno if isinstance(error, OSError) else None
                if number in _DISK_ERRNOS or (number and _is_below(getattr(error, "filename", None), self.folder)):
                    reason = os.strerror(number or 0)
                    raise UserError(f"data.cache_dir {self.folder}: {reason}; see data.cache_gb") from error
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                if time.monotonic() - begin + pause > patience:
                    raise UserError(f"{url}: cannot be reached for {patience:.0f} s ({reason})") from error
                # An outage must not turn good shards into bad samples: wait for its end, and say so.
                log.warning("%s: %s; trying again in %.0f s", url, reason, pause)
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)

    @contextmanager
    def _room(self, shard: ShardEntry) -> Iterator[None]:
        """Reserve space for a shard, evicting others; the reservation is a sparse file that other processes count.

        Where fetches in progress need all the room, one of them has to end first.
        """
        reservation = self.folder / f".{shard.sha256}{RESERVED}"
        begin, told = time.monotonic(), False
        while not self._reserve(shard, reservation):
            if not told and time.monotonic() - begin > TELL_AFTER:
                log.warning("%s: waiting for other fetches into %s to end", shard.file, self.folder)
                told = True
            time.sleep(0.05)
        try:
            yield
        finally:
            with self._locked("room"):  # or who counts just now might see neither the reservation nor the shard
                reservation.unlink(missing_ok=True)

    def _reserve(self, shard: ShardEntry, reservation: Path) -> bool:
        with self._locked("room"):
            self._clear_dead(shard.sha256)
            files = list(self._counted())
            shards = sorted((stat.st_mtime, path, stat.st_size) for path, stat in files if path.suffix == ".tar")
            reserved = sum(stat.st_size for _, stat in files) - sum(size for *_, size in shards)
            if reserved + shard.bytes > self.limit:
                return False  # no eviction would help
            used = reserved + sum(size for *_, size in shards)
            for _, path, size in shards:
                if used + shard.bytes <= self.limit:
                    break
                used -= size
                path.unlink(missing_ok=True)
            reservation.touch()
            os.truncate(reservation, shard.bytes)
            return True

    def _clear_dead(self, own: str) -> None:
        """Delete what killed processes left. Who fetches a shard holds its lock, on whatever host or in whatever
        container; so if the lock is free, its reservation and its half copy are nobody's.
        """
        for path in list(self.folder.iterdir()):
            sha = path.name[1:65]
            if path.name.startswith(".") and (RESERVED in path.name or ".tar.tmp." in path.name) and sha != own:
                handle = os.open(self.folder / "locks" / sha, os.O_CREAT | os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
                except BlockingIOError:
                    pass
                finally:
                    os.close(handle)

    def _counted(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Shards and reservations; what another process removes meanwhile is passed over."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar" or path.name.endswith(RESERVED):
                    yield path, path.stat()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Exclude the other threads and processes of this node."""
        handle = os.open(self.folder / "locks" / name, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class _UnavailableError(Exception):
    """A file could not be fetched."""


class _DamagedError(Exception):
    """A file was fetched, but is not what it should be."""


def _is_below(path: object, folder: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)


def _compare(path: Path, shard: ShardEntry) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise _DamagedError(f"{size} bytes instead of {shard.bytes}")
    if sha256(path) != shard.sha256:
        raise _DamagedError("its sha256 is wrong")
