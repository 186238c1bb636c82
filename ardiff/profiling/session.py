"""Training for a number of steps and measuring it: the trainer of training, with a stop-watch attached.

What of training is left out: checkpoints, sample videos and validation. Everything else is what `ardiff.training.loop`
does in a step, by the same objects.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from ardiff.config import Config
from ardiff.errors import UserError
from ardiff.preflight.compute import matmul_rate
from ardiff.profiling.instruments import Sent, Traffic, attached
from ardiff.profiling.timeline import DATA, LOGGING, PARTS, REST, Timeline
from ardiff.training.distributed import World
from ardiff.training.job import Job
from ardiff.training.stop import StopSignal
from ardiff.training.trainer import Trainer
from ardiff.training.watchdog import Watchdog

ENDLESS = 1_000_000_000  # steps: the last step of a run does more than others
ORDER = (False, True, True, False)  # steps without and with the stop-watch, so that a drift concerns both alike
PROBE = (384, 0.02)  # side and seconds of matrix products between steps
BLOCK = 5  # steps on a GPU between waits for it


@dataclass(frozen=True)
class Measured:
    """Steps of a run: milliseconds each, means over the ranks (which end a step at about the same time).

    plain_ms: without the stop-watch. timed_ms: with it. parts: mean milliseconds of each part per rank, of the timed
    steps. sent: by DeepSpeed, per step and rank. speed: FLOP/s of matrix products on a rank, measured between the
    steps on CPUs, where ranks (and other programs) share cores; 0 on GPUs.
    """

    plain_ms: list[float]
    timed_ms: list[float]
    parts: list[dict[str, float]]
    sent: dict[str, Sent]
    speed: float

    @property
    def step_ms(self) -> float:
        """The mean step, without the stop-watch."""
        return fmean(self.plain_ms)

    @property
    def mean_parts(self) -> dict[str, float]:
        """Over the ranks."""
        return {name: fmean(rank[name] for rank in self.parts) for name in PARTS}

    @property
    def overhead(self) -> float:
        """Of the stop-watch, as a share of the median step."""
        return median(self.timed_ms) / median(self.plain_ms) - 1

    @property
    def median_ms(self) -> float:
        """The median step, without the stop-watch."""
        return median(self.plain_ms)

    @property
    def sum_against_step(self) -> float:
        """By how much the sum of parts differs from the step without the stop-watch, as a share of that.

        The two are of different steps, so medians are compared, as other programs disturb single ones: the sum is taken
        to be of the timed steps' median what the mean sum is of their mean.
        """
        return (1 + self.sum_error) * median(self.timed_ms) / self.median_ms - 1

    @property
    def sum_error(self) -> float:
        """By how much the sum of parts differs from the timed steps, as a share of them."""
        return sum(self.mean_parts.values()) / fmean(self.timed_ms) - 1

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        total = sum(self.mean_parts.values())
        return {
            "step_ms": self.step_ms,
            "step_ms_median": self.median_ms,
            "step_ms_all": self.plain_ms,
            "parts_ms": self.mean_parts,
            "parts_ms_by_rank": self.parts,
            "matmul_tflops_between_steps": self.speed / 1e12,
            "parts_ms_sum": total,
            "timed_step_ms": fmean(self.timed_ms),
            "sum_against_timed_step": self.sum_error,
            "sum_against_step": self.sum_against_step,
            "overhead_of_timing": self.overhead,
            "sent_per_step": {name: vars(sent) for name, sent in self.sent.items()},
        }


def profiled(config: Config, steps: int) -> Config:
    """The configuration with what is left out switched off; reports at an odd interval, as steps alternate."""
    train = config.train
    train.max_steps, train.sample_every, train.validate_every = ENDLESS, 0, 0
    train.log_every = min(train.log_every, steps) | 1
    train.spike_sigmas = 0.0  # random latents have no loss to watch
    return config


def built(build_job: Callable[[Config], Job], config: Config, world: World) -> Job:
    """The job on every rank, or UserError on every rank: shards may be missing on one node only (collective)."""
    job: Job | None = None
    mistake: UserError | None = None
    try:
        job = build_job(config)
        job.check(world.size)
    except UserError as error:
        mistake = error
    world.agree(mistake)
    assert job is not None
    return job


@contextmanager
def session(job: Job, folder: Path, ds_settings: dict[str, Any], world: World) -> Iterator[Trainer]:
    """A trainer at its first step (collective). Its memory is free again behind the block."""
    trainer: Trainer | None = None
    with Watchdog(folder, world.rank, world.size, job.config.train.hang_limit) as watchdog:
        try:
            trainer = Trainer(job, folder, ds_settings, world, watchdog, StopSignal())
            setattr(trainer.saver, "check_space", lambda *_: None)  # noqa: B010 - no checkpoint will be written
            with trainer.running():
                yield trainer
        finally:
            if trainer is not None:
                trainer.engine.deepspeed.destroy()
            del trainer
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


def train_step(trainer: Trainer, timeline: Timeline) -> None:
    """What the loop of training does in a step."""
    with timeline.part(DATA):
        batch = trainer.next_batch()
    assert batch is not None  # nobody asks this run to stop
    terms = trainer.train_step(batch)
    if trainer.report_is_due:
        with timeline.part(LOGGING):
            trainer.report(terms)
    with timeline.part(REST):
        trainer.agree()


def measure(trainer: Trainer, warmup: int, steps: int, say: Callable[[str], None] = lambda _: None) -> Measured:
    """Train `warmup` steps and then twice `steps`, half of them with the stop-watch (collective)."""
    world = trainer.world
    timeline, traffic = Timeline(world.device), Traffic()
    times: dict[bool, list[float]] = {False: [], True: []}
    block = min(BLOCK, max(1, steps // 4)) if world.device.type == "cuda" else 1
    speeds = [0.0]
    with attached(trainer, timeline, traffic):
        say(f"warming up: {warmup} steps")
        for _ in range(warmup):
            train_step(trainer, timeline)
        say(f"measuring: {2 * steps} steps")
        number = 0
        while min(map(len, times.values())) < steps:
            timed = ORDER[number % len(ORDER)]
            number += 1
            times[timed] += _block(trainer, timeline, block, timed)
            if world.device.type == "cpu":
                speeds.append(matmul_rate(world.device, *PROBE)[0])
        parts = timeline.take()
    everyone = world.gather((times[False], times[True], parts, fmean(speeds[1:] or speeds)))
    sent = {
        name: Sent(round(sent.calls / len(parts)), round(sent.bytes / len(parts)))
        for name, sent in traffic.take().items()
    }
    return Measured(
        plain_ms=[fmean(steps) for steps in zip(*(rank[0] for rank in everyone), strict=True)],
        timed_ms=[fmean(steps) for steps in zip(*(rank[1] for rank in everyone), strict=True)],
        parts=[_mean(rank[2]) for rank in everyone],
        sent=sent,
        speed=fmean(rank[3] for rank in everyone),
    )


def _mean(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(step[name] for step in steps) for name in PARTS}


def _block(trainer: Trainer, timeline: Timeline, steps: int, timed: bool) -> list[float]:
    """Milliseconds of each of some steps in a row; on a GPU their mean, as nothing waits for it in between."""
    device = trainer.world.device
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        with timeline.step() if timed else contextlib.nullcontext():
            train_step(trainer, timeline)
    synchronize(device)
    return [1000 * (time.perf_counter() - begin) / steps] * steps


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
