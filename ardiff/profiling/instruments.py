"""Attaching a stop-watch and a byte counter to a trainer; training itself knows nothing of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from ardiff.monitor.estimates import Zero
from ardiff.profiling.timeline import BACKWARD, COPY, EMA, FORWARD, GATHER, OPTIMIZER, REDUCTION, REST, Timeline
from ardiff.training.trainer import Trainer

# Collectives that ZeRO calls, with the argument whose size is the data of all ranks.
_REDUCTIONS = {"all_reduce": 0, "reduce": 0, "reduce_scatter_tensor": 1, "reduce_scatter_fn": 1}
_GATHERS = {"all_gather_into_tensor": 0, "allgather_fn": 0, "all_gather": 0}


@dataclass
class Sent:
    """Calls of one collective, and the bytes of data in them."""

    calls: int = 0
    bytes: int = 0


class Traffic:
    """What DeepSpeed sends in the steps that are measured, by collective."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = defaultdict(Sent)

    def add(self, name: str, data: Any) -> None:
        """One call."""
        tensors = data if isinstance(data, list | tuple) else [data]
        self._sent[name].calls += 1
        self._sent[name].bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def take(self) -> dict[str, Sent]:
        """Since the last call."""
        sent, self._sent = dict(self._sent), defaultdict(Sent)
        return sent


@contextmanager
def attached(trainer: Trainer, timeline: Timeline, traffic: Traffic) -> Iterator[None]:
    """Inside, the trainer's steps set marks and count what is sent.

    With overlap_comm the end of a backward pass, where ZeRO waits for its last collectives, counts as reduction: that
    is the exposed part of it.
    """
    import deepspeed.comm

    engine = trainer.engine
    zero = engine.deepspeed
    before = engine.forward_timer

    @contextmanager
    def forward() -> Iterator[None]:
        with timeline.part(FORWARD), before():
            yield
        timeline.relabel(REST)

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        timed = _timed(timeline, OPTIMIZER)(original)

        def once(*arguments: Any, **more: Any) -> Any:
            found = timed(*arguments, **more)
            timeline.relabel(COPY)  # of the next micro-batch
            return found

        return once

    changed = [
        (engine, "step", _timed(timeline, COPY)),
        (zero, "backward", _timed(timeline, BACKWARD)),
        (zero, "step", step),
        (trainer.ema, "update", _timed(timeline, EMA)),
    ]
    if Zero.of(engine.ds_config).overlap and hasattr(zero.optimizer, "independent_gradient_partition_epilogue"):
        changed.append((zero.optimizer, "independent_gradient_partition_epilogue", _timed(timeline, REDUCTION)))
    for names, part in ((_REDUCTIONS, REDUCTION), (_GATHERS, GATHER)):
        for name, position in names.items():
            if hasattr(deepspeed.comm, name):
                changed.append((deepspeed.comm, name, _counted(timeline, traffic, part, name, position)))
    engine.forward_timer = forward
    with _replaced(changed):
        yield
    engine.forward_timer = before


@contextmanager
def _replaced(changes: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]) -> Iterator[None]:
    """Inside, functions of objects (or modules) are what is made of them."""
    own = [(owner, name, vars(owner).get(name)) for owner, name, _ in changes]
    for owner, name, change in changes:
        setattr(owner, name, change(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, value in own:
            if value is None:  # a method of the class
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _timed(timeline: Timeline, part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def timed(*arguments: Any, **more: Any) -> Any:
            with timeline.part(part):
                return original(*arguments, **more)

        return timed

    return change


def _counted(
    timeline: Timeline, traffic: Traffic, part: str, name: str, position: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        inner = _timed(timeline, part)(original)

        @wraps(original)
        def counted(*arguments: Any, **more: Any) -> Any:
            if timeline.running:
                data = arguments[position] if len(arguments) > position else next(iter(more.values()), None)
                traffic.add(name, data)
            return inner(*arguments, **more)

        return counted

    return change
