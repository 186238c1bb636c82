"""Encode the videos of a corpus into latent shards with a trained AR-VAE.

    python -m data_tools.extract_latents --corpus corpus.jsonl --arvae runs/arvae --out latents/

The train split goes to --out, the validation split to --out/validation, each with its manifest.json. Shards that are
complete are kept, so a run that was killed and started again finishes the rest.

Exit code 0: all videos are in the shards; 1: some could not be decoded any more and were left out; 2: a mistake in
the command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ardiff import cli
from ardiff.data.corpus import SPLITS, CorpusEntry, classes, read_corpus, usable
from ardiff.data.shards import (
    LATENTS_MEMBER,
    Moments,
    Sample,
    encode_array,
    finished_shard,
    write_manifest,
    write_shard,
)
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.models import ARVAE
from ardiff.sampling.generate import default_device
from ardiff.training.weights import load_arvae
from ardiff.video import VideoError, decode, resize_and_crop
from data_tools.common import claim_folder, output_folder, require
from data_tools.shard_videos import common_fps, plan_shards, unchanged, video_info


class Extractor:
    """Encodes videos and writes shards; `skipped` collects the videos that could not be decoded."""

    def __init__(self, network: ARVAE, arvae_id: str, class_names: list[str], stride: int, batch_size: int) -> None:
        self.device = default_device()
        self.network, self.arvae_id = network.to(self.device), arvae_id
        self.class_names, self.stride, self.batch_size = class_names, stride, batch_size
        self.skipped: list[str] = []

    @torch.no_grad()
    def encode(self, entry: CorpusEntry) -> np.ndarray:
        """Posterior means of a video's frames, float16 [N, L, C]."""
        size = self.network.config.image_size
        latents, batch = [], []
        for frame in decode(unchanged(entry), entry.first_frame, entry.num_frames, self.stride):
            batch.append(resize_and_crop(frame, size))
            if len(batch) == self.batch_size:
                latents.append(self._encode(batch))
                batch = []
        if batch:
            latents.append(self._encode(batch))
        return np.concatenate(latents)

    def _encode(self, frames: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(frames)).to(self.device).permute(0, 3, 1, 2)[None].float() / 255
        latents = self.network.encode(pixels)[0].half().cpu().numpy()
        if not np.isfinite(latents).all():
            raise UserError("the AR-VAE gives latents that are not finite; train it again or choose another checkpoint")
        return latents

    def samples(self, entries: list[CorpusEntry], moments: Moments, bar: tqdm) -> Iterator[Sample]:
        """One sample per video that can be decoded."""
        for entry in entries:
            try:
                latents = self.encode(entry)
            except VideoError as error:
                self.skipped.append(f"{entry.path}: {error.reason}")
                continue
            moments.add(latents)
            bar.update(len(latents))
            info = {**video_info(entry, self.class_names), "num_frames": len(latents), "stride": self.stride}
            yield Sample(entry.id, {**info, "arvae": self.arvae_id}, {LATENTS_MEMBER: encode_array(latents)})


def extract_split(extractor: Extractor, entries: list[CorpusEntry], folder: Path, details: dict[str, Any]) -> str:
    """Write all shards of one split and its manifest; returns a line about it."""
    plan = plan_shards(entries, extractor.stride, details["frames_per_shard"])
    total = sum(-(-entry.num_frames // extractor.stride) for entry in entries)
    shards = []
    with tqdm(total=total, unit="frames", desc=str(folder), disable=None) as bar:
        for number, chosen in enumerate(plan):
            name = f"latents-{number:06d}"
            entry = finished_shard(folder, name)
            if entry is None or entry.samples != len(chosen):
                moments = Moments(extractor.network.config.channels)
                entry = write_shard(folder, name, extractor.samples(chosen, moments, bar), moments)
            else:
                bar.update(entry.frames)
            if entry.samples:
                shards.append(entry)
    if not shards:
        raise UserError(f"{folder}: none of its {len(entries)} videos could be decoded; scan them again")
    mean, std = Moments.merge(shard.statistics for shard in shards)
    fps = common_fps(entries)
    details = {**details, "mean": mean, "std": std, "fps": float(Fraction(fps)) / extractor.stride if fps else None}
    manifest = write_manifest(folder, "latents", shards, extractor.class_names, details)
    videos = sum(shard.samples for shard in shards)
    return f"{folder}: {videos} videos, {manifest.num_frames} frames, {len(shards)} shards"


def _parse(arguments: list[str] | None) -> Any:
    parser = cli.parser(
        "Encode the videos of a corpus into latent shards with a trained AR-VAE.",
        "python -m data_tools.extract_latents --corpus corpus.jsonl --arvae runs/arvae --out latents/",
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="made by scan_videos")
    parser.add_argument(
        "--arvae", type=Path, required=True, metavar="CHECKPOINT", help="a run_dir, a checkpoint of it, or an export"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="frames encoded at a time (default %(default)s)")
    parser.add_argument(
        "--frames_per_shard", type=int, default=262_144, help="about 64 MB at 32 x 4 numbers (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("stride", "batch_size", "frames_per_shard"):
        require(f"--{name}", getattr(options, name), 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    options = _parse(arguments)
    corpus = read_corpus(options.corpus)
    entries = usable(options.corpus, corpus)
    if not any(entry.split == "train" for entry in entries):
        raise UserError(f"{options.corpus}: all videos are in the validation split; none is left to train on")
    network, arvae_id = load_arvae(options.arvae)
    details = {
        "tokens": network.config.num_tokens,
        "channels": network.config.channels,
        "size": network.config.image_size,
        "stride": options.stride,
        "frames_per_shard": options.frames_per_shard,
        "corpus_sha256": sha256(options.corpus),
    }
    out = output_folder(options.out)
    claim_folder(out, {**details, "arvae_id": arvae_id}, results="**/*.tar")
    details["arvae"] = {"id": arvae_id, "path": str(options.arvae.resolve())}
    extractor = Extractor(network, arvae_id, classes(corpus), options.stride, options.batch_size)
    for split in SPLITS:
        chosen = [entry for entry in entries if entry.split == split]
        if chosen:
            folder = out if split == "train" else output_folder(out / split)
            print(extract_split(extractor, chosen, folder, {**details, "split": split}))
    for line in extractor.skipped:
        print(f"skipped {line}", file=sys.stderr)
    return cli.EXIT_FAILURE if extractor.skipped else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
