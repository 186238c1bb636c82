"""One synthetic set of latents in every format that is compared, each written once into a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ardiff.data.shards import (
    INDEX_DTYPE,
    Manifest,
    Moments,
    Sample,
    ShardEntry,
    encode_array,
    write_manifest,
    write_shard,
)
from ardiff.files import sha256

FRAMES, TOKENS, CHANNELS = 200, 32, 4
FRAME_BYTES = 2 * TOKENS * CHANNELS
VIDEO_BYTES = FRAMES * FRAME_BYTES
VIDEOS_PER_SHARD = 500
CLASSES = [f"class{number}" for number in range(8)]
CHUNK_BYTES = VIDEOS_PER_SHARD * VIDEO_BYTES  # of the other libraries' shards, about the same size as ours


def latents_of(video: int, frames: int = FRAMES) -> np.ndarray:
    """The latents [N, L, C] of a video: normal numbers."""
    numbers = np.random.default_rng(video).standard_normal((frames, TOKENS, CHANNELS), dtype=np.float32)
    return numbers.astype(np.float16)


def write_shards(folder: Path, num_videos: int, per_shard: int = VIDEOS_PER_SHARD, frames: int = FRAMES) -> Manifest:
    """Our shards, written as data_tools.extract_latents does."""
    shards: list[ShardEntry] = []
    for first in range(0, num_videos, per_shard):
        moments = Moments(CHANNELS)
        videos = range(first, min(num_videos, first + per_shard))
        samples = _samples(videos, frames, moments)
        shards.append(write_shard(folder, f"latents-{len(shards):06d}", samples, moments))
    return write_manifest(folder, "latents", shards, CLASSES, _details(shards))


def _samples(videos: range, frames: int, moments: Moments) -> Iterator[Sample]:
    for video in videos:
        latents = latents_of(video, frames)
        moments.add(latents)
        info = {"id": f"{video:08d}", "num_frames": frames, "fps": "25/1", "class": video % len(CLASSES)}
        yield Sample(f"{video:08d}", info, {"latents.npy": encode_array(latents)})


def _details(shards: list[ShardEntry]) -> dict[str, object]:
    mean, std = Moments.merge(shard.statistics for shard in shards)
    arvae = {"id": "0" * 16, "path": "none"}
    return {"tokens": TOKENS, "channels": CHANNELS, "mean": mean, "std": std, "fps": 25.0, "arvae": arvae}


def write_hollow_shards(folder: Path, num_shards: int, per_shard: int) -> Manifest:
    """Shards with a true index and manifest, whose tars are holes of the right length: they read as zeros.

    Opening them is opening a set of that size, without its bytes on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moments = Moments(CHANNELS)
    moments.add(latents_of(0))
    shards, member = [], 1536 + VIDEO_BYTES  # of a tar: headers and description, then the data
    for number in range(num_shards):
        rows = np.zeros(per_shard, dtype=INDEX_DTYPE)
        rows["sample"] = np.arange(per_shard)
        rows["offset"] = 1536 + rows["sample"] * member
        rows["bytes"], rows["frames"] = VIDEO_BYTES, FRAMES
        tar, index = folder / f"latents-{number:06d}.tar", folder / f"latents-{number:06d}.index.npy"
        np.save(index, rows, allow_pickle=False)
        tar.touch()
        os.truncate(tar, per_shard * member + 1024)
        entry = ShardEntry(
            tar.name,
            tar.stat().st_size,
            f"{number:064x}",
            sha256(index),
            per_shard,
            per_shard * FRAMES,
            moments.as_json(),
        )
        shards.append(entry)
    return write_manifest(folder, "latents", shards, CLASSES, _details(shards))


def write_npy(file: Path, num_videos: int) -> None:
    """One array [V, N, L, C], for np.memmap."""
    array = np.lib.format.open_memmap(file, "w+", np.float16, (num_videos, FRAMES, TOKENS, CHANNELS))
    for video in range(num_videos):
        array[video] = latents_of(video)
    array.flush()


def write_mds(folder: Path, num_videos: int, as_array: bool) -> None:
    """The shards of mosaicml-streaming, with arrays or with plain bytes."""
    from streaming import MDSWriter

    encoding = f"ndarray:float16:{FRAMES},{TOKENS},{CHANNELS}" if as_array else "bytes"
    with MDSWriter(out=str(folder), columns={"latents": encoding}, size_limit=CHUNK_BYTES) as writer:
        for video in range(num_videos):
            latents = latents_of(video)
            writer.write({"latents": latents if as_array else latents.tobytes()})


def write_litdata(folder: Path, num_videos: int, as_array: bool) -> None:
    """The chunks of litdata, with arrays or with plain bytes."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for video in range(num_videos):
        latents = latents_of(video)
        writer[video] = latents if as_array else latents.tobytes()
    writer.done()
    writer.merge(1)


def written_once(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, which `write` makes unless a run before has made it completely."""
    marker = path.with_name(f"{path.name}.complete")
    if not marker.is_file():
        print(f"writing {path.name} ...", flush=True)
        write(path)
        marker.touch()
    return path
