"""One shard at a time on every core, with a progress bar; one that crashes or hangs its reader costs itself only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_tools.pool import Event, Function, run_in_processes

REPORT_EVERY = 1 << 24  # bytes after which a function should report progress
PASSES = 2  # over a shard whose checksum is compared before it is read


class BytesDone(int):
    """Bytes of a shard that have been dealt with since the last report."""


def sha256_reporting(path: Path, report: Callable[[Any], None]) -> str:
    """Hex digest of a file, as the first of PASSES over it: a long one must be neither silent nor taken for hanging."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(REPORT_EVERY):
            digest.update(chunk)
            if len(chunk) == REPORT_EVERY:
                report(BytesDone(REPORT_EVERY // PASSES))
    return digest.hexdigest()


class Outcome(NamedTuple):
    """What became of item number `item`: the last value that the function reported, or why it was given up."""

    item: int
    value: Any
    failure: str | None


def for_each_shard(
    function: Function, items: Sequence[Any], sizes: Sequence[int], workers: int, timeout: float, title: str
) -> Iterator[Outcome]:
    """Call `function(item, report)` for every item, in any order; yield each outcome when it is there.

    The function reports BytesDone, at most `timeout` seconds apart, and its result. With 0 workers everything happens
    in this process, where neither crashes nor hangs are caught. `sizes` are the bytes of each item, for the bar.
    """
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=title, disable=None, leave=False) as bar:
        done = [0] * len(items)
        values: list[Any] = [None] * len(items)
        events = run_in_processes(function, items, workers, timeout) if workers else _here(function, items)
        for event in events:
            item = event.item
            if isinstance(event.value, BytesDone):
                done[item] += event.value
                bar.update(event.value)
            elif not event.done:
                values[item] = event.value
            if event.done:
                bar.update(sizes[item] - done[item])
                yield Outcome(item, values[item], event.failure)
                values[item] = None


def _here(function: Function, items: Sequence[Any]) -> Iterator[Event]:
    for number, item in enumerate(items):
        reported: list[Any] = []
        function(item, reported.append)
        yield from (Event(number, value=value) for value in reported)
        yield Event(number, done=True)
