"""The parts of a step: a stop-watch that is always in exactly one of them.

At every change of part a mark is set: on a GPU an event in the stream that computes, on a CPU the time. The time from
one mark to the next belongs to one part, so the parts of a step add up to the step. Parts nest: what is inside does not
count for what is around it.

On a GPU a part is therefore the time in which the computing stream was at it or waited for it: of work that overlaps
(data that is read ahead, collectives in a stream of their own) only what is left exposed counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch

DATA, COPY, FORWARD, BACKWARD, REDUCTION, OPTIMIZER, GATHER, EMA, LOGGING, REST = PARTS = (
    "data wait",
    "host to device",
    "forward",
    "backward",
    "reduction",
    "optimizer",
    "weight gather",
    "EMA",
    "logging",
    "rest",
)
_Moment = float | torch.cuda.Event


class Timeline:
    """Marks of the steps that are measured; it does nothing between them, or while `running` is false."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.running = False
        self.names_in_trace = False  # whether parts show in a torch profiler's trace
        self._stack: list[str] = []
        self._marks: list[tuple[str, _Moment]] = []
        self._steps: list[list[tuple[str, _Moment]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step that is measured."""
        self.running, self._stack, self._marks = True, [REST], []
        self._mark()
        try:
            yield
            self._mark()
            self._steps.append(self._marks)
        finally:
            self.running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside belongs to this part, as far as not to one further inside."""
        with ExitStack() as stack:
            if self.names_in_trace:
                stack.enter_context(torch.profiler.record_function(f"part: {name}"))
            if not self.running:
                yield
                return
            self._stack.append(name)
            self._mark()
            try:
                yield
            finally:
                self._stack.pop()
                self._mark()

    def relabel(self, name: str) -> None:
        """From here on the time around parts belongs to `name`."""
        if self.running and self._stack[-1] != name:
            self._stack[-1] = name
            self._mark()

    def take(self) -> list[dict[str, float]]:
        """Milliseconds by part of each step since the last call; waits for the device."""
        if self._stream is not None:
            self._stream.synchronize()
        steps, self._steps = self._steps, []
        return [_durations(marks) for marks in steps]

    def _mark(self) -> None:
        if self._stream is None:
            self._marks.append((self._stack[-1], time.perf_counter()))
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((self._stack[-1], event))


def _durations(marks: list[tuple[str, _Moment]]) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    for (name, begin), (_, end) in pairwise(marks):
        found[name] += _milliseconds(begin, end)
    return found


def _milliseconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return 1000 * (end - begin)  # type: ignore[operator]
    return begin.elapsed_time(end)
