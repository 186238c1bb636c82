"""What a fast order must still be: every clip once, the bytes that were written, and the same for any ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ardiff.config import Config
from ardiff.data.clips import Clips, Collate, LatentClips
from ardiff.data.mixture import Mixture, open_data
from ardiff.data.plan import Visits
from ardiff.data.stream import BatchStream, GlobalBatch
from tests.benchmarks.latent_sets import FRAMES
from tests.benchmarks.readers import BATCH, CROP, configuration, training_clips

SETUPS = ((1, 1), (1, 4), (2, 2), (2, 16), (4, 1), (4, 8))  # ranks and batches that each prepares ahead
MICRO = 4  # clips of a micro-batch, so that four ranks can share a batch


class Check(NamedTuple):
    """One property, whether it holds, and what was looked at."""

    name: str
    holds: bool
    detail: str


def run_checks(shards: Path, array: Path, num_batches: int = 64) -> list[Check]:
    """All checks on one set of shards and the same latents as one array."""
    config = configuration(shards, f"train.micro_batch_size={MICRO}")
    data = open_data(config, "latents", CROP)
    checks = [every_clip_once(data), shards_in_a_batch(data), same_bytes(data, config, array, num_batches)]
    for order in ("global", "lanes"):
        config = configuration(shards, f"train.micro_batch_size={MICRO}", f"data.order={order}")
        checks += same_for_any_ranks(config, num_batches)
    return checks


def every_clip_once(data: Mixture) -> Check:
    """Two epochs: each visits every video as often as it has clips, in another order."""
    size = data.visits_per_epoch
    epochs = [data.visits(number * size, size).video for number in range(2)]
    holds = all((np.bincount(videos, minlength=len(data)) == FRAMES // CROP).all() for videos in epochs)
    # neighbours in the order are as far apart in the shards as two videos drawn at random: a third of the set
    distance = float(np.abs(np.diff(epochs[0])).mean()) / len(data)
    holds = holds and not np.array_equal(epochs[0], epochs[1]) and abs(distance - 1 / 3) < 0.02
    detail = f"2 epochs of {size:,} clips; neighbours are {distance:.3f} of the set apart (at random: 0.333)"
    return Check("order global: every clip once per epoch, epochs differ", holds, detail)


def shards_in_a_batch(data: Mixture) -> Check:
    """How many shards the clips of a batch come from."""
    num_shards = len(data.manifest.shards)
    shard = data.sets[0].shard_of_video[data.visits(0, data.visits_per_epoch // BATCH * BATCH).video]
    found = float(np.mean([len(np.unique(row)) for row in shard.reshape(-1, BATCH)]))
    sizes = np.bincount(data.sets[0].shard_of_video) / len(data)
    expected = float((1 - (1 - sizes) ** BATCH).sum())
    detail = f"{found:.2f} of {num_shards} (at random: {expected:.2f})"
    return Check("order global: shards in a batch of 16, as at random", abs(found - expected) < 0.1 * expected, detail)


class WithVisits:
    """Collates the latents as they lie on the disk, and which ones they are."""

    def __init__(self, clips: LatentClips) -> None:
        self.clips, self.at_once = clips, clips.at_once

    def __call__(self, planned: Visits) -> Clips:
        """latents float16 [B, F, L, C]; video, first_frame [B]."""
        latents, _, visits, bad = self.clips.read(planned)
        tensors = {name: torch.from_numpy(getattr(visits, name)) for name in ("video", "first_frame")}
        return Clips({"latents": torch.from_numpy(latents), **tensors}, bad)

    def counted_frames(self, planned: Visits) -> np.ndarray:
        """Frames of each clip."""
        return self.clips.counted_frames(planned)


def same_bytes(data: Mixture, config: Config, array: Path, num_batches: int) -> Check:
    """What the loader delivers is what np.memmap reads of the same clips."""
    mapped = np.load(array, mmap_mode="r")
    clips = training_clips(data, config)

    equal, seen = True, 0
    stream = _stream(data, WithVisits(clips), 0, 1, 0, 4)
    for batch in (next(stream) for _ in range(num_batches)):
        for part in batch.micro_batches:
            rows = zip(part["latents"].numpy(), part["video"].tolist(), part["first_frame"].tolist(), strict=True)
            for latents, video, first in rows:
                equal = equal and np.array_equal(latents, mapped[video, first : first + CROP])
                seen += 1
    stream.close()
    return Check("the same bytes as np.memmap", equal and seen == num_batches * BATCH, f"{seen:,} clips")


def same_for_any_ranks(config: Config, num_batches: int) -> list[Check]:
    """Every tensor of a training batch, noise and timesteps included, whatever ranks, prefetch and restarts."""
    data = open_data(config, "latents", CROP)
    clips = training_clips(data, config)
    order = config.data.order
    digests = [_digests(data, clips, ranks, prefetch, 0, num_batches) for ranks, prefetch in SETUPS]
    setups = ", ".join(f"({ranks}, {prefetch})" for ranks, prefetch in SETUPS)
    checks = [Check(f"order {order}: same batches for (ranks, prefetch)", _all_equal(digests), setups)]
    third = num_batches // 3
    pieces = ((4, 0, third), (1, third, third), (2, 2 * third, num_batches - 2 * third))
    restarted = [d for ranks, first, n in pieces for d in _digests(data, clips, ranks, 3, first * BATCH, n)]
    detail = "4, then 1, then 2 ranks against 1 rank"
    checks.append(Check(f"order {order}: same across restarts", restarted == digests[0], detail))
    end = data.visits_per_epoch // BATCH * BATCH - 2 * BATCH
    across = [_digests(data, clips, ranks, 4, end, 4) for ranks in (1, 2, 4)]
    checks.append(Check(f"order {order}: same across the end of an epoch", _all_equal(across), "1, 2 and 4 ranks"))
    return checks


def _all_equal(values: Sequence[object]) -> bool:
    return all(value == values[0] for value in values)


def _stream(data: Mixture, collate: Collate, rank: int, ranks: int, position: int, prefetch: int) -> BatchStream:
    return BatchStream(
        data,
        collate,
        global_batch_size=BATCH,
        micro_batch_size=MICRO,
        rank=rank,
        world_size=ranks,
        position=position,
        prefetch=prefetch,
    )


def _digests(
    data: Mixture, clips: LatentClips, ranks: int, prefetch: int, position: int, num_batches: int
) -> list[str]:
    """A checksum of every global batch, put together from the shares of all ranks."""
    streams = [_stream(data, clips, rank, ranks, position, prefetch) for rank in range(ranks)]
    digests = [_digest([next(stream) for stream in streams]) for _ in range(num_batches)]
    for stream in streams:
        stream.close()
    return digests


def _digest(shares: Sequence[GlobalBatch]) -> str:
    digest = hashlib.sha256(str(shares[0].position).encode())
    parts = [part for share in shares for part in share.micro_batches]
    for name in sorted(parts[0]):
        digest.update(torch.cat([part[name] for part in parts]).numpy().tobytes())
    return digest.hexdigest()
