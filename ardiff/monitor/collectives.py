"""How fast collectives are: all-reduce, reduce-scatter and all-gather over sizes, and plain messages between two ranks.

Bus bandwidth is that of nccl-tests: what one link has to carry, so that it can be compared with the hardware's and does
not depend on the number of ranks n. With S bytes of data (the whole vector, also of reduce-scatter's input and of
all-gather's output) in t seconds it is

    all-reduce                    2 (n - 1) / n * S / t
    reduce-scatter, all-gather      (n - 1) / n * S / t

Bytes are numbers of 4 bytes (fp32), and a GB is 10^9 bytes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ardiff.training.distributed import World

Op = Literal["all_reduce", "reduce_scatter", "all_gather"]
OPS: tuple[Op, ...] = ("all_reduce", "reduce_scatter", "all_gather")
NUMBER = 4  # bytes of an fp32 number
REPEATS = 5
WARM_UP = 1
PROBE = 65536  # bytes whose time tells whether there is time for more
LINK_SECONDS = 0.5  # for one message between two ranks, from which it is not repeated
SECONDS = 20.0  # for one operation over all sizes, about


@dataclass(frozen=True)
class Measured:
    """One collective of one size. `seconds` is the mean of several, on the rank where they took longest."""

    op: Op
    bytes: int
    ranks: int
    seconds: float
    bus_gb_per_s: float

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def bus_bandwidth(op: Op, size: int, ranks: int, seconds: float) -> float:
    """GB/s by the formula of nccl-tests, see above; 0 for one rank, which sends nothing."""
    moved = (ranks - 1) / ranks * size * (2 if op == "all_reduce" else 1)
    return moved / max(seconds, 1e-9) / 1e9


def measure(
    world: World,
    sizes: Sequence[int],
    repeats: int = REPEATS,
    group: dist.ProcessGroup | None = None,
    seconds: float = SECONDS,
) -> list[Measured]:
    """Time every collective at these sizes in bytes (collective: all ranks of `group`, None for all, call it alike).

    Sizes are rounded to what the ranks can share. What would take longer than `seconds` per operation, by a smaller
    one, is left out on all ranks alike: the result is then shorter. Tensors lie on the world's device.
    """
    found: list[Measured] = []
    with _quiet():
        for op in OPS:
            left, per_byte = seconds, 0.0
            for size in sorted(sizes):
                if size > PROBE and not per_byte:  # what is smaller takes its time for other reasons than its size
                    per_byte = _measure_one(world, op, PROBE, 1, group, left).seconds / PROBE
                if per_byte * size > left:
                    break
                begin = time.perf_counter()
                one = _measure_one(world, op, size, repeats, group, left)
                if one.bytes >= PROBE:
                    per_byte = one.seconds / one.bytes
                left -= _slowest(time.perf_counter() - begin, world.device, group)  # the same on all ranks
                found.append(one)
    return found


def measure_link(
    world: World, sender: int, receiver: int, size: int, repeats: int = REPEATS, seconds: float = LINK_SECONDS
) -> float | None:
    """GB/s of messages from one rank to another, one after the other, on the sender; None on other ranks, of which only
    the receiver takes part.

    Messages grow up to `size` bytes, or until one takes longer than `seconds`: then it is the measure. Each is answered
    by a number, so what is timed has arrived. It is the median, as a link is to be judged and not a moment.
    """
    if world.rank not in (sender, receiver):
        return None
    announced, answer = torch.zeros(1, dtype=torch.int64), torch.zeros(1, device=world.device)
    other = receiver if world.rank == sender else sender

    def exchange(length: int) -> None:
        """The sender's message; 0: there is no other."""
        announced[0] = length
        dist.send(announced, receiver, group=world.control)
        if length:
            dist.send(torch.zeros(length // NUMBER, device=world.device), receiver)
            dist.recv(answer, receiver)

    if world.rank == receiver:
        while True:
            dist.recv(announced, other, group=world.control)
            if not int(announced):
                return None
            message = torch.empty(int(announced) // NUMBER, device=world.device)
            dist.recv(message, other)
            dist.send(answer, other)
    length = min(PROBE, size)
    while True:
        taken = _time(lambda length=length: exchange(length), WARM_UP, world.device)  # type: ignore[misc]
        if length >= size or taken > seconds:
            break
        length = min(4 * length, size)
    if taken <= seconds:
        taken = median(_time(lambda: exchange(length), 1, world.device) for _ in range(repeats))
    exchange(0)
    return length / max(taken, 1e-9) / 1e9


def _measure_one(
    world: World, op: Op, size: int, repeats: int, group: dist.ProcessGroup | None, seconds: float
) -> Measured:
    """One operation of one size; where there is no time for repeats, the first one counts, which warms up otherwise."""
    ranks = dist.get_world_size(group)
    per_rank = max(1, size // NUMBER // ranks)
    real = per_rank * ranks * NUMBER
    run = _operation(op, per_rank, ranks, world.device, group)
    taken = _slowest(_time(run, WARM_UP, world.device), world.device, group)
    if taken * repeats < seconds:
        taken = _slowest(_time(run, repeats, world.device), world.device, group)
    return Measured(op, real, ranks, taken, bus_bandwidth(op, real, ranks, taken))


def _operation(
    op: Op, per_rank: int, ranks: int, device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[], Any]:
    whole, part = torch.zeros(per_rank * ranks, device=device), torch.zeros(per_rank, device=device)
    if op == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if op == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    return lambda: dist.all_gather_into_tensor(whole, part, group=group)


def _time(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of one call, on this rank."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - begin) / repeats


def _slowest(seconds: float, device: torch.device, group: dist.ProcessGroup | None) -> float:
    taken: Tensor = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
    return float(taken)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Newer versions of torch have other names for these collectives, older ones only these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
