"""Random access to the shards of one data set: open once, read any frames of any video through the index.

Clips of latents are copied out of memory maps, which costs half of what a read does. Before every batch the sizes of
the files are compared, so a shard that has shrunk is an error for the clips at hand and not SIGBUS for the process.
Everything else, and every second attempt, is read with `pread`.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import threading
import time
import weakref
import zlib
from collections import OrderedDict
from pathlib import Path

import braceexpand
import numpy as np
from PIL import Image

from ardiff.data.remote import ShardCache, is_remote
from ardiff.data.shards import MANIFEST, MEMBERS, Manifest, ShardEntry, parse_index, read_manifest
from ardiff.data.tar import BLOCK, ShardError, parse_header
from ardiff.errors import UserError

# What the manifest of each kind must say.
DETAILS = {"latents": ("tokens", "channels", "mean", "std", "arvae"), "frames": ("size",)}
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
OPEN_FILES = 256
TABLES = 512  # index tables of picture shards kept in memory
ATTEMPTS = 3  # network file systems have hiccups
FLIPPED, TEXT = 1, 2  # rows of the index; see MEMBERS


class ShardSet:
    """The videos of a folder of shards (or of some of its shards).

    frames [V] and labels [V] describe the videos, shard_of_video [V] says where they lie. `identity` changes when any
    shard's content does. With `verify` the checksum of a video's latents is compared whenever a clip of it is read
    (that of a picture always is). Shards of a remote data set come through `cache`.
    """

    def __init__(
        self, manifest: Manifest, cache: ShardCache | None = None, source: str | None = None, verify: bool = False
    ) -> None:
        self.manifest, self.verify = manifest, verify
        self.source = source or str(manifest.folder)  # for messages: the folder or URL that the user gave
        self._cache = cache
        if not manifest.shards or not manifest.num_frames:
            raise UserError(f"{self.source}: the manifest lists no samples")
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, tuple[mmap.mmap, memoryview]] = OrderedDict()
        weakref.finalize(self, _close_all, self._files, self._maps)
        self._tables: OrderedDict[int, np.ndarray] = OrderedDict()
        samples = [shard.samples for shard in manifest.shards]
        self.shard_of_video = np.repeat(np.arange(len(samples), dtype=np.int32), samples)
        self._first_video = np.cumsum([0, *samples])
        total = int(self._first_video[-1])
        self.frames = np.zeros(total, dtype=np.int64)
        self.labels = np.empty(total, dtype=np.int32)
        self._first_row = np.empty(total, dtype=np.int64)  # in the table of its shard
        members = len(MEMBERS) if manifest.kind == "latents" else 0
        self._offset = np.full((members, total), -1, dtype=np.int64)
        self._crc = np.zeros((members, total), dtype=np.uint32)
        self._text_tokens = np.zeros(total, dtype=np.int32)
        for number, shard in enumerate(manifest.shards):
            self._check_tar(shard)
            self._take_in(self._read_table(number), slice(self._first_video[number], self._first_video[number + 1]))
        digest = [[shard.file, shard.sha256] for shard in manifest.shards]
        self.identity = hashlib.sha256(json.dumps([manifest.kind, digest]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be fetched."""
        return self._cache is not None

    @property
    def has_flipped(self) -> bool:
        """Whether every video can be read mirrored."""
        return self.manifest.kind == "frames" or bool((self._offset[FLIPPED] >= 0).all())

    @property
    def has_text(self) -> bool:
        """Whether every video has text features."""
        return self.manifest.kind == "latents" and bool((self._offset[TEXT] >= 0).all())

    @property
    def checksums(self) -> np.ndarray:
        """The crc32 of every video's latents, uint32 [V]."""
        return self._crc[0]

    def read_latents(self, video: int, first: int, count: int, stride: int = 1, flipped: bool = False) -> np.ndarray:
        """Frames first, first + stride, ... of a video: float16 [count, L, C]. Raises ShardError."""
        details = self.manifest.details
        out = np.empty((count, details["tokens"], details["channels"]), dtype=np.float16)
        self.read_latents_into(out, video, first, stride, flipped)
        return out

    def read_latents_into(
        self, out: np.ndarray, video: int, first: int, stride: int = 1, flipped: bool = False
    ) -> None:
        """As `read_latents`, into a C-contiguous float16 array [count, L, C]."""
        assert out.flags.c_contiguous and first >= 0 and first + (len(out) - 1) * stride < self.frames[video]
        frame_bytes = out[0].nbytes
        member = FLIPPED if flipped else 0
        offset, shard = int(self._offset[member, video]), int(self.shard_of_video[video])
        if not self.verify and stride == 1:
            self._read(shard, offset + first * frame_bytes, out.data)
            return
        # with `verify` the whole video, otherwise the stretch from which every stride-th frame is taken
        start, length = (0, int(self.frames[video])) if self.verify else (first, (len(out) - 1) * stride + 1)
        stretch = np.empty((length, *out.shape[1:]), dtype=np.float16)
        self._read(shard, offset + start * frame_bytes, stretch.data)
        if self.verify and zlib.crc32(stretch.data) != self._crc[member, video]:
            raise ShardError(self._name(shard), offset, "the checksum of these latents is wrong; copy the shard again")
        out[:] = stretch[first - start :: stride][: len(out)]

    def read_clips(
        self,
        out: np.ndarray,
        videos: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
        stride: int,
        flipped: np.ndarray,
    ) -> list[tuple[int, ShardError]]:
        """Row i of float16 [B, F, L, C], up to frame count[i], gets a clip of videos[i]; all arrays [B].

        Returns the rows that could not be read, with the reason.
        """
        if self.verify or stride > 1 or self._cache is not None:
            return self._read_one_by_one(out, videos, first, count, stride, flipped)
        frame_bytes = out[0, 0].nbytes
        rows = out.data.cast("B")
        starts = range(0, rows.nbytes, out[0].nbytes)
        offsets = (self._offset[flipped.astype(np.int64), videos] + first * frame_bytes).tolist()
        sizes = (count * frame_bytes).tolist()
        shards = self.shard_of_video[videos].tolist()
        failed = []
        with self._lock:  # once for all: this loop is what a clip costs
            views = {shard: self._view(shard) for shard in set(shards)}
            for row, (shard, offset, start, size) in enumerate(zip(shards, offsets, starts, sizes, strict=True)):
                view = views[shard]
                if view is None:
                    failed.append(row)
                else:
                    rows[start : start + size] = view[offset : offset + size]
        if not failed:
            return []
        # again, with patience and the reason
        return self._read_one_by_one(out, videos, first, count, stride, flipped, np.array(failed))

    def _read_one_by_one(
        self,
        out: np.ndarray,
        videos: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
        stride: int,
        flipped: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> list[tuple[int, ShardError]]:
        failed = []
        for row in range(len(out)) if rows is None else rows.tolist():
            try:
                clip = out[row, : count[row]]
                self.read_latents_into(clip, int(videos[row]), int(first[row]), stride, bool(flipped[row]))
            except ShardError as error:
                failed.append((row, error))
        return failed

    def read_text(self, video: int) -> np.ndarray:
        """Text features of a video: float16 [N, D]. Raises ShardError."""
        offset, shard = int(self._offset[TEXT, video]), int(self.shard_of_video[video])
        features = np.empty((int(self._text_tokens[video]), self.manifest.details["text_dim"]), dtype=np.float16)
        self._read(shard, offset, features.data)
        if self.verify and zlib.crc32(features.data) != self._crc[TEXT, video]:
            raise ShardError(self._name(shard), offset, "the checksum of this text is wrong; copy the shard again")
        return features

    def read_frames(self, video: int, first: int, count: int, stride: int = 1, flipped: bool = False) -> np.ndarray:
        """Pictures first, first + stride, ... of a video: uint8 [count, H, W, 3]. Raises ShardError."""
        shard = int(self.shard_of_video[video])
        rows = self._table(shard)[int(self._first_row[video]) + first :][: count * stride : stride]
        assert len(rows) == count <= self.frames[video]
        pictures = np.stack([self._picture(shard, row) for row in rows])
        return np.ascontiguousarray(pictures[:, :, ::-1]) if flipped else pictures

    def prepare(self, video: int) -> None:
        """Bring the shard of a video into the cache, where there is one."""
        if self._cache is not None:
            os.close(self._cache.open(self.manifest.shards[int(self.shard_of_video[video])], self.source))

    def place_of(self, video: int) -> tuple[str, int]:
        """Shard file and offset of a video's first data, for messages."""
        shard = int(self.shard_of_video[video])
        if self.manifest.kind == "latents":
            return self._name(shard), int(self._offset[0, video])
        return self._name(shard), int(self._table(shard)[int(self._first_row[video])]["offset"])

    def key_of(self, video: int) -> str:
        """The key of a video in its shard, from the header in front of its first data. Raises ShardError."""
        shard, offset = int(self.shard_of_video[video]), self.place_of(video)[1]
        position = offset // BLOCK * BLOCK - BLOCK  # the header of a .npy file is shorter than a block
        header = bytearray(BLOCK)
        self._read(shard, max(position, 0), memoryview(header))
        return parse_header(bytes(header), position, Path(self._name(shard))).key

    def _picture(self, shard: int, row: np.void) -> np.ndarray:
        data, offset = bytearray(int(row["bytes"])), int(row["offset"])
        self._read(shard, offset, memoryview(data))
        if zlib.crc32(data) != row["crc32"]:
            raise ShardError(self._name(shard), offset, "the checksum of this picture is wrong; copy the shard again")
        size = self.manifest.details["size"]
        try:
            # Only these: among the others of Pillow is one that starts a program, Ghostscript.
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            if picture.size != (size, size):  # before it is decoded: it may claim to be of any size
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels instead of {size} x {size}")
            return np.asarray(picture.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise whatever they like
            raise ShardError(self._name(shard), offset, f"not a picture of this data set ({error})") from error

    def _read(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a shard."""
        size = buffer.nbytes
        for attempt in range(ATTEMPTS):
            try:
                if self._read_once(shard, offset, buffer) == size:
                    return
                raise ShardError(self._name(shard), offset, f"ends before these {size} bytes; copy it again")
            except OSError as error:
                with self._lock:  # a stale handle of a network file system stays stale
                    if shard in self._files:
                        os.close(self._files.pop(shard))
                if attempt == ATTEMPTS - 1:
                    raise ShardError(self._name(shard), offset, f"cannot be read ({error.strerror})") from error
                time.sleep(0.1 * 4**attempt)

    def _read_once(self, shard: int, offset: int, buffer: memoryview) -> int:
        if self._cache is not None:  # opened for every read: what is open takes room even when it is evicted
            file = self._cache.open(self.manifest.shards[shard], self.source)
            try:
                return os.preadv(file, [buffer], offset)
            finally:
                os.close(file)
        with self._lock:  # previews read beside the prefetch thread
            handle = self._files[shard] if shard in self._files else self._open(shard)
            return os.preadv(handle, [buffer], offset)

    def _open(self, shard: int) -> int:
        """Open a shard; the one that was opened first makes room (the order of use is random anyway)."""
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        handle = self._files[shard] = os.open(self.manifest.folder / self._file(shard), os.O_RDONLY)
        return handle

    def _view(self, shard: int) -> memoryview | None:
        """The bytes of a shard, mapped; None where it has changed its size or cannot be opened (`_read` says why)."""
        size = self.manifest.shards[shard].bytes
        try:
            if shard not in self._maps:
                if len(self._maps) >= OPEN_FILES:
                    _unmap(self._maps.popitem(last=False)[1])
                with (self.manifest.folder / self._file(shard)).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
                self._maps[shard] = (mapped, memoryview(mapped))
            mapped, view = self._maps[shard]
            return view if mapped.size() == size else None  # beyond the end of the file waits SIGBUS
        except (OSError, ValueError):
            return None

    def _file(self, shard: int) -> str:
        return self.manifest.shards[shard].file

    def _name(self, shard: int) -> str:
        return f"{self.source.rstrip('/')}/{self._file(shard)}"

    def _check_tar(self, shard: ShardEntry) -> None:
        """See that the tar is there in its full length (a remote one is checked whole when it is fetched)."""
        if self._cache is not None:
            return
        path = self.manifest.folder / shard.file
        if not path.is_file():
            raise UserError(f"{path}: missing, although {self.manifest.folder / 'manifest.json'} lists it")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"{path}: damaged or truncated, {size} bytes where the manifest says {shard.bytes}; "
                "copy it again or make it anew with the tool that wrote it"
            )

    def _read_table(self, number: int) -> np.ndarray:
        """The index of one shard, compared with the manifest and with what the shard can hold."""
        shard = self.manifest.shards[number]
        path = (self.manifest.folder / shard.file).with_suffix(".index.npy")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise UserError(f"{path}: not the index that the manifest lists; copy it again")
        try:
            rows = parse_index(content)
        except ValueError as error:
            raise UserError(f"{path}: {error}; make the shard anew") from error
        if not self._plausible(rows, shard):
            raise UserError(f"{path}: does not describe {shard.file}; make the shard anew")
        return rows

    def _plausible(self, rows: np.ndarray, shard: ShardEntry) -> bool:
        main = rows[rows["member"] == 0]
        known = (rows["member"] < len(MEMBERS)) & (rows["frames"] > 0) & (rows["bytes"] > 0)
        known &= (rows["sample"] >= 0) & (rows["sample"] < shard.samples)
        known &= (rows["label"] >= -1) & (rows["label"] < len(self.manifest.classes))
        inside = (rows["offset"] > 0) & (rows["bytes"] <= shard.bytes) & (rows["offset"] <= shard.bytes - rows["bytes"])
        if not (known.all() and inside.all() and (np.diff(main["sample"]) >= 0).all()):
            return False
        if not np.array_equal(np.unique(main["sample"]), np.arange(shard.samples)):
            return False
        if self.manifest.kind == "frames":
            return len(main) == len(rows) and bool((rows["frames"] == 1).all())
        return self._fitting(rows, main, shard)

    def _fitting(self, rows: np.ndarray, main: np.ndarray, shard: ShardEntry) -> bool:
        """Whether the arrays of each sample fit one another and the manifest; `main` are the rows of latents."""
        details = self.manifest.details
        kinds = rows["sample"] * len(MEMBERS) + rows["member"]
        mirrored, text = (rows[rows["member"] == member] for member in (FLIPPED, TEXT))
        arrays = rows[rows["member"] < TEXT]
        width = np.int64(2 * details["tokens"] * details["channels"])
        text_width = np.int64(2 * details["text_dim"]) if len(text) else 0
        return bool(
            len(np.unique(kinds)) == len(kinds)
            and len(main) == shard.samples
            and (mirrored["frames"] == main["frames"][mirrored["sample"]]).all()
            and (arrays["bytes"] == arrays["frames"] * width).all()
            and (text["bytes"] == text["frames"] * text_width).all()
            and (len(text) == 0 or text["frames"].max() <= details["text_tokens"])
        )

    def _take_in(self, rows: np.ndarray, videos: slice) -> None:
        """Fill the columns of one shard's videos."""
        main = np.flatnonzero(rows["member"] == 0)
        samples, first = np.unique(rows["sample"][main], return_index=True)
        self._first_row[videos] = main[first]
        self.labels[videos] = rows["label"][main[first]]
        self.frames[videos] = np.bincount(rows["sample"][main], rows["frames"][main], len(samples)).astype(np.int64)
        for member in range(len(self._offset)):
            chosen = rows[rows["member"] == member]
            self._offset[member, videos][chosen["sample"]] = chosen["offset"]
            self._crc[member, videos][chosen["sample"]] = chosen["crc32"]
            if member == TEXT:
                self._text_tokens[videos][chosen["sample"]] = chosen["frames"]

    def _table(self, shard: int) -> np.ndarray:
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = self._read_table(shard)
                if len(self._tables) > TABLES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]


def _close_all(files: OrderedDict[int, int], maps: OrderedDict[int, tuple[mmap.mmap, memoryview]]) -> None:
    for handle in files.values():
        os.close(handle)
    for entry in maps.values():
        _unmap(entry)


def _unmap(entry: tuple[mmap.mmap, memoryview]) -> None:
    mapped, view = entry
    view.release()
    mapped.close()


def open_shards(source: str | Path, kind: str, cache: ShardCache | None = None, verify: bool = False) -> ShardSet:
    """Open `source`: a folder with manifest.json, the manifest, or its tars as a brace or glob pattern; or the URL of
    one of these (no glob), whose shards come through `cache`.

    Raises UserError when anything is missing, damaged or of another kind.
    """
    text = str(source)
    remote = is_remote(text)
    if remote and cache is None:
        raise UserError(f"{text}: give data.cache_dir, a folder on a fast local disk, for remote shards")
    manifest = _find_remote(text, cache) if remote and cache else _find_local(text)
    if manifest.kind != kind:
        maker = {"latents": "data_tools.extract_latents", "frames": "data_tools.shard_videos"}[kind]
        raise UserError(f"{text}: holds {manifest.kind}, but {kind} are needed (made by {maker})")
    missing = [name for name in DETAILS[kind] if name not in manifest.details]
    if missing:
        raise UserError(f"{manifest.folder / MANIFEST}: says nothing of {', '.join(missing)}; make it anew")
    if kind == "latents":
        _check_statistics(manifest)
    try:
        return ShardSet(manifest, cache if remote else None, _folder_of(text) if remote else None, verify)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{manifest.folder / MANIFEST}: does not fit its shards ({error!r})") from error


def _check_statistics(manifest: Manifest) -> None:
    for name in ("mean", "std"):
        values = manifest.details[name]
        # A comparison, as isfinite knows no whole numbers of hundreds of digits; NaN fails it as well.
        numbers = isinstance(values, list) and all(
            type(value) in (int, float) and abs(value) < 1e30 for value in values
        )
        if not numbers or len(values) != manifest.details["channels"]:
            raise UserError(
                f"{manifest.folder / MANIFEST}: '{name}' is not a list of {manifest.details['channels']} numbers; "
                "see `python -m data_tools.inspect_shards repair`"
            )


def _find_local(text: str) -> Manifest:
    path = Path(text)
    if path.is_dir() or path.suffix == ".json":
        return read_manifest(path)
    if path.suffix != ".tar":
        raise UserError(f"{text}: no such folder, manifest or tar files")
    names = [Path(name) for name in _expand(text)]
    if any(character in text for character in "*?["):
        names = sorted(match for name in names for match in name.parent.glob(name.name))
    if not names:
        raise UserError(f"{text}: no file matches")
    return _subset(read_manifest(names[0].parent), names)


def _find_remote(url: str, cache: ShardCache) -> Manifest:
    manifest = cache.manifest(_folder_of(url))
    return _subset(manifest, [Path(name) for name in _expand(url)]) if url.endswith(".tar") else manifest


def _folder_of(url: str) -> str:
    """The URL without the name of the manifest or the pattern of tars at its end."""
    return url.rpartition("/")[0] if url.endswith((".json", ".tar")) else url.rstrip("/")


def _expand(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: its braces do not match") from error


def _subset(manifest: Manifest, names: list[Path]) -> Manifest:
    known = {shard.file: shard for shard in manifest.shards}
    missing = [str(name) for name in names if name.name not in known or name.parent != names[0].parent]
    if missing:
        raise UserError(
            f"{missing[0]}: not in {manifest.folder / 'manifest.json'}, which lists {len(known)} shards"
            + (f" ({len(missing)} such names)" if len(missing) > 1 else "")
        )
    chosen = [known[name.name] for name in names]
    return Manifest(manifest.folder, manifest.kind, chosen, manifest.classes, manifest.details)
