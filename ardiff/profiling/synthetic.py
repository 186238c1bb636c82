"""Random latents in the format of real ones, so that reading and drawing cost what they cost in training."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ardiff.config import Config
from ardiff.data.shards import Moments, Sample, encode_array, write_manifest, write_shard
from ardiff.training.distributed import World

LENGTH = 4  # clips that a video is long
TEXT_TOKENS = 77  # of models with text


@contextmanager
def synthetic_latents(config: Config, world: World, parent: Path) -> Iterator[Path]:
    """A folder of latent shards for every node, equal everywhere, for as long as the block lasts (collective).

    parent: may be shared by the nodes or not.
    """
    folder = parent / f"latents-{platform.node()}"
    try:
        if world.local_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_latents(folder, config)
        world.barrier()
        yield folder
        world.barrier()
    finally:
        if world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def write_latents(folder: Path, config: Config) -> None:
    """One shard of videos whose latents are numbers of variance 1."""
    model = config.model
    classes = [f"class {number}" for number in range(model.num_classes)]
    moments = Moments(model.in_channels)
    length = max(LENGTH * model.num_frames * config.data.stride, (model.num_frames - 1) * config.data.stride + 1)

    def samples() -> Iterator[Sample]:
        for video in range(max(64, config.train.global_batch_size // model.num_frames)):
            draw = np.random.default_rng(video)
            shape = (length, model.tokens_per_frame, model.in_channels)
            latents = draw.standard_normal(shape, dtype=np.float32).astype(np.float16)
            moments.add(latents)
            members = {"latents.npy": encode_array(latents)}
            if config.data.flip_probability:
                members["flipped.npy"] = members["latents.npy"]
            if model.context_dim:
                text = draw.standard_normal((TEXT_TOKENS, model.context_dim), dtype=np.float32).astype(np.float16)
                members["text.npy"] = encode_array(text)
            label = video % model.num_classes if model.num_classes else None
            info = {"id": f"{video:06d}", "num_frames": length, "fps": "25/1", "class": label}
            yield Sample(f"{video:06d}", info, members)

    shard = write_shard(folder, "latents-000000", samples(), moments)
    mean, std = Moments.merge([shard.statistics])
    details = {"tokens": model.tokens_per_frame, "channels": model.in_channels, "mean": mean, "std": std, "fps": 25.0}
    if model.context_dim:
        details |= {"text_dim": model.context_dim, "text_tokens": TEXT_TOKENS}
    write_manifest(folder, "latents", [shard], classes, {**details, "arvae": {"id": "0" * 16, "path": "none"}})
