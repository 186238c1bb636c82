"""A step on any number of ranks: measured compute, and the collectives that ZeRO sends by the fitted links.

    step(n) = micro-steps(n) * (forward + backward + copy)      as measured, per micro-step
            + (optimizer + EMA) * N / n                         sharded over the ranks, measured on N
            + data wait + logging + rest                        as measured
            + reductions(n) * exposed(all-reduce of the gradients) + all-reduces of norms
            + all-gather of the weights
            + waiting for slower ranks                          in proportion to compute

ZeRO-2 reduces after every micro-step, ZeRO-1 and 0 once per step, and what DeepSpeed 0.19 sends for it is an all-reduce
(use_multi_rank_bucket_allreduce), in the dtype of the computation. Where ZeRO overlaps reduction and backward pass,
what exceeds the backward pass is exposed, and the last bucket in any case. Waiting for slower ranks is taken to be the
share of compute that it was in the measured run; a run on one rank knows of none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ardiff.profiling.links import Links
from ardiff.profiling.timeline import BACKWARD, COPY, DATA, EMA, FORWARD, LOGGING, OPTIMIZER, REST


@dataclass(frozen=True)
class Compute:
    """What one rank does in a step by itself, in milliseconds, and what has to be sent.

    speed: FLOP/s of matrix products on a rank while all ranks train, on a CPU, where they share cores; 0 on a GPU.
    """

    ranks: int
    micro_batch_size: int
    global_batch_size: int
    stage: int
    overlap: bool
    gradient_bytes: int  # of one reduction
    weight_bytes: int  # of one all-gather
    bucket_bytes: int
    gathers: int  # calls for all weights
    small_reductions: int  # calls per step with a number or two: norms, overflow
    speed: float
    forward_ms: float  # of a micro-step, copy included
    backward_ms: float  # of a micro-step
    sharded_ms: float
    fixed_ms: float
    waiting_ms: float = 0.0  # for slower ranks: in collectives, beyond what these take by themselves

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)


def compute_of(
    parts: dict[str, float],
    ranks: int,
    micro_batch_size: int,
    global_batch_size: int,
    *,
    stage: int,
    overlap: bool,
    parameters: int,
    width: int,
    bucket: int,
    gathers: int,
    reduce_calls: int,
    speed: float,
) -> Compute:
    """From the measured parts of a step. width: bytes of a number in the computation; bucket: elements.

    reduce_calls: that were counted in a step, small ones included. gathers: parameter groups.
    """
    micro_steps = global_batch_size // (micro_batch_size * ranks)
    buckets = math.ceil(parameters / min(bucket, parameters)) * (micro_steps if stage == 2 else 1)
    return Compute(
        ranks=ranks,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        stage=stage,
        overlap=overlap,
        gradient_bytes=parameters * width,
        weight_bytes=parameters * width if stage else 0,
        bucket_bytes=min(bucket, parameters) * width,
        gathers=gathers,
        small_reductions=max(0, reduce_calls - buckets),
        speed=speed,
        forward_ms=(parts[COPY] + parts[FORWARD]) / micro_steps,
        backward_ms=parts[BACKWARD] / micro_steps,
        sharded_ms=parts[OPTIMIZER] + parts[EMA],
        fixed_ms=parts[DATA] + parts[LOGGING] + parts[REST],
    )


@dataclass(frozen=True)
class Predicted:
    """A step on so many ranks, in milliseconds."""

    ranks: int
    micro_batch_size: int
    global_batch_size: int
    compute_ms: float
    reduction_ms: float  # exposed
    gather_ms: float
    waiting_ms: float
    step_ms: float
    clips_per_s: float

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)


def predict(
    measured: Compute,
    links: Links,
    ranks: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    speed: float | None = None,
) -> Predicted:
    """A step of a global batch on `ranks` ranks. speed: of a rank there, where they are CPUs (None: as measured)."""
    micro_batch = micro_batch_size or measured.micro_batch_size
    micro_steps = global_batch_size // (micro_batch * ranks)
    # A smaller micro-batch is taken to cost its share: on GPUs it costs more when it gets small.
    share = micro_batch / measured.micro_batch_size
    slower = measured.speed / speed if speed and measured.speed else 1.0
    backward = measured.backward_ms * share * slower
    alone = micro_steps * (measured.forward_ms * share * slower + backward)
    alone += measured.sharded_ms * slower * (1 if measured.stage == 0 else measured.ranks / ranks)
    alone += measured.fixed_ms
    reductions = micro_steps if measured.stage == 2 else 1
    reduction = reductions * _exposed_ms(measured, links, ranks, backward)
    reduction += 1000 * measured.small_reductions * links.seconds("all_reduce", 4, ranks)
    gathered = measured.weight_bytes / measured.gathers
    gather = 1000 * measured.gathers * links.seconds("all_gather", gathered, ranks) if gathered else 0.0
    waiting = 0.0
    if ranks > 1 and measured.waiting_ms:  # ranks differ in compute, so it grows and shrinks with that
        there = measured.global_batch_size // (measured.micro_batch_size * measured.ranks)
        before = there * (measured.forward_ms + measured.backward_ms) + measured.sharded_ms + measured.fixed_ms
        waiting = measured.waiting_ms * alone / before
    step = alone + reduction + gather + waiting
    return Predicted(
        ranks=ranks,
        micro_batch_size=micro_batch,
        global_batch_size=global_batch_size,
        compute_ms=alone,
        reduction_ms=reduction,
        gather_ms=gather,
        waiting_ms=waiting,
        step_ms=step,
        clips_per_s=1000 * global_batch_size / step,
    )


def with_waiting(measured: Compute, links: Links, communication_ms: float) -> Compute:
    """The same, with the waiting that its own step shows. communication_ms: in the collectives of that step."""
    own = predict(measured, links, measured.ranks, measured.global_batch_size)
    waiting = max(0.0, communication_ms - own.reduction_ms - own.gather_ms) if measured.ranks > 1 else 0.0
    return replace(measured, waiting_ms=waiting)


def _exposed_ms(measured: Compute, links: Links, ranks: int, backward_ms: float) -> float:
    """Milliseconds that one reduction of all gradients adds to its micro-step."""
    buckets = max(1, math.ceil(measured.gradient_bytes / measured.bucket_bytes))
    last = 1000 * links.seconds("all_reduce", measured.gradient_bytes / buckets, ranks)
    if not measured.overlap:
        return buckets * last
    return last + max(0.0, (buckets - 1) * last - backward_ms * (buckets - 1) / buckets)


def gpus(text: str) -> list[int]:
    """Numbers of ranks: `8..512` (doubling) or `8,24,96`. Raises ValueError."""
    if ".." in text:
        low, high = (int(part) for part in text.split("..", 1))
        if not 1 <= low <= high:
            raise ValueError(text)
        return [low * 2**power for power in range(int(math.log2(high / low)) + 1)]
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def weak(measured: Compute, links: Links, numbers: Sequence[int]) -> list[Predicted]:
    """As many clips per rank and step as in the measured run, whatever the number of ranks."""
    per_rank = measured.global_batch_size // measured.ranks
    return [predict(measured, links, ranks, per_rank * ranks) for ranks in numbers]


def strong(measured: Compute, links: Links, numbers: Sequence[int]) -> list[Predicted]:
    """The global batch of the measured run; with more ranks than micro-batches these get smaller."""
    found = []
    for ranks in numbers:
        if measured.global_batch_size % ranks:
            continue
        share = measured.global_batch_size // ranks
        micro_batch = math.gcd(share, measured.micro_batch_size)
        found.append(predict(measured, links, ranks, measured.global_batch_size, micro_batch))
    return found


def efficiencies(found: Sequence[Predicted]) -> list[float]:
    """Clips/s per rank of each, as a share of the first one's."""
    per_rank = [one.clips_per_s / one.ranks for one in found]
    return [rate / per_rank[0] for rate in per_rank]
