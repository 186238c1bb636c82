"""Shards: WebDataset tars with an index beside each and one manifest for the folder.

A folder of `kind` "latents" holds one sample per video: `KEY.latents.npy` (float16 [N, L, C]) and `KEY.json`.
A folder of `kind` "frames" holds one sample per video: `KEY.json` and `KEY.00000.jpg`, `KEY.00001.jpg`, ...

    NAME.tar        the samples, readable by any WebDataset client
    NAME.index.npy  where each array (latents) or picture (frames) lies in the tar: INDEX_DTYPE, memory-mappable
    NAME.done.json  written last: the shard is complete; its manifest entry and statistics
    manifest.json   all of them, and what they have in common

Nothing here is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from ardiff.errors import UserError
from ardiff.files import replacing, sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATENTS_MEMBER = "latents.npy"
FRAME_MEMBER = re.compile(r"\d{5}\.(jpg|png|webp)$")
INDEX_DTYPE = np.dtype(
    [
        ("sample", "<i8"),  # which sample of this shard
        ("offset", "<i8"),  # first byte of the data in the tar
        ("bytes", "<i8"),
        ("frames", "<i4"),  # frames in this record: N for latents, 1 for a picture
        ("label", "<i4"),  # class, or -1
        ("crc32", "<u4"),
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
            frames=int(rows["frames"].sum()),
            statistics=moments.as_json() if moments else {},
        )
    write_json(folder / f"{name}.done.json", asdict(entry))
    return entry


def finished_shard(folder: Path, name: str) -> ShardEntry | None:
    """The entry of a shard that an earlier run completed, or None."""
    marker, tar = folder / f"{name}.done.json", folder / f"{name}.tar"
    try:
        entry = ShardEntry(**json.loads(marker.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    complete = tar.is_file() and tar.stat().st_size == entry.bytes
    return entry if complete and (folder / f"{name}.index.npy").is_file() else None


def index_tar(path: Path) -> np.ndarray:
    """Find every array and picture of a shard: rows of INDEX_DTYPE in the order of the tar.

    Raises UserError for members that the format does not allow.
    """
    rows: list[tuple[int, int, int, int, int, int]] = []
    labels: dict[str, int] = {}
    keys: list[str] = []
    with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if not keys or keys[-1] != key:
                keys.append(key)
            if extension == "json":
                raw.seek(member.offset_data)
                label = json.loads(raw.read(member.size)).get("class")
                labels[key] = -1 if label is None else int(label)
            elif extension == LATENTS_MEMBER:
                raw.seek(member.offset_data)
                payload = io.BytesIO(raw.read(member.size))  # the header's parser must not read beyond the member
                shape = _read_latents_header(payload, f"{path}: {member.name}")
                offset = payload.tell()
                data = payload.read()
                if len(data) != 2 * math.prod(shape):
                    raise UserError(f"{path}: {member.name} has {len(data)} bytes of data for float16 {shape}")
                rows.append((len(keys) - 1, member.offset_data + offset, len(data), shape[0], 0, zlib.crc32(data)))
            elif FRAME_MEMBER.match(extension):
                raw.seek(member.offset_data)
                data = raw.read(member.size)
                rows.append((len(keys) - 1, member.offset_data, len(data), 1, 0, zlib.crc32(data)))
    table = np.array(rows, dtype=INDEX_DTYPE)
    table["label"] = [labels.get(keys[sample], -1) for sample in table["sample"]]
    return table


def _read_latents_header(stream: io.BytesIO, name: str) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = read_header[version](stream)
    except Exception as error:  # numpy parses the header as Python source and lets its parser's errors through
        raise UserError(f"{name} is not a plain .npy file ({error})") from error
    if fortran or dtype != np.float16 or len(shape) != 3:
        raise UserError(f"{name} must be float16 [frames, tokens, channels] in C order, found {dtype} {shape}")
    return shape


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a manifest of shards ({error!r})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format {version}, this version of ardiff reads format {FORMAT_VERSION}")
    return Manifest(file.parent, kind, shards, classes, value)


def read_samples(tar: Path) -> Iterator[Sample]:
    """Iterate a shard sample by sample, without the index (for tools; training uses `ShardSet`)."""
    sample: Sample | None = None
    with tarfile.open(tar, "r:") as stream:
        for member in stream:
            key, _, extension = member.name.partition(".")
            source = stream.extractfile(member)
            data = source.read() if source else b""
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key, {}, {})
            if extension == "json":
                sample.info = json.loads(data)
            else:
                sample.members[extension] = data
    if sample is not None:
        yield sample
