"""Batches for one rank, prepared ahead by a thread.

What a batch holds is a function of the seed and of global positions only, so 1, 2 and 8 ranks train on the same
numbers.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ardiff.data.clips import BadSample, Collate, Rows
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Visits

log = logging.getLogger("ardiff")
PLANNED = 4096  # visits worked out at a time: the arithmetic is quicker for many
BUNDLED = 64  # samples of a rank that are handed over at a time, at least
LOOKAHEAD = 64  # global batches ahead of which shards are fetched into the cache


@dataclass
class GlobalBatch:
    """One rank's share of a global batch: its micro-batches, and what they add up to over all ranks."""

    position: int  # of the first sample
    size: int  # samples over all ranks
    num_frames: int  # real (unmasked) frames over all ranks
    micro_batches: list[dict[str, Tensor]]
    bad: list[BadSample] = field(default_factory=list)  # this rank's samples that were replaced


class BatchStream:
    """Endless iterator of this rank's `GlobalBatch`es from a position on; close it when done.

    Rank r takes the r-th of `world_size` equal stretches of every global batch. An error while reading is raised in the
    consumer at the batch that it concerns.
    """

    def __init__(
        self,
        data: Mixture,
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
        self.data, self.collate = data, collate
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self._position = position
        self._planned: tuple[int, list[Visits]] = (position, [])  # where they begin, one per global batch
        # A handover between threads costs as much as reading several clips, so small batches go in bundles, through
        # two queues in C (what is ready, and permits to make more) instead of one bounded queue in Python.
        self._bundle = max(1, min(prefetch, BUNDLED * world_size // global_batch_size))
        self._ready: queue.SimpleQueue[list[GlobalBatch | BaseException]] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, prefetch // self._bundle)):
            self._permits.put(None)
        self._at_hand: list[GlobalBatch | BaseException] = []  # of the consumer, the next one last
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._produce, name="batch-stream", daemon=True)]
        if data.is_remote:
            self._threads.append(threading.Thread(target=self._fetch_ahead, name="shard-fetcher", daemon=True))
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        while not self._at_hand:
            if self._closed.is_set():
                raise StopIteration
            try:
                self._at_hand = self._ready.get(timeout=1.0)[::-1]
                self._permits.put(None)
            except queue.Empty:
                continue
        item = self._at_hand[-1]
        if isinstance(item, BaseException):
            raise item  # and again, should the consumer ask again
        return self._at_hand.pop()  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._permits.put(None)
        self._threads[0].join(timeout=10)  # one that waits for a store that is out of reach is left to itself

    def read(self, position: int) -> GlobalBatch:
        """This rank's share of the global batch that begins at `position`."""
        visits = self._visits(position)
        size = self.micro_batch_size
        share = self.global_batch_size // self.world_size
        batch = GlobalBatch(position, self.global_batch_size, int(visits.num_frames.sum()), [])
        for start in range(self.rank * share, (self.rank + 1) * share, size):
            part = Visits(*(column[start : start + size] for column in visits))
            clips = self.collate(Rows(part, position, self.global_batch_size, start))
            tensors = clips.tensors
            if self.pin_memory:
                tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            batch.micro_batches.append(tensors)
            batch.bad += clips.bad
        return batch

    def _visits(self, position: int) -> Visits:
        """All visits of a global batch; several batches are planned at once."""
        size = self.global_batch_size
        start, planned = self._planned
        number = (position - start) // size
        if (position - start) % size or not 0 <= number < len(planned):
            count = max(1, PLANNED // size)
            planned = self._split(self.data.visits(position, count * size), count)
            self._planned, number = (position, planned), 0
        return planned[number]

    def _split(self, visits: Visits, count: int) -> list[Visits]:
        """The visits of `count` global batches in a row, which are sorted by lane, as one `Visits` for each batch."""
        lanes = self.data.lanes
        columns = [column.reshape(lanes, count, -1).transpose(1, 0, 2).reshape(count, -1) for column in visits]
        return [Visits(*(column[number] for column in columns)) for number in range(count)]

    def _produce(self) -> None:
        while True:
            self._permits.get()
            if self._closed.is_set():
                return
            bundle: list[GlobalBatch | BaseException] = []
            for _ in range(self._bundle):
                try:
                    bundle.append(self.read(self._position))
                except BaseException as error:  # whatever it is belongs to the consumer
                    self._ready.put([*bundle, error])
                    return
                self._position += self.global_batch_size
            self._ready.put(bundle)

    def _fetch_ahead(self) -> None:
        """Bring the shards of this rank's next batches into the cache before they are read."""
        position, size = self._position, self.global_batch_size
        share = size // self.world_size
        while not self._closed.is_set():
            if position >= self._position + LOOKAHEAD * size:
                self._closed.wait(0.05)
                continue
            try:
                videos = self.data.visits(position, size).video[self.rank * share : (self.rank + 1) * share]
                self.data.prepare(videos)
            except Exception:
                log.debug("fetching ahead failed; the reading thread will tell", exc_info=True)
            position += size
