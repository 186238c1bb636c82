"""Small data sets to be mutated, and how somebody who mutates one makes its checksums fit again."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ardiff.data.shards import (
    Manifest,
    Moments,
    Sample,
    ShardEntry,
    encode_array,
    index_tar,
    parse_index,
    read_manifest,
    write_manifest,
    write_shard,
)
from ardiff.errors import UserError
from ardiff.files import sha256, write_json
from mutations.target import make_tar, read

TOKENS, CHANNELS, TEXT_DIM, SIZE = 2, 4, 3, 16
CLASSES = ["run", "sit", "wave"]
LENGTHS = ((3, 1), (2,))
FORMATS = (("jpg", "JPEG"), ("png", "PNG"))


def describe(video: int, length: int) -> dict:
    """What the tools write into KEY.json."""
    label = None if video == 1 else video % 3
    return {
        "id": f"{video:06d}", "path": f"/videos/{video}.mp4", "sha256": f"{video:064x}", "fps": "25/1",
        "first_frame": 0, "width": 64, "height": 48, "label": None if label is None else CLASSES[label],
        "class": label, "caption": "a ball", "num_frames": length, "stride": 1,
    }  # fmt: skip


def write_latent_set(folder: Path) -> Manifest:
    """Two shards of latents, mirrored latents and text."""
    shards, video = [], 0
    for number, lengths in enumerate(LENGTHS):
        samples, moments = [], Moments(CHANNELS)
        for length in lengths:
            rng = np.random.default_rng(video)
            latents, flipped = rng.normal(0.3, 2, (2, length, TOKENS, CHANNELS)).astype(np.float16)
            text = rng.normal(size=(1 + video % 2, TEXT_DIM)).astype(np.float16)
            moments.add(latents)
            arrays = {"latents.npy": latents, "flipped.npy": flipped, "text.npy": text}
            members = {name: encode_array(array) for name, array in arrays.items()}
            samples.append(Sample(f"{video:06d}", {**describe(video, length), "arvae": "0" * 16}, members))
            video += 1
        shards.append(write_shard(folder, f"latents-{number:06d}", samples, moments))
    mean, std = Moments.merge(shard.statistics for shard in shards)
    details = {
        "tokens": TOKENS, "channels": CHANNELS, "flipped": True, "text_dim": TEXT_DIM,
        "text_tokens": 2, "mean": mean, "std": std, "fps": 25.0,
        "arvae": {"id": "0" * 16, "path": "nowhere"},
    }  # fmt: skip
    return write_manifest(folder, "latents", shards, CLASSES, details)


def write_frame_set(folder: Path) -> Manifest:
    """Two shards of pictures in two formats."""
    shards, video = [], 0
    for number, (lengths, (extension, form)) in enumerate(zip(LENGTHS, FORMATS, strict=True)):
        samples = []
        for length in lengths:
            members = {f"{frame:05d}.{extension}": _picture(video, frame, form) for frame in range(length)}
            samples.append(Sample(f"{video:06d}", describe(video, length), members))
            video += 1
        shards.append(write_shard(folder, f"frames-{number:06d}", samples))
    return write_manifest(folder, "frames", shards, CLASSES, {"size": SIZE, "fps": "25/1"})


def _picture(video: int, frame: int, form: str) -> bytes:
    coarse = np.random.default_rng((video, frame)).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((SIZE, SIZE)).save(buffer, form)
    return buffer.getvalue()


def reseal(folder: Path, keep_index: bool) -> bool:
    """Write sizes, checksums, counts and statistics that fit what is there; whether that could be done.

    Indexes are made anew unless `keep_index`.
    """
    try:
        manifest = read_manifest(folder)
        entries = [_resealed(folder, entry, keep_index) for entry in manifest.shards]
        details = dict(manifest.details)
        if manifest.kind == "latents":
            details["mean"], details["std"] = Moments.merge(entry.statistics for entry in entries)
        write_manifest(folder, manifest.kind, entries, manifest.classes, details)
    except (UserError, OSError, TypeError, KeyError, AttributeError, ValueError, AssertionError, OverflowError):
        return False
    return True


def _resealed(folder: Path, entry: ShardEntry, keep_index: bool) -> ShardEntry:
    tar = folder / entry.file
    index = tar.with_suffix(".index.npy")
    if not keep_index:
        with suppress(UserError):
            np.save(index, index_tar(tar), allow_pickle=False)
    entry = replace(entry, bytes=tar.stat().st_size, sha256=sha256(tar), index_sha256=sha256(index))
    with suppress(ValueError):
        rows = parse_index(index.read_bytes())
        main = rows[rows["member"] == 0]
        frames, samples = int(main["frames"].sum()), len(np.unique(rows["sample"]))
        entry = replace(entry, frames=max(1, frames), samples=max(1, samples))
        if entry.statistics:
            entry = replace(entry, statistics=_sums(tar.read_bytes(), main))
    write_json(tar.with_suffix(".done.json"), asdict(entry))
    return entry


def _sums(content: bytes, rows: np.ndarray) -> dict:
    moments = Moments(CHANNELS)
    for row in rows:
        values = np.frombuffer(content, "<f2", int(row["bytes"]) // 2, int(row["offset"])).astype(float)
        moments.add(np.nan_to_num(values, nan=0, posinf=0, neginf=0).reshape(-1, CHANNELS))
    return {**moments.as_json(), "count": max(1, moments.count)}


def change(path: Path, offset: int, bits: int = 1) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(bytes(data))


def members_of(path: Path) -> list[tuple[str, bytes]]:
    """Names and contents of a tar as Python's own reader sees them."""
    with tarfile.open(path) as tar:
        return [(member.name, read(tar, member)) for member in tar]


def sealed(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write another tar in place of `path` and make all checksums fit, so that only its content can be wrong."""
    path.write_bytes(make_tar(members))
    assert reseal(path.parent, keep_index=False)


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples as Python's own tar reader sees them."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        for name, content in members_of(path):
            key, extension = name.split(".", 1)
            assert extension not in samples.setdefault(key, {})
            samples[key][extension] = content
    return samples


def check_valid(folder: Path, kind: str) -> None:
    """Assert, without any reader of this project, that every sample can be used."""
    samples = samples_of(folder)
    assert samples
    for key, members in samples.items():
        info = json.loads(members["json"])
        assert info.get("id", key) == key
        assert info.get("class") is None or info.get("label") in (None, CLASSES[info["class"]])
        if kind == "latents":
            arrays = {n: np.load(io.BytesIO(d), allow_pickle=False) for n, d in members.items() if n.endswith(".npy")}
            assert arrays["latents.npy"].shape[1:] == (TOKENS, CHANNELS)
            assert all(array.dtype == np.float16 and np.isfinite(array).all() for array in arrays.values())
            assert arrays.get("flipped.npy", arrays["latents.npy"]).shape == arrays["latents.npy"].shape
            assert info.get("num_frames", len(arrays["latents.npy"])) == len(arrays["latents.npy"])
        else:
            pictures = [data for name, data in members.items() if name[:5].isdigit()]
            assert pictures and info.get("num_frames", len(pictures)) == len(pictures)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert all(Image.open(io.BytesIO(data)).convert("RGB").size == (SIZE, SIZE) for data in pictures)
