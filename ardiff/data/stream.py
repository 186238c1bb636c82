"""Batches for one rank, prepared ahead by a thread.

What a batch holds is a function of the seed and of global positions only. Micro-batch m of rank r takes the same place
in the global batch whatever the world size, so 1, 2 and 8 ranks train on the same numbers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ardiff.config import Config
from ardiff.data.dataset import ShardSet
from ardiff.data.latent_space import LatentSpace
from ardiff.data.plan import Plan, Visits
from ardiff.diffusion.timesteps import draw_from_seeds
from ardiff.randomness import Stream, hashed, normals, uniforms

Collate = Callable[[Visits], dict[str, Tensor]]


@dataclass
class GlobalBatch:
    """One rank's share of a global batch: its micro-batches, and what they add up to over all ranks."""

    position: int  # of the first sample
    size: int  # samples over all ranks
    num_frames: int  # real (unmasked) frames over all ranks
    micro_batches: list[dict[str, Tensor]]


class LatentClips:
    """Clips of latents with their noise, timesteps and labels: what the diffusion objective reads."""

    def __init__(self, shards: ShardSet, space: LatentSpace, config: Config) -> None:
        self.shards, self.space, self.config = shards, space, config

    def __call__(self, visits: Visits) -> dict[str, Tensor]:
        """latents, noise [B, F, L, C]; timesteps, mask [B, F]; label [B]."""
        model, seed, positions = self.config.model, self.config.train.seed, visits.position
        shape = (model.num_frames, model.tokens_per_frame, model.in_channels)
        latents = np.zeros((len(positions), *shape), dtype=np.float32)
        noise = np.empty_like(latents)
        for i, (video, first, position, count) in enumerate(zip(*visits, strict=True)):
            latents[i, :count] = self.shards.read_latents(video, first, count, self.config.data.stride)
            noise[i] = normals(seed, Stream.NOISE, position, shape)
        timesteps = draw_from_seeds(
            self.config.diffusion.timesteps,
            hashed(seed, Stream.TIMESTEPS, positions),
            model.num_frames,
            self.config.diffusion.num_timesteps,
        )
        batch = {
            "latents": torch.from_numpy(self.space.to_model(latents)),
            "noise": torch.from_numpy(noise),
            "timesteps": timesteps,
            "mask": _frame_mask(visits, model.num_frames),
        }
        if model.num_classes:
            label = self.shards.labels[visits.video].astype(np.int64)
            dropped = uniforms(hashed(seed, Stream.LABEL_DROP, positions), 1)[:, 0]
            no_label = (dropped < self.config.train.label_dropout) | (label < 0)
            batch["label"] = torch.from_numpy(np.where(no_label, model.num_classes, label))
        return batch


class FrameClips:
    """Clips of pictures with the noise of the posterior: what the reconstruction objective reads."""

    def __init__(self, shards: ShardSet, config: Config, num_frames: int) -> None:
        self.shards, self.config, self.num_frames = shards, config, num_frames

    def __call__(self, visits: Visits) -> dict[str, Tensor]:
        """video [B, F, 3, H, W] in [0, 1]; noise [B, F, L, C]; mask [B, F]."""
        vae, seed = self.config.vae, self.config.train.seed
        shape = (self.num_frames, vae.num_tokens, vae.channels)
        video = np.zeros((len(visits.video), self.num_frames, vae.image_size, vae.image_size, 3), np.uint8)
        noise = np.empty((len(visits.video), *shape), dtype=np.float32)
        for i, (index, first, position, count) in enumerate(zip(*visits, strict=True)):
            video[i, :count] = self.shards.read_frames(index, first, count, self.config.data.stride)
            noise[i] = normals(seed, Stream.POSTERIOR, position, shape)
        return {
            "video": torch.from_numpy(video).permute(0, 1, 4, 2, 3).float().div_(255),
            "noise": torch.from_numpy(noise),
            "mask": _frame_mask(visits, self.num_frames),
        }


def _frame_mask(visits: Visits, num_frames: int) -> Tensor:
    return torch.arange(num_frames)[None] < torch.from_numpy(visits.num_frames)[:, None]


class BatchStream:
    """Endless iterator of this rank's `GlobalBatch`es from a position on; close it when done.

    An error while reading is raised in the consumer at the batch that it concerns.
    """

    def __init__(
        self,
        plan: Plan,
        collate: Collate,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.plan, self.collate = plan, collate
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self._position = position
        self._ready: queue.Queue[GlobalBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="batch-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        while not self._closed.is_set():
            if self._broken is not None:
                raise self._broken
            try:
                item = self._ready.get(timeout=1.0)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._broken = item
                continue
            return item
        raise StopIteration

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def read(self, position: int) -> GlobalBatch:
        """This rank's share of the global batch that begins at `position`."""
        visits = self.plan.visits(position, self.global_batch_size)
        size, stride = self.micro_batch_size, self.micro_batch_size * self.world_size
        micro_batches = []
        for start in range(self.rank * size, self.global_batch_size, stride):
            batch = self.collate(Visits(*(column[start : start + size] for column in visits)))
            if self.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            micro_batches.append(batch)
        return GlobalBatch(position, self.global_batch_size, int(visits.num_frames.sum()), micro_batches)

    def _produce(self) -> None:
        while not self._closed.is_set():
            try:
                item: GlobalBatch | BaseException = self.read(self._position)
            except BaseException as error:  # whatever it is belongs to the consumer
                item = error
            self._position += self.global_batch_size
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
