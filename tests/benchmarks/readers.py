"""What is timed: our loader and np.memmap, as batches [16, 16, 32, 4] of float16, clips at a random start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ardiff.config import Config, load
from ardiff.data.clips import Clips, LatentClips
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture, open_data
from ardiff.data.plan import Visits
from ardiff.data.stream import BatchStream
from tests.benchmarks.latent_sets import CHANNELS, CLASSES, FRAME_BYTES, FRAMES, TOKENS

BATCH, CROP = 16, 16
STARTS = FRAMES - CROP + 1
SKIPPED = 4  # batches at the start of a pass, which are not timed: opening files, filling queues


@dataclass
class Reader:
    """A pass over the data, or over a part of it, as batches; what was measured of it."""

    name: str
    batches: Callable[[], Iterator[object]]
    shuffle: str  # what its order is
    per_cpu_second: list[float] = field(default_factory=list)

    def clips_per_second(self, seconds: float) -> float:
        """Read whole passes for about so long; the start of each is not timed."""
        clips, wall, cpu = 0, 0.0, 0.0
        while wall < seconds:
            iterator = self.batches()
            for _ in range(SKIPPED):
                next(iterator)
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in iterator:
                clips += BATCH
            wall += time.perf_counter() - start
            cpu += time.process_time() - start_cpu
        self.per_cpu_second.append(clips / cpu)
        return clips / wall


def configuration(folder: Path, *overrides: str) -> Config:
    """The configuration of a training run on these shards, in batches of 16."""
    return load(
        "base",
        [
            f"data.shards={folder}",
            f"model.num_frames={CROP}",
            f"model.num_classes={len(CLASSES)}",
            f"train.global_batch_size={BATCH}",
            f"train.micro_batch_size={BATCH}",
            f"data.lanes={BATCH}",
            *overrides,
        ],
    )


def training_clips(data: Mixture, config: Config) -> LatentClips:
    """What a training run collates with."""
    return LatentClips(data, LatentSpace.of(data.manifest, config.data.normalize), config)


class OnlyLatents:
    """Collates the latents as they lie on the disk, and nothing else."""

    def __init__(self, clips: LatentClips) -> None:
        self.clips, self.at_once = clips, clips.at_once

    def __call__(self, visits: Visits) -> Clips:
        """latents float16 [B, F, L, C]."""
        latents, _, _, bad = self.clips.read(visits)
        return Clips({"latents": torch.from_numpy(latents)}, bad)

    def counted_frames(self, visits: Visits) -> np.ndarray:
        """Frames of each clip."""
        return self.clips.counted_frames(visits)


class Ours:
    """Passes through `BatchStream`; each goes on where the last one ended."""

    def __init__(self, data: Mixture, collate: LatentClips | OnlyLatents, num_batches: int, prefetch: int) -> None:
        self.data, self.collate, self.num_batches, self.prefetch = data, collate, num_batches, prefetch
        self._position = 0

    def _stream(self) -> BatchStream:
        return BatchStream(
            self.data,
            self.collate,
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            position=self._position,
            prefetch=self.prefetch,
        )

    def threaded(self) -> Iterator[object]:
        """As in training: a thread reads ahead."""
        stream = self._stream()
        try:
            for _ in range(self.num_batches):
                yield next(stream)
        finally:
            stream.close()
        self._position += self.num_batches * BATCH

    def unthreaded(self) -> Iterator[object]:
        """The same work in the calling thread."""
        stream = self._stream()
        stream.close()
        at_once = self.collate.at_once // BATCH
        for _ in range(0, self.num_batches, at_once):
            yield from stream.read(self._position, at_once)
            self._position += at_once * BATCH


def our_reader(name: str, config: Config, num_batches: int, *, full: bool = False, thread: bool = True) -> Reader:
    """Our loader as `config` says, for the latents alone or for everything that a training step gets."""
    data = open_data(config, "latents", CROP)
    clips = training_clips(data, config)
    ours = Ours(data, clips if full else OnlyLatents(clips), num_batches, config.data.prefetch)
    order = "permutation of all clips" if config.data.order == "global" else f"{config.data.lanes} lanes"
    return Reader(name, ours.threaded if thread else ours.unthreaded, order)


def memmap_readers(file: Path, num_batches: int) -> list[Reader]:
    """np.memmap clip by clip; the same through a bare array, and all clips of a batch in one call of numpy.

    Order and starts are drawn beforehand, outside the time, except in the reader that says so.
    """
    mapped = np.load(file, mmap_mode="r")
    rng = np.random.default_rng(1)
    visits_per_video = FRAMES // CROP
    order = rng.permutation(len(mapped) * visits_per_video)
    order = np.resize(order, num_batches * BATCH)
    videos, starts = order // visits_per_video, rng.integers(0, STARTS, len(order))

    def clip_by_clip(array: np.ndarray) -> Iterator[object]:
        pairs = list(zip(videos.tolist(), starts.tolist(), strict=True))
        for first in range(0, len(pairs), BATCH):
            batch = np.empty((BATCH, CROP, TOKENS, CHANNELS), np.float16)
            for i, (video, start) in enumerate(pairs[first : first + BATCH]):
                batch[i] = array[video, start : start + CROP]
            yield torch.from_numpy(batch)

    def drawing_starts() -> Iterator[object]:
        generator, order = np.random.default_rng(1), videos.tolist()
        for first in range(0, len(order), BATCH):
            batch = np.empty((BATCH, CROP, TOKENS, CHANNELS), np.float16)
            for i, video in enumerate(order[first : first + BATCH]):
                start = int(generator.integers(0, STARTS))
                batch[i] = mapped[video, start : start + CROP]
            yield torch.from_numpy(batch)

    frames = mapped.view(np.ndarray).reshape(len(mapped) * FRAMES, TOKENS * CHANNELS)
    shape = (len(frames) - CROP + 1, CROP * TOKENS * CHANNELS)
    every_clip = np.lib.stride_tricks.as_strided(frames, shape, (FRAME_BYTES, 2), writeable=False)
    numbers = videos * FRAMES + starts

    def gathered() -> Iterator[object]:
        for first in range(0, len(numbers), BATCH):
            batch = every_clip[numbers[first : first + BATCH]]
            yield torch.from_numpy(batch.reshape(BATCH, CROP, TOKENS, CHANNELS))

    permutation = "permutation of all clips"
    return [
        Reader("np.memmap", lambda: clip_by_clip(mapped), permutation),
        Reader("np.memmap, starts drawn one by one", drawing_starts, permutation),
        Reader("np.memmap as a bare array", lambda: clip_by_clip(mapped.view(np.ndarray)), permutation),
        Reader("np.memmap, one gather a batch", gathered, permutation),
    ]
