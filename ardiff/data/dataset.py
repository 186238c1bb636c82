"""Random access to the shards of one data set: open once, read any frames of any video through the index."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import OrderedDict
from pathlib import Path

import braceexpand
import numpy as np
from PIL import Image

from ardiff.data.shards import INDEX_DTYPE, Manifest, ShardEntry, read_manifest
from ardiff.errors import UserError
from ardiff.files import sha256

# What the manifest of each kind must say.
DETAILS = {"latents": ("tokens", "channels", "mean", "std", "arvae"), "frames": ("size",)}
OPEN_SHARDS = 128  # each memory map holds a file descriptor


class ShardSet:
    """The videos of a folder of shards (or of some of its shards).

    frames [V] and labels [V] describe the videos; `read_latents` and `read_frames` fetch single frames. `identity`
    changes when any shard's content does.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        if not manifest.shards or not manifest.num_frames:
            raise UserError(f"{manifest.folder}: the manifest lists no samples")
        tables = [self._check(shard) for shard in manifest.shards]
        rows_before = np.cumsum([0, *(len(table) for table in tables)])
        samples_before = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self._rows = np.concatenate(tables)
        self._row_shard = np.repeat(np.arange(len(tables)), np.diff(rows_before))
        video_of_row = self._rows["sample"] + samples_before[self._row_shard]
        self._first_row = np.searchsorted(video_of_row, np.arange(samples_before[-1]))
        self.frames = np.bincount(video_of_row, weights=self._rows["frames"], minlength=samples_before[-1]).astype(
            np.int64
        )
        self.labels = self._rows["label"][self._first_row]
        digest = [[shard.file, shard.sha256] for shard in manifest.shards]
        self.identity = hashlib.sha256(json.dumps([manifest.kind, digest]).encode()).hexdigest()
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()

    def __len__(self) -> int:
        return len(self.frames)

    def _check(self, shard: ShardEntry) -> np.ndarray:
        """The index of one shard, once shard and index are seen to be whole."""
        path = self.manifest.folder / shard.file
        if not path.is_file():
            raise UserError(f"{path}: missing, although {self.manifest.folder / 'manifest.json'} lists it")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"{path}: damaged or truncated, {size} bytes where the manifest says {shard.bytes}; "
                "copy it again or make it anew with the tool that wrote it"
            )
        index = path.with_suffix(".index.npy")
        try:
            rows = np.load(index, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{index}: not readable ({error}); make the shard anew") from error
        if rows.dtype != INDEX_DTYPE or rows.ndim != 1 or sha256(index) != shard.index_sha256:
            raise UserError(f"{index}: not the index that the manifest lists; copy it again")
        return rows

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            path = self.manifest.folder / self.manifest.shards[shard].file
            self._maps[shard] = np.memmap(path, dtype=np.uint8, mode="r")
            if len(self._maps) > OPEN_SHARDS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        return self._maps[shard]

    def _bytes(self, row: int) -> np.ndarray:
        record = self._rows[row]
        return self._map(int(self._row_shard[row]))[record["offset"] : record["offset"] + record["bytes"]]

    def read_latents(self, video: int, first: int, count: int, stride: int = 1) -> np.ndarray:
        """Frames first, first + stride, ... of a video: float16 [count, L, C] (a view of the file where it can be)."""
        row = int(self._first_row[video])
        tokens, channels = self.manifest.details["tokens"], self.manifest.details["channels"]
        latents = self._bytes(row).view(np.float16).reshape(int(self._rows[row]["frames"]), tokens, channels)
        return latents[first : first + (count - 1) * stride + 1 : stride]

    def read_frames(self, video: int, first: int, count: int, stride: int = 1) -> np.ndarray:
        """Frames of a video of pictures: uint8 [count, H, W, 3]."""
        start = int(self._first_row[video]) + first
        rows = range(start, start + (count - 1) * stride + 1, stride)
        return np.stack([self._picture(row) for row in rows])

    def _picture(self, row: int) -> np.ndarray:
        data = self._bytes(row).tobytes()
        if zlib.crc32(data) != int(self._rows[row]["crc32"]):
            shard = self.manifest.shards[int(self._row_shard[row])]
            raise UserError(
                f"{self.manifest.folder / shard.file}: damaged at byte {self._rows[row]['offset']}; copy it again"
            )
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def open_shards(source: str | Path, kind: str) -> ShardSet:
    """Open `source`: a folder with manifest.json, the manifest, or its tars as a brace or glob pattern.

    Raises UserError when anything is missing, damaged or of another kind.
    """
    text = str(source)
    path = Path(text)
    if path.is_dir() or path.suffix == ".json":
        manifest = read_manifest(path)
    elif path.suffix != ".tar":
        raise UserError(f"{text}: no such folder, manifest or tar files")
    else:
        try:
            names = [Path(name) for name in braceexpand.braceexpand(text)]
        except ValueError as error:
            raise UserError(f"--data.shards {text}: its braces do not match") from error
        if any(character in text for character in "*?["):
            names = sorted(match for name in names for match in name.parent.glob(name.name))
        if not names:
            raise UserError(f"--data.shards {text}: no file matches")
        manifest = _subset(read_manifest(names[0].parent), names)
    if manifest.kind != kind:
        maker = {"latents": "data_tools.extract_latents", "frames": "data_tools.shard_videos"}[kind]
        raise UserError(f"{manifest.folder}: holds {manifest.kind}, but {kind} are needed (made by {maker})")
    missing = [name for name in DETAILS[kind] if name not in manifest.details]
    if missing:
        raise UserError(f"{manifest.folder / 'manifest.json'}: says nothing of {', '.join(missing)}; make it anew")
    try:
        return ShardSet(manifest)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{manifest.folder / 'manifest.json'}: does not fit its shards ({error!r})") from error


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
