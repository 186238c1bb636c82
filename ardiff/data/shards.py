"""Shards: WebDataset tars with an index beside each and one manifest for the folder.

A folder of `kind` "latents" holds one sample per video: `KEY.json`, `KEY.latents.npy` (float16 [N, L, C]) and, if they
were asked for, `KEY.flipped.npy` (the same of the mirrored frames) and `KEY.text.npy` (text features, float16 [N, D]).
A folder of `kind` "frames" holds one sample per video: `KEY.json` and `KEY.00000.jpg`, `KEY.00001.jpg`, ...

    NAME.tar        the samples, readable by any WebDataset client
    NAME.index.npy  where each array (latents) or picture (frames) lies in the tar: INDEX_DTYPE, memory-mappable
    NAME.done.json  written last: the shard is complete; its manifest entry and statistics
    manifest.json   all of them, and what they have in common

Nothing here is ever unpickled.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ardiff.data.tar import Member, ShardError, read_member, read_members
from ardiff.errors import UserError
from ardiff.files import json_problem, replacing, sha256, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LATENTS_MEMBER = "latents.npy"
FLIPPED_MEMBER = "flipped.npy"
TEXT_MEMBER = "text.npy"
MEMBERS = {LATENTS_MEMBER: 0, FLIPPED_MEMBER: 1, TEXT_MEMBER: 2}  # as numbered in the index; pictures are 0 as well
FRAME_MEMBER = re.compile(r"\d{5}\.(jpg|png|webp)$")
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<f2', 'fortran_order': False, 'shape': "
    rb"\(((?:[1-9]\d{0,8}, ){1,2}[1-9]\d{0,8})\), \} *\n",
    re.DOTALL,
)
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_JSON = 1 << 24
MAX_HEADER = 1 << 12  # of a .npy member: numpy needs 128 bytes
CHUNK = 1 << 20  # bytes held at a time where a member is only passed through
INDEX_DTYPE = np.dtype(
    [
        ("sample", "<i8"),  # which sample of this shard
        ("offset", "<i8"),  # first byte of the data in the tar
        ("bytes", "<i8"),
        ("frames", "<i4"),  # frames in this record: N for latents, 1 for a picture; of text, its tokens
        ("label", "<i4"),  # class, or -1
        ("crc32", "<u4"),
        ("member", "<u4"),  # see MEMBERS
    ]
)


@dataclass
class Sample:
    """One sample of a shard: its key (digits), its JSON description and its binary members by extension."""

    key: str
    info: dict[str, Any]
    members: dict[str, bytes]


@dataclass
class ShardEntry:
    """What the manifest says of one shard."""

    file: str
    bytes: int
    sha256: str
    index_sha256: str
    samples: int
    frames: int
    statistics: dict[str, Any] = field(default_factory=dict)  # sums over latents; see Moments


@dataclass
class Manifest:
    """The description of a folder of shards; `details` holds what is particular to its kind."""

    folder: Path
    kind: str
    shards: list[ShardEntry]
    classes: list[str]
    details: dict[str, Any]

    @property
    def num_frames(self) -> int:
        """Frames over all shards."""
        return sum(shard.frames for shard in self.shards)


class Moments:
    """Count, sum and sum of squares per channel in float64: merged over shards into mean and std."""

    def __init__(self, channels: int) -> None:
        self.count, self.total, self.squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, latents: np.ndarray) -> None:
        """Take in latents [..., C]."""
        flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
        self.count += len(flat)
        self.total += flat.sum(0)
        self.squares += (flat**2).sum(0)

    def as_json(self) -> dict[str, Any]:
        """The sums, for a shard's entry."""
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}

    @staticmethod
    def merge(parts: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation over all shards' sums."""
        parts = [part for part in parts if part]
        count = sum(part["count"] for part in parts)
        mean = np.sum([part["total"] for part in parts], axis=0) / count
        variance = np.sum([part["squares"] for part in parts], axis=0) / count - mean**2
        return mean.tolist(), np.sqrt(np.maximum(variance, 0)).tolist()


def encode_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file (C order, no pickle)."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def write_shard(folder: Path, name: str, samples: Iterable[Sample], moments: Moments | None = None) -> ShardEntry:
    """Write tar, index and done marker of one shard, each atomically, the marker last.

    `samples` is consumed while writing, so a shard may be larger than memory; `moments` is read after that.
    """
    import webdataset  # it imports torch, which takes a second that readers need not wait

    tar = folder / f"{name}.tar"
    with replacing(tar) as temporary:
        with temporary.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                info = json.dumps(sample.info, sort_keys=True).encode()
                writer.write({"__key__": sample.key, "json": info, **sample.members})
        rows = index_tar(temporary)
        index = folder / f"{name}.index.npy"
        with replacing(index) as unnamed, unnamed.open("wb") as stream:
            np.save(stream, rows, allow_pickle=False)
        entry = ShardEntry(
            file=tar.name,
            bytes=temporary.stat().st_size,
            sha256=sha256(temporary),
            index_sha256=sha256(index),
            samples=len(np.unique(rows["sample"])),
            frames=int(rows["frames"][rows["member"] == 0].sum()),
            statistics=moments.as_json() if moments else {},
        )
    write_json(folder / f"{name}.done.json", asdict(entry))
    return entry


def finished_shard(folder: Path, name: str) -> ShardEntry | None:
    """The entry of a shard that an earlier run completed, or None."""
    marker, tar = folder / f"{name}.done.json", folder / f"{name}.tar"
    try:
        entry = ShardEntry(**json.loads(marker.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    complete = tar.is_file() and tar.stat().st_size == entry.bytes
    return entry if complete and (folder / f"{name}.index.npy").is_file() else None


def index_tar(path: Path) -> np.ndarray:
    """Find every array and picture of a shard: rows of INDEX_DTYPE in the order of the tar.

    Raises ShardError for what the format does not allow.
    """
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for number, (members, info, stream) in enumerate(_grouped(path)):
        label, before = info.get("class"), len(rows)
        for member in members:
            kind = MEMBERS.get(member.extension)
            if kind is None and not FRAME_MEMBER.match(member.extension):
                continue
            start, frames = 0, 1
            if kind is not None:
                start, shape = _array(stream, path, member)
                frames = shape[0]
            crc = _checksum(stream, path, member, start)
            number_of_class = -1 if label is None else int(label)
            rows.append((number, member.offset + start, member.size - start, frames, number_of_class, crc, kind or 0))
        if all(row[-1] for row in rows[before:]):
            raise ShardError(path, members[0].offset, f"{members[0].key} has neither latents nor pictures")
    return np.array(rows, dtype=INDEX_DTYPE)


def parse_index(content: bytes) -> np.ndarray:
    """The rows of a NAME.index.npy. Raises ValueError unless it is exactly what `write_shard` writes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(np.empty(0, INDEX_DTYPE)))
    start, end = header.getvalue()[10:].rstrip(b" \n").removesuffix(b"}").rstrip().split(b"(0,)")
    pattern = rb"\x93NUMPY\x01\x00(..)" + re.escape(start) + rb"\((\d{1,18}),\)" + re.escape(end) + rb" *\} *\n"
    found = re.match(pattern, content, re.DOTALL)
    if found is None or int.from_bytes(found[1], "little") != found.end() - 10:
        raise ValueError("not an index of this version of ardiff")
    data = content[found.end() :]
    if len(data) != int(found[2]) * INDEX_DTYPE.itemsize:
        raise ValueError(f"{len(data)} bytes of data for {int(found[2])} rows")
    return np.frombuffer(data, dtype=INDEX_DTYPE)


def read_samples(path: Path) -> Iterator[Sample]:
    """Iterate a shard sample by sample, without the index (for tools; training uses `ShardSet`).

    Raises ShardError where the tar is not what a shard may be.
    """
    for members, info, stream in _grouped(path):
        sample = Sample(members[0].key, info, {})
        for member in members:
            if member.extension != "json":
                sample.members[member.extension] = read_member(stream, member, path)
        yield sample


def _grouped(path: Path) -> Iterator[tuple[list[Member], dict[str, Any], BinaryIO]]:
    """Per sample: its members, its description ({} without one) and the open tar."""
    with path.open("rb") as stream:
        seen: set[str] = set()
        for key, group in itertools.groupby(read_members(stream, path), lambda member: member.key):
            members = list(group)
            if key in seen:
                raise ShardError(path, members[0].offset, f"the members of {key} are not together")
            if len({member.extension for member in members}) != len(members):
                raise ShardError(path, members[0].offset, f"{key} has two members of one name")
            seen.add(key)
            yield members, _description(members, stream, path), stream


def _description(members: list[Member], stream: BinaryIO, path: Path) -> dict[str, Any]:
    found = [member for member in members if member.extension == "json"]
    if not found:
        return {}
    member = found[0]
    if member.size > MAX_JSON:
        raise ShardError(path, member.offset, f"{member.name} has {member.size} bytes, more than {MAX_JSON}")
    try:
        info = json.loads(read_member(stream, member, path))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ShardError(path, member.offset, f"{member.name} is not JSON ({error})") from error
    label = info.get("class") if isinstance(info, dict) else False
    if not (label is None or (type(label) is int and 0 <= label < 2**31)):
        raise ShardError(path, member.offset, f"{member.name} is not the description of a sample")
    return info


def _array(stream: BinaryIO, path: Path, member: Member) -> tuple[int, tuple[int, ...]]:
    """Where the numbers of a .npy member start and their shape [frames, tokens, channels] or, of text, [tokens, D]."""
    stream.seek(member.offset)
    try:
        header = stream.read(min(member.size, MAX_HEADER))
        return parse_array(header, 2 if member.extension == TEXT_MEMBER else 3, member.size)
    except ValueError as error:
        raise ShardError(path, member.offset, f"{member.name} {error}") from error


def _checksum(stream: BinaryIO, path: Path, member: Member, start: int) -> int:
    """The crc32 of a member from byte `start` on, whatever its size."""
    stream.seek(member.offset + start)
    crc, left = 0, member.size - start
    while left:
        data = stream.read(min(left, CHUNK))
        if not data:
            raise ShardError(path, member.offset, f"the file ends inside {member.name}")
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def parse_array(data: bytes, axes: int, size: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Where the numbers of a float16 .npy file start, and their shape; of `size` bytes, `data` may be the first ones.

    The header must be exactly what numpy writes for such an array: no parser runs on what a shard says. Raises
    ValueError, in words that go on after the name of the file.
    """
    size = len(data) if size is None else size
    header = NPY_HEADER.match(data)
    shape = tuple(int(size) for size in header[2].split(b",")) if header else ()
    if header is None or len(shape) != axes or int.from_bytes(header[1], "little") != header.end() - 10:
        raise ValueError("must be a float16 .npy array, not empty, in C order")
    if size - header.end() != 2 * math.prod(shape):
        raise ValueError(f"has {size - header.end()} bytes of data for float16 {shape}")
    return header.end(), shape


def write_manifest(
    folder: Path, kind: str, shards: list[ShardEntry], classes: list[str], details: dict[str, Any]
) -> Manifest:
    """Write manifest.json (atomically, after all shards are complete)."""
    common = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
    }
    assert not common.keys() & details.keys(), f"details may not be called {sorted(common)}"
    write_json(folder / MANIFEST, {**common, **details})
    return Manifest(folder, kind, shards, classes, details)


def _well_formed(shard: ShardEntry) -> bool:
    """Names and checksums become names of files, so they may hold nothing but themselves."""
    texts = (shard.file, shard.sha256, shard.index_sha256)
    if not all(isinstance(text, str) for text in texts) or not SHARD_NAME.fullmatch(shard.file):
        return False
    if not (SHA256.fullmatch(shard.sha256) and SHA256.fullmatch(shard.index_sha256)):
        return False
    counts = (shard.bytes, shard.samples, shard.frames)
    return all(type(count) is int and 0 <= count < 2**62 for count in counts) and isinstance(shard.statistics, dict)


def _in_words(error: Exception) -> str:
    """What is wrong with a manifest, for a reader who does not know Python."""
    if isinstance(error, json.JSONDecodeError):
        return json_problem(error)
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it is not an object with a list of shards"


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json given its path or its folder. Raises UserError when it is missing or malformed."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        version = value.pop("format")
        shards = [ShardEntry(**shard) for shard in value.pop("shards")]
        kind, classes = value.pop("kind"), value.pop("classes")
    except FileNotFoundError:
        raise UserError(
            f"{file}: not found; shards are made by data_tools.extract_latents (latents) or data_tools.shard_videos"
            " (frames), which write it last"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a manifest of shards ({_in_words(error)})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format {version}, this version of ardiff reads format {FORMAT_VERSION}")
    for shard in shards:
        if not _well_formed(shard):
            raise UserError(f"{file}: not a manifest of shards (the entry of {str(shard.file)[:80]!r} is malformed)")
    if len({shard.file for shard in shards}) != len(shards):
        raise UserError(f"{file}: lists a shard twice")
    return Manifest(file.parent, kind, shards, classes, value)
