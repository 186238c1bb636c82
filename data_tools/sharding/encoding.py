"""Batches of frames through the encoder of the AR-VAE, filled by videos in any order.

Where a frame lies in which batch follows from the plan of a shard alone, and every batch has the same shape and is
computed in the same way. So the latents do not depend on the number of processes that decode or encode, on the order in
which they finish, nor on restarts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ardiff.errors import UserError
from data_tools.sharding.decoding import Chunk, Description
from data_tools.sharding.latent_inputs import LatentTask

if TYPE_CHECKING:
    from ardiff.compat.reference import ReferenceARVAE
    from ardiff.models import ARVAE

THREADS_ON_GPU = 2  # one copies while the other computes


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank: several ranks share out the GPUs of their machine. Raises UserError."""
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not gpus):
        return torch.device("cpu")
    if int(number or 0) >= gpus:
        raise UserError(f"--device {name}: there are {gpus} GPUs here")
    return torch.device("cuda", int(number) if number else local_rank % gpus)


class Encoder:
    """Encodes batches of uint8 frames [B, S, S, 3] in threads of its own.

    On CPUs a thread computes a batch alone: faster than all of them on one batch, and the sums do not depend on their
    number.
    """

    def __init__(
        self, network: ARVAE | ReferenceARVAE, device: torch.device, batch_size: int, flip: bool, cores: int
    ) -> None:
        self.network, self.device = network.to(device).eval(), device
        self.batch_size, self.flip = batch_size, flip
        config = network.config
        self.size, self.latent_shape = config.image_size, (config.num_tokens, config.channels)
        self.threads = cores if device.type == "cpu" else THREADS_ON_GPU
        self._pool = ThreadPoolExecutor(self.threads)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within, `submit` may be called."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def submit(self, frames: np.ndarray) -> Future[np.ndarray]:
        """Latents to come, float16 [V, B, L, C]; V is 2 where the mirrored frames are encoded as well."""
        return self._pool.submit(self._encode, frames)

    @torch.inference_mode()
    def _encode(self, frames: np.ndarray) -> np.ndarray:
        try:
            pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2)[None].float() / 255
            latents = [self.network.encode(pixels)[0]]
            if self.flip:
                latents.append(self.network.encode(pixels.flip(-1))[0])
            found = torch.stack(latents).half().cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f"--batch_size {self.batch_size}: too large for the memory of {self.device}") from error
        if not np.isfinite(found).all():
            raise UserError("the AR-VAE gives latents that are not finite; train it again or choose another checkpoint")
        return found


class OpenShard:
    """The frames and latents of one shard while they come in.

    The frames of its samples follow one another, and every `batch_size` of them are a batch (the last one is filled
    up with black). A source that fails leaves its places black, so nothing else in the shard changes.
    """

    def __init__(self, task: LatentTask, encoder: Encoder) -> None:
        self.task, self._batch, self._size = task, encoder.batch_size, encoder.size
        views = 2 if encoder.flip else 1
        self.latents = np.zeros((views, task.frames, *encoder.latent_shape), dtype=np.float16)
        self._lacking = np.full(-(-task.frames // self._batch), self._batch)  # places of each batch still to be filled
        self._lacking[-1] -= len(self._lacking) * self._batch - task.frames
        self._buffers: dict[int, np.ndarray] = {}
        self._received = [0] * len(task.units)
        self._places: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._starts = np.cumsum([0, *(sum(unit.frames) for unit in task.units)])
        self._open = set(range(len(task.units)))
        self._unencoded = len(self._lacking)
        self.problems: dict[int, str] = {}  # unit -> why it is not in the shard
        self.stored = 0  # frames whose latents are there
        self._described: dict[int, list[tuple[str, dict[str, Any]]]] = {}  # unit -> keys and descriptions

    @property
    def complete(self) -> bool:
        """Whether all latents are there that can be had."""
        return not self._open and not self._unencoded

    def take(self, unit: int, chunk: Chunk) -> list[tuple[int, np.ndarray]]:
        """Put frames of a unit in their places; returns the batches (number, frames) that are now full."""
        full: list[tuple[int, np.ndarray]] = []
        end = chunk.first + len(chunk.frames)
        assert unit in self._open and chunk.first == self._received[unit]
        self._received[unit] = end
        for start, places in self._places_of(unit):
            low, high = np.searchsorted(places, (chunk.first, end))
            full += self._fill(start + int(low), chunk.frames[places[low:high] - chunk.first])
        return full

    def close(self, unit: int, problem: str | None = None) -> list[tuple[int, np.ndarray]]:
        """Nothing more comes from a unit; returns the batches that are now full."""
        if unit not in self._open:
            return []
        expected = self.task.units[unit].decoded
        if problem is None and self._received[unit] != expected:
            problem = f"gave {self._received[unit]} of {expected} frames"
        full: list[tuple[int, np.ndarray]] = []
        self._open.remove(unit)
        if problem is not None:
            self.problems[unit] = problem
            for start, places in self._places_of(unit):
                done = int(np.searchsorted(places, self._received[unit]))
                full += self._fill(start + done, None, len(places) - done)
        self._places.pop(unit, None)
        return full

    def describe(self, unit: int, found: Description) -> None:
        """Take in what a shard of pictures says of the next sample of a unit."""
        self._described.setdefault(unit, []).append((found.key, found.info))

    def description(self, unit: int, number: int) -> tuple[str, dict[str, Any]]:
        """Key and description of a sample."""
        if unit not in self._described:
            self._described[unit] = self.task.units[unit].described() or []
        return self._described[unit][number]

    def store(self, batch: int, latents: np.ndarray) -> int:
        """Take in the latents of a batch, float16 [V, B, L, C]; returns how many of its places are no padding."""
        first = batch * self._batch
        wanted = self.latents[:, first : first + self._batch]
        wanted[:] = latents[:, : wanted.shape[1]]
        self._unencoded -= 1
        self.stored += wanted.shape[1]
        return wanted.shape[1]

    def samples(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(unit, number of the sample in it, its latents float16 [V, F, L, C]) of all units without a problem."""
        for unit, content in enumerate(self.task.units):
            start = int(self._starts[unit])
            for number, frames in enumerate(content.frames):
                if unit not in self.problems:
                    yield unit, number, self.latents[:, start : start + frames]
                start += frames

    def _places_of(self, unit: int) -> list[tuple[int, np.ndarray]]:
        """For every sample of a unit: its first place, and which of the unit's decoded frames belong to it."""
        if unit not in self._places:
            places = self.task.units[unit].places()
            starts = self._starts[unit] + np.cumsum([0, *map(len, places)])
            self._places[unit] = [(int(start), part) for start, part in zip(starts, places, strict=False)]
        return self._places[unit]

    def _fill(self, place: int, frames: np.ndarray | None, count: int = 0) -> list[tuple[int, np.ndarray]]:
        """Fill places from `place` on with frames or, if there are none, leave `count` of them black."""
        full = []
        done, count = 0, count if frames is None else len(frames)
        while done < count:
            batch, offset = divmod(place + done, self._batch)
            part = min(self._batch - offset, count - done)
            if frames is not None:
                buffer = self._buffers.get(batch)
                if buffer is None:
                    buffer = np.zeros((self._batch, self._size, self._size, 3), dtype=np.uint8)
                    self._buffers[batch] = buffer
                buffer[offset : offset + part] = frames[done : done + part]
            self._lacking[batch] -= part
            if self._lacking[batch] == 0:
                if batch in self._buffers:
                    full.append((batch, self._buffers.pop(batch)))
                else:
                    self._unencoded -= 1  # black from end to end: nobody asks for its latents
            done += part
        return full
