"""Which rank holds up the others: the time each spends on its own work, without that of waiting for others.

A step takes equally long on every rank, as all wait for the slowest in the reduction of gradients. What tells them
apart is the work between the collectives: forward passes (ZeRO-1 and 2 have no collectives in them) and waiting for
data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

import torch

from ardiff.monitor.lasting import Lasting

RATIO = 1.25  # to the median, from which a rank is a straggler
LEAST_MS = 1.0  # above the median; less is jitter


class StepTimes:
    """Measures the own work of this rank since the last report.

    On a GPU events are recorded in the stream, and read when a report is made: nothing waits for the device. Where the
    host cannot keep up with the device, a forward pass counts the gaps too, as it should.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._milliseconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._unused: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time inside counts as a forward pass."""
        if self._on_gpu:
            begin, end = self._unused.pop() if self._unused else (_event(), _event())
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._milliseconds += 1000 * (time.perf_counter() - start)

    def report(self, steps: int, data_wait: float) -> dict[str, float]:
        """Milliseconds per step since the last report: forward_ms, data_wait_ms. Begins a new interval.

        steps: optimizer steps since then. data_wait: seconds per step that were spent waiting for data.
        A pass that the device has not finished yet counts in the next report.
        """
        finished = 0
        while finished < len(self._pending) and self._pending[finished][1].query():
            begin, end = self._pending[finished]
            self._milliseconds += begin.elapsed_time(end)
            finished += 1
        self._unused += self._pending[:finished]
        del self._pending[:finished]
        forward, self._milliseconds = self._milliseconds / max(steps, 1), 0.0
        return {"forward_ms": forward, "data_wait_ms": 1000 * data_wait}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True)
class Straggler:
    """The rank whose own work per step takes longest. Times are milliseconds per step, medians those of all ranks."""

    rank: int
    host: str
    own_ms: float
    median_ms: float
    slow_in: str  # "forward" or "data wait": what sets it apart most
    part_ms: float  # its time for that
    part_median_ms: float

    @property
    def ratio(self) -> float:
        """Its time to the median."""
        return self.own_ms / self.median_ms

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"slowest rank {self.rank} ({self.host}): {self.own_ms:.0f} ms of its own work per step, median "
            f"{self.median_ms:.0f} ms ({self.slow_in} {self.part_ms:.0f} ms, median {self.part_median_ms:.0f} ms)"
        )


def slowest(rows: Sequence[dict[str, float]], hosts: Sequence[str]) -> Straggler | None:
    """The slowest rank by the reports of all (`StepTimes.report`, in the order of the ranks); None for one rank alone.

    The median of an even number of ranks is the lower one, so that of two ranks one is compared with the other.
    """
    assert len(rows) == len(hosts)
    own = [row["forward_ms"] + row["data_wait_ms"] for row in rows]
    if len(rows) < 2 or median_low(own) <= 0:
        return None
    rank = max(range(len(own)), key=own.__getitem__)
    medians = {key: median_low(row[key] for row in rows) for key in ("forward_ms", "data_wait_ms")}
    key = max(medians, key=lambda key: rows[rank][key] - medians[key])
    name = "forward" if key == "forward_ms" else "data wait"
    return Straggler(rank, hosts[rank], own[rank], median_low(own), name, rows[rank][key], medians[key])


class StragglerWatch:
    """Says when the same rank has been a straggler in report after report.

    now: where the time (in seconds) comes from.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._rank: int | None = None
        self._lasting = Lasting(now)

    def see(self, found: Straggler | None) -> str | None:
        """Take in what `slowest` found at a report; returns a line of warning, if one is due."""
        late = found is not None and found.ratio > RATIO and found.own_ms - found.median_ms > LEAST_MS
        rank = found.rank if found is not None and late else None
        if rank != self._rank:
            self._rank = rank
            self._lasting.see(False)
        return found.describe() if self._lasting.see(late) and found is not None else None
