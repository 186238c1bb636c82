"""The way from decoding processes through the encoder into latent shards, for the shards of one rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Any, cast

import numpy as np

from ardiff.data.shards import (
    FLIPPED_MEMBER,
    LATENTS_MEMBER,
    TEXT_MEMBER,
    Moments,
    Sample,
    encode_array,
    write_shard,
)
from data_tools.pool import Event, run_in_processes
from data_tools.sharding.decoding import Chunk, Description, PicturesItem, Problem, VideoItem, decode_item
from data_tools.sharding.encoding import Encoder, OpenShard
from data_tools.sharding.latent_inputs import LatentTask
from data_tools.sharding.sampling import INFO_BYTES, tar_bytes
from data_tools.sharding.tasks import remove_shard
from data_tools.sharding.text_features import HEADER, TextFeatures

POLL_EVERY = 1.0  # seconds


class Stopped(Exception):  # noqa: N818 (nothing is wrong with this process)
    """Another rank cannot go on."""


class LatentWriter:
    """Writes shards; `skipped` collects path -> reason of the sources that could not be used.

    As many sources as there are decoding processes are at work at a time, each sending its next frames when the last
    ones were taken. So besides the latents of the shards at hand there are never more frames in memory than a few
    batches per process.
    """

    def __init__(self, encoder: Encoder, arvae_id: str, text: TextFeatures | None) -> None:
        self.encoder, self.arvae_id, self.text = encoder, arvae_id, text
        self.skipped: dict[str, str] = {}
        self._open: dict[int, OpenShard] = {}
        self._closed: set[int] = set()
        self._running: deque[tuple[int, int, Future[np.ndarray]]] = deque()

    def size(self, key: str, frames: int) -> int:
        """Bytes of a sample in a shard."""
        tokens, channels = self.encoder.latent_shape
        latents = tar_bytes(HEADER + 2 * frames * tokens * channels)
        text = tar_bytes(self.text.bytes_of(key)) if self.text else 0
        return INFO_BYTES + latents * (2 if self.encoder.flip else 1) + text

    def write(
        self,
        tasks: Sequence[LatentTask],
        workers: int,
        timeout: float,
        advance: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> None:
        """Write all shards in order, decoding ahead in `workers` processes.

        `advance` is told how many frames are done. Raises UserError, and Stopped when `stop` says so.
        """
        items = _Items(tasks, self.encoder.size)
        polled = time.monotonic()
        with self.encoder.running(), ExitStack() as stack:
            events = cast("Generator[Event]", run_in_processes(decode_item, items, workers, timeout))
            for event in stack.enter_context(closing(events)):
                number, unit = items.places[event.item]
                if number in self._closed:  # a source that failed still says that it is done
                    continue
                if number not in self._open:
                    self._open[number] = OpenShard(tasks[number], self.encoder)
                shard = self._open[number]
                for batch, frames in _handle(shard, unit, event):
                    self._running.append((number, batch, self.encoder.submit(frames)))
                self._collect(2 * self.encoder.threads, advance)
                self._close_if_complete(number, advance)
                if time.monotonic() > polled + POLL_EVERY:
                    polled = time.monotonic()
                    if stop():
                        raise Stopped
            self._collect(0, advance)
        assert not self._open

    def _collect(self, allowed: int, advance: Callable[[int], None]) -> None:
        """Take in what is encoded, waiting until no more than `allowed` batches are still to come."""
        while self._running and (len(self._running) > allowed or self._running[0][2].done()):
            number, batch, latents = self._running.popleft()
            advance(self._open[number].store(batch, latents.result()))
            self._close_if_complete(number, advance)

    def _close_if_complete(self, number: int, advance: Callable[[int], None]) -> None:
        shard = self._open.get(number)
        if shard is None or not shard.complete:
            return
        del self._open[number]
        self._closed.add(number)
        advance(shard.task.frames - shard.stored)  # so that what was skipped is not waited for
        for unit, problem in shard.problems.items():
            self.skipped[shard.task.units[unit].path] = problem
        if len(shard.problems) == len(shard.task.units):  # an earlier version of it must not stay
            remove_shard(shard.task.folder, shard.task.name)
            return
        moments = Moments(self.encoder.latent_shape[1])
        write_shard(shard.task.folder, shard.task.name, self._samples(shard, moments), moments)

    def _samples(self, shard: OpenShard, moments: Moments) -> Iterator[Sample]:
        for unit, number, latents in shard.samples():
            key, info = shard.description(unit, number)
            moments.add(latents[0])
            members = {LATENTS_MEMBER: encode_array(latents[0])}
            if len(latents) > 1:
                members[FLIPPED_MEMBER] = encode_array(latents[1])
            if self.text:
                members[TEXT_MEMBER] = encode_array(self.text.read(key))
            yield Sample(key, {**info, "arvae": self.arvae_id}, members)


def _handle(shard: OpenShard, unit: int, event: Event) -> list[tuple[int, np.ndarray]]:
    """Let a shard know of an event; returns the batches that are now full."""
    if event.failure:
        return shard.close(unit, f"cannot be decoded ({event.failure})")
    if event.done:
        return shard.close(unit)
    if isinstance(event.value, Chunk):
        return shard.take(unit, event.value)
    if isinstance(event.value, Problem):
        return shard.close(unit, event.value.reason)
    if isinstance(event.value, Description):
        shard.describe(unit, event.value)
    return []


class _Items(Sequence[Any]):
    """What the decoding processes are given, made when it is asked for: `places` says (shard, unit) of each."""

    def __init__(self, tasks: Sequence[LatentTask], size: int) -> None:
        self._tasks, self._size = tasks, size
        self.places = [(number, unit) for number, task in enumerate(tasks) for unit in range(len(task.units))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> VideoItem | PicturesItem:  # type: ignore[override] # no slices
        number, unit = self.places[item]
        return self._tasks[number].units[unit].item(self._size)
