"""Shards that are to be written: which are complete, what is said of the videos that are not in them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.data.shards import MANIFEST, MEMBERS, TEXT_MEMBER, ShardEntry, finished_shard, write_manifest
from data_tools.common import plural


def complete_shard(folder: Path, name: str, samples: int) -> ShardEntry | None:
    """The entry of a shard that holds all its samples; one that had to do without a video is tried again."""
    entry = finished_shard(folder, name)
    return entry if entry is not None and entry.samples == samples else None


def remove_shard(folder: Path, name: str) -> None:
    """Delete a shard of which nothing is left; the marker first, so that half of it never counts."""
    for suffix in ("done.json", "index.npy", "tar"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def forget_manifest(folder: Path) -> None:
    """A folder whose shards are being written has no manifest: it is written when all are complete."""
    (folder / MANIFEST).unlink(missing_ok=True)


def finish_folder(
    folder: Path, kind: str, shards: list[ShardEntry], class_names: list[str], details: dict[str, Any]
) -> str:
    """Write the manifest of a folder whose shards are complete; returns one line about it."""
    if not shards:
        return f"{folder}: none of its videos can be used, so it has no manifest"
    manifest = write_manifest(folder, kind, shards, class_names, details)
    videos, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards) / 1e6
    counts = f"{plural(videos, 'video')}, {plural(manifest.num_frames, 'frame')}, {plural(len(shards), 'shard')}"
    return f"{folder}: {counts} ({size:.1f} MB)"


def tell_skipped(skipped: Mapping[str, str]) -> None:
    """Name the sources (path -> reason) that were left out, on stderr."""
    for path, reason in sorted(skipped.items()):
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if skipped:
        print(f"{plural(len(skipped), 'file')} skipped", file=sys.stderr)


def longest_text(folder: Path, shards: Sequence[ShardEntry]) -> int:
    """The largest number of tokens that the text features of any sample have."""
    longest = 0
    for shard in shards:
        rows = np.load((folder / shard.file).with_suffix(".index.npy"), allow_pickle=False)
        longest = max(longest, int(rows["frames"][rows["member"] == MEMBERS[TEXT_MEMBER]].max(initial=0)))
    return longest
