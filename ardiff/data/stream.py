"""Batches for one rank, prepared ahead by a thread.

What a batch holds is a function of the seed and of global positions only, so 1, 2 and 8 ranks train on the same
numbers.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ardiff.data.clips import BadSample, Collate
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Visits

log = logging.getLogger("ardiff")
PLANNED = 4096  # visits worked out at a time: the arithmetic is quicker for many
LOOKAHEAD = 64  # global batches ahead of which shards are fetched into the cache


@dataclass
class GlobalBatch:
    """One rank's share of a global batch: its micro-batches, and what they add up to over all ranks."""

    position: int  # of the first sample
    size: int  # samples over all ranks
    num_frames: int  # frames that the loss counts, over all ranks
    micro_batches: list[dict[str, Tensor]]
    bad: list[BadSample] = field(default_factory=list)  # this rank's samples that were replaced


class BatchStream:
    """Endless iterator of this rank's `GlobalBatch`es from a position on; close it when done.

    Rank r takes the r-th of `world_size` equal stretches of every global batch. An error while reading is raised in the
    consumer at the batch that it concerns.

    skipped: stretches [start, end) of positions that are left out: a global batch that would touch one begins at its
    end instead. So what follows a batch is a function of where it ends, `position + size`, and of these stretches.
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
        skipped: Sequence[Sequence[int]] = (),
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.data, self.collate = data, collate
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self._position = position
        # With lanes, batches begin at multiples of their number.
        self._skipped = sorted((start, -(-end // data.lanes) * data.lanes) for start, end in skipped if start < end)
        self._planned: tuple[int, Visits] | None = None  # where they begin; columns [batches, global_batch_size]
        # Planning, reading and the handover between threads cost as much for one small batch as for several: they go
        # in bundles, through two queues in C (what is ready, and permits to make more).
        self._bundle = max(1, collate.at_once * world_size // global_batch_size)
        self._ready: queue.SimpleQueue[list[GlobalBatch | BaseException]] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, -(-prefetch // self._bundle))):
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
        while not self.ready(1.0):
            pass
        if not self._at_hand:
            raise StopIteration
        item = self._at_hand[-1]
        if isinstance(item, BaseException):
            raise item  # and again, should the consumer ask again
        return self._at_hand.pop()  # type: ignore[return-value]

    def ready(self, timeout: float) -> bool:
        """Whether the next batch (or an error, or the end of a closed stream) is there, within so many seconds."""
        if self._at_hand or self._closed.is_set():
            return True
        try:
            self._at_hand = self._ready.get(timeout=timeout)[::-1]
        except queue.Empty:
            return False
        self._permits.put(None)
        return True

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._permits.put(None)
        self._threads[0].join(timeout=10)  # one that waits for a store that is out of reach is left to itself

    def read(self, position: int, batches: int = 1) -> list[GlobalBatch]:
        """This rank's share of the global batches that begin at `position`."""
        planned = self._visits(position, batches)
        share, size = self.global_batch_size // self.world_size, self.micro_batch_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        at_once = max(1, self.collate.at_once // size) * size
        pieces: list[dict[str, Tensor]] = []
        bad: list[BadSample] = []
        columns = [column[:, own].reshape(-1) for column in planned]
        for start in range(0, batches * share, at_once):
            clips = self.collate(Visits(*(column[start : start + at_once] for column in columns)))
            pieces += self._micro_batches(clips.tensors)
            bad += clips.bad
        counted = self.collate.counted_frames(Visits(*(column.reshape(-1) for column in planned)))
        num_frames, each = counted.reshape(batches, -1).sum(axis=1).tolist(), share // size
        found = []
        for number in range(batches):
            first = position + number * self.global_batch_size
            mine = [sample for sample in bad if first <= sample.position < first + self.global_batch_size]
            micro_batches = pieces[number * each : (number + 1) * each]
            found.append(GlobalBatch(first, self.global_batch_size, num_frames[number], micro_batches, mine))
        return found

    def _micro_batches(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        if self.pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        parts = [tensor.split(self.micro_batch_size) for tensor in tensors.values()]
        return [dict(zip(tensors, part, strict=True)) for part in zip(*parts, strict=True)]

    def _visits(self, position: int, batches: int) -> Visits:
        """All visits of global batches in a row: columns [batches, global_batch_size]. More are planned at once."""
        size = self.global_batch_size
        if self._planned is not None:
            start, planned = self._planned
            number = (position - start) // size
            if (position - start) % size == 0 and number >= 0 and number + batches <= len(planned.video):
                return Visits(*(column[number : number + batches] for column in planned))
        count = max(batches, PLANNED // size // batches * batches)
        planned = self._split(self.data.visits(position, count * size), count)
        self._planned = (position, planned)
        return Visits(*(column[:batches] for column in planned))

    def _split(self, visits: Visits, count: int) -> Visits:
        """The visits of `count` global batches in a row, which are sorted by lane, as columns [count, batch]."""
        lanes = self.data.lanes
        return Visits(*(column.reshape(lanes, count, -1).transpose(1, 0, 2).reshape(count, -1) for column in visits))

    def _produce(self) -> None:
        most = 1  # the first one should not wait for others
        while True:
            self._permits.get()
            if self._closed.is_set():
                return
            self._position, batches = self._next_run(self._position, most)
            bundle: list[GlobalBatch | BaseException] = []
            try:
                bundle += self.read(self._position, batches)
            except BaseException:  # one by one, for the batch that it belongs to
                for number in range(batches):
                    try:
                        bundle += self.read(self._position + number * self.global_batch_size)
                    except BaseException as error:
                        self._ready.put([*bundle, error])
                        return
            self._position += batches * self.global_batch_size
            self._ready.put(bundle)
            most = self._bundle

    def _next_run(self, position: int, most: int) -> tuple[int, int]:
        """Where the next global batch at or behind `position` begins, and how many (at most `most`) follow in a row."""
        size = self.global_batch_size
        for start, end in self._skipped:  # sorted, so none of those before one that is passed over is touched
            if position < end:
                if position + size <= start:
                    return position, min(most, (start - position) // size)
                position = end
        return position, most

    def _fetch_ahead(self) -> None:
        """Bring the shards of this rank's next batches into the cache before they are read."""
        position, size = self._position, self.global_batch_size
        share = size // self.world_size
        while not self._closed.is_set():
            if position >= self._position + LOOKAHEAD * size:
                self._closed.wait(0.05)
                continue
            position = self._next_run(position, 1)[0]
            try:
                videos = self.data.visits(position, size).video[self.rank * share : (self.rank + 1) * share]
                self.data.prepare(videos)
            except Exception:
                log.debug("fetching ahead failed; the reading thread will tell", exc_info=True)
            position += size
