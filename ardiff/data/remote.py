"""Shards in object stores or behind http: fetched whole into a bounded cache on a local disk, checked, then read there.

The cache is shared by all processes of a node. A file's name is its sha256, so equal names of different data sets
cannot be confused; it appears under that name only when its content has been compared. The least recently used shards
make room for new ones.

    SHA256.tar           a shard
    sets/URL-VERSION/    manifest and indexes of a data set. The version is the manifest's sha256, so a data set that
                         is replaced at its source does not change for a run that has begun
    locks/               held while something is fetched or, shared, while a set is in use
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from ardiff.data.downloads import Check, DamagedError, DiskError, UnavailableError, download
from ardiff.data.shards import MANIFEST, Manifest, ShardEntry, read_manifest
from ardiff.data.tar import ShardError
from ardiff.data.urls import Credentials, is_remote, split_credentials
from ardiff.errors import UserError
from ardiff.files import remove_leftovers, sha256
from ardiff.locks import discard, hold, locked

__all__ = ["ShardCache", "is_remote"]

log = logging.getLogger("ardiff")
START_PATIENCE = 15.0  # seconds of trying to reach a data set at the start
PATIENCE = 900.0  # and in a run; less than train.hang_minutes, or the run is taken for one that hangs
TELL_AFTER = 30.0
RESERVED = ".room"
CONNECTIONS = 16  # for the many small index files
NOTE_EVERY = 30.0  # seconds between notes of a shard's last use
KEEP_SETS = 30 * 24 * 3600.0  # seconds after their last use that manifests and indexes stay


class ShardCache:
    """A folder of at most `limit` bytes of shards."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            for part in ("locks", "sets"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: cannot be made ({error.strerror})") from error
        self._noted: dict[str, float] = {}
        self._hopeless: dict[str, str] = {}  # shards that could not be had, and why
        self._credentials: dict[str, Credentials] = {}
        self._versions: dict[str, str] = {}  # sha256 of the manifests in use
        self._in_use: dict[str, int] = {}  # locks on their folders
        weakref.finalize(self, _close_all, self._in_use)

    def without_credentials(self, url: str) -> str:
        """The URL under which a data set, its manifest or its tars are known from now on, and which may be shown."""
        shown, credentials = split_credentials(url)
        if any(credentials):
            self._credentials[_folder_of(shown)] = credentials
        return shown

    def manifest(self, url: str) -> Manifest:
        """Fetch manifest and indexes of a remote data set; the folder of the result holds them."""
        url = _folder_of(self.without_credentials(url))
        name = _set_name(url)
        with self._locked(name):
            folder = self._fetch_manifest(url, name)
            try:
                self._fetch_indexes(url, folder)
            except DamagedError:  # the set may have been replaced since its manifest was fetched
                known, folder = folder, self._fetch_manifest(url, name)
                try:
                    self._fetch_indexes(url, folder)
                except DamagedError as error:
                    remedy = "copy it there again" if folder == known else "wait until all of the data set is in place"
                    raise UserError(f"{error}; {remedy}") from error
            self._clean(name, folder.name)
        return read_manifest(folder)

    def _fetch_manifest(self, url: str, name: str) -> Path:
        """The folder for the version of a data set that is at its source now, with the manifest."""
        arrived = self.folder / "sets" / f"{name}.{MANIFEST}"
        try:
            self._download(f"{url}/{MANIFEST}", arrived)
        except UnavailableError as error:
            raise UserError(f"{url}/{MANIFEST}: cannot be fetched ({error})") from error
        self._versions[url] = sha256(arrived)
        folder = self.folder / "sets" / f"{name}-{self._versions[url][:16]}"
        if folder.name not in self._in_use:
            handle = hold(self.folder / "locks" / folder.name, shared=True)
            assert handle is not None
            self._in_use[folder.name] = handle
        folder.mkdir(exist_ok=True)
        arrived.replace(folder / MANIFEST)
        os.utime(folder)
        return folder

    def _fetch_indexes(self, url: str, folder: Path) -> None:
        """Fetch the indexes that are not there. Raises DamagedError for one that is not what the manifest lists."""

        def fetch(shard: ShardEntry) -> None:
            path = folder / Path(shard.file).with_suffix(".index.npy").name

            def check(arrived: Path) -> None:
                if sha256(arrived) != shard.index_sha256:
                    raise DamagedError(f"{url}/{path.name}: not the index that the manifest lists")

            if not path.is_file() or sha256(path) != shard.index_sha256:
                self._download(f"{url}/{path.name}", path, check)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                list(pool.map(fetch, read_manifest(folder).shards))
            except UnavailableError as error:
                raise UserError(f"{url}: an index cannot be fetched ({error})") from error

    def _clean(self, name: str, version: str) -> None:
        """Delete other versions of a data set, sets that were not used for long, and locks of what is not there.

        What other processes use, they hold.
        """
        sets, locks = self.folder / "sets", self.folder / "locks"
        remove_leftovers(sets)
        for path in list(sets.iterdir()):
            with suppress(FileNotFoundError):  # another process cleans as well
                old = time.time() - path.stat().st_mtime > KEEP_SETS
                if path.is_dir() and path.name != version and (old or path.name.startswith(f"{name}-")):
                    self._discard(locks / path.name, partial(shutil.rmtree, path, ignore_errors=True))
        known = {path.name for path in sets.iterdir()} | {path.stem for path in self.folder.glob("*.tar")}
        known |= {each.partition("-")[0] for each in known} | {"room", name}
        for path in list(locks.iterdir()):
            if path.name not in known:
                self._discard(path)

    def _discard(self, lock: Path, delete: Callable[[], object] = lambda: None) -> None:
        """Delete something with its lock, unless it is in use."""
        handle = hold(lock, wait=False)
        if handle is not None:
            delete()
            discard(lock, handle)

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
        """Fetch a shard, a second time if the first copy is damaged, and return it open: it may be evicted at once."""
        address = f"{url.rstrip('/')}/{shard.file}"
        handles: list[int] = []

        def check(arrived: Path) -> None:
            _compare(arrived, shard)
            handles.append(os.open(arrived, os.O_RDONLY))

        for attempt in range(2):
            try:
                self._download(address, target, check, PATIENCE)
                return handles[-1]
            except UnavailableError as error:
                reason = f"cannot be fetched ({error})"
                break
            except DamagedError as error:
                reason = f"fetched twice, and not what the manifest says: {error}"
                if attempt == 0:
                    log.warning("%s: %s; fetching it again", address, error)
        self._require_same_set(url.rstrip("/"))
        self._hopeless[shard.sha256] = reason
        raise ShardError(address, 0, reason)

    def _require_same_set(self, url: str) -> None:
        """Raise UserError if the data set at `url` has been replaced since its manifest was fetched: all that comes
        from there now would be taken for damaged.
        """
        name = _set_name(url)
        arrived = self.folder / "sets" / f"{name}.now.json"
        with self._locked(name):
            try:
                self._download(f"{url}/{MANIFEST}", arrived, patience=PATIENCE)
                now = sha256(arrived)
            except UnavailableError:
                return
            finally:
                arrived.unlink(missing_ok=True)
        if now != self._versions.get(url, now):
            raise UserError(f"{url}: the data set was replaced since this run began; put it back, or start a new run")

    def _download(
        self, url: str, target: Path, check: Check = lambda _: None, patience: float = START_PATIENCE
    ) -> None:
        """Fetch one file into the cache, see `download`."""
        address = self._credentials.get(url.rpartition("/")[0], Credentials()).added_to(url)
        try:
            download(url, address, target, check, patience)
        except DiskError as error:
            raise UserError(f"data.cache_dir {self.folder}: {error}; see data.cache_gb") from error

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
                self._discard(self.folder / "locks" / sha, partial(path.unlink, missing_ok=True))

    def _counted(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Shards and reservations; what another process removes meanwhile is passed over."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar" or path.name.endswith(RESERVED):
                    yield path, path.stat()

    def _locked(self, name: str) -> AbstractContextManager[None]:
        """Exclude the other threads and processes of this node."""
        return locked(self.folder / "locks" / name)


def _compare(path: Path, shard: ShardEntry) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise DamagedError(f"{size} bytes instead of {shard.bytes}")
    if sha256(path) != shard.sha256:
        raise DamagedError("its sha256 is wrong")


def _folder_of(url: str) -> str:
    """The URL without the name of a manifest or tars at its end."""
    return url.rpartition("/")[0] if url.endswith((".json", ".tar")) else url.rstrip("/")


def _set_name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _close_all(locks: dict[str, int]) -> None:
    for handle in locks.values():
        os.close(handle)
