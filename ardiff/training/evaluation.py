"""What is done with the averaged weights while a run trains: validation and sample videos."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ardiff.errors import UserError
from ardiff.monitor.writers import MetricsWriter
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.engine import Engine
from ardiff.training.job import Job, Validate
from ardiff.training.stop import Interrupted, StopSignal
from ardiff.training.watchdog import Watchdog

log = logging.getLogger("ardiff")
LOOK_EVERY = 1.0  # seconds between looks at what other ranks do


class Share(NamedTuple):
    """What one rank found, or why it could not."""

    found: Any
    problem: str | None = None
    stopped: bool = False  # the run was asked to stop


def attempt(work: Callable[[], Any], what: str, step: int) -> Share:
    """Do work whose failure ends neither the run nor leaves a rank waiting: it is told, with where it happened."""
    try:
        return Share(work())
    except Interrupted:
        log.warning("no %s at step %d: the run was asked to stop", what, step)
        return Share(None, stopped=True)
    except Exception as error:
        log.exception("no %s at step %d", what, step)
        return Share(None, f"{type(error).__name__}: {error}")


def measure(validate: Validate | None, objective: nn.Module, rank: int, world_size: int) -> Any:
    """This rank's part of a validation."""
    if validate is None:
        raise UserError("no held-out data here, although rank 0 has them")
    return validate.measure(objective, rank, world_size)


def combine(validate: Validate, shares: list[Share], step: int) -> dict[str, Any]:
    """The figures of all ranks' shares (rank 0); empty where a rank failed or was asked to stop."""
    failed = [(rank, share.problem) for rank, share in enumerate(shares) if share.problem is not None]
    if failed:
        log.error("no validation at step %d: rank %d: %s", step, *failed[0])
    if failed or any(share.stopped for share in shares):
        return {}
    return attempt(lambda: validate.combine([share.found for share in shares]), "validation", step).found or {}


class Evaluation:
    """Runs a job's validation and preview. A failure there must neither end a run of weeks nor leave a rank waiting."""

    def __init__(
        self, job: Job, engine: Engine, ema: ShardedEMA, world: World, watchdog: Watchdog, stop: StopSignal
    ) -> None:
        self._job, self._engine, self._ema, self._world = job, engine, ema, world
        self._watchdog, self._stop = watchdog, stop
        self._looked, self._progress = 0.0, 0  # when, and what, of the others' work
        self._meetings = 0
        # Decided by the rank that works: all enter the averaged weights together, or none does.
        self.sample_every, self.validate_every = world.from_main(
            lambda: (
                job.config.train.sample_every if job.preview is not None else 0,
                job.config.train.validate_every if job.validate is not None else 0,
            )
        )

    def validate(self, step: int) -> dict[str, Any]:
        """What the averaged weights do on held-out videos (collective); empty on all but rank 0."""
        self._watchdog.enter("validation", step)
        validate, world = self._job.validate, self._world
        work = partial(measure, validate, rank=world.rank, world_size=world.size)
        shares = world.gather(self._averaged(work, "validation", step))
        if not world.is_main:
            return {}
        assert validate is not None
        return combine(validate, shares, step)

    def preview(self, step: int, writer: MetricsWriter | None) -> None:
        """Sample videos (collective); rank 0 draws them."""
        self._watchdog.enter("sampling", step)
        job = self._job

        def show(objective: nn.Module) -> None:
            assert writer is not None and job.preview is not None  # it is rank 0
            for tag, video in job.preview(objective.network).items():  # type: ignore[arg-type]
                writer.add_video(tag, video, step, job.config.sampling.fps)

        self._averaged(show if self._world.is_main else lambda _: None, "sample videos", step)

    def _averaged(self, work: Callable[[nn.Module], Any], what: str, step: int) -> Share:
        """What this rank finds with the averaged weights in evaluation mode (all ranks enter)."""

        def with_weights() -> Any:
            with torch.no_grad(), self._attentive():
                return work(objective)

        with self._ema.swapped_in():
            objective = self._engine.objective.eval()
            try:
                share = attempt(with_weights, what, step)
            finally:
                objective.train()
            self._meetings += 1
            self._world.meet(f"evaluated/{self._meetings}", self._while_others_work)
        return share

    @contextmanager
    def _attentive(self) -> Iterator[None]:
        """Inside, every forward of a module is progress, and a stop signal on any rank ends the work."""
        looked = time.monotonic()

        def look(*_: Any) -> None:
            nonlocal looked
            self._watchdog.beat()
            if self._stop.reason is not None:
                raise Interrupted
            if time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                self._world.tally("progress", 1)
                if self._world.tally("stop"):
                    raise Interrupted

        handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def _while_others_work(self) -> None:
        """A rank that waits hangs only if those that work do."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        if self._stop.reason is not None and not self._world.tally("stop"):
            self._world.tally("stop", 1)
        if (progress := self._world.tally("progress")) != self._progress:
            self._progress = progress
            self._watchdog.beat()
