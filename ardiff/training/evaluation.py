"""What is done with the averaged weights while a run trains: validation and sample videos."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ardiff.monitor.writers import MetricsWriter
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.engine import Engine
from ardiff.training.job import Job
from ardiff.training.stop import Interrupted, StopSignal
from ardiff.training.validation import Share, combined, measured_share
from ardiff.training.watchdog import Watchdog

log = logging.getLogger("ardiff")
LOOK_EVERY = 1.0  # seconds between looks at what other ranks do


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

        def measure(objective: nn.Module) -> Share:
            return measured_share(validate, objective, world.rank, world.size)

        shares = world.gather(self._averaged(measure, "validation", step))
        if not world.is_main or None in shares:
            return {}
        assert validate is not None
        return combined(validate, shares, step)

    def preview(self, step: int, writer: MetricsWriter | None) -> None:
        """Sample videos (collective); rank 0 draws them."""
        self._watchdog.enter("sampling", step)
        job = self._job

        def show(objective: nn.Module) -> None:
            assert writer is not None and job.preview is not None  # it is rank 0
            for tag, video in job.preview(objective.network).items():  # type: ignore[arg-type]
                writer.add_video(tag, video, step, job.config.sampling.fps)

        self._averaged(show if self._world.is_main else lambda _: None, "sample videos", step)

    def _averaged(self, work: Callable[[nn.Module], Any], what: str, step: int) -> Any:
        """What this rank finds with the averaged weights in evaluation mode (all ranks enter); None if it failed."""
        found = None
        with self._ema.swapped_in():
            objective = self._engine.objective.eval()
            try:
                with torch.no_grad(), self._attentive():
                    found = work(objective)
            except Interrupted:
                log.warning("no %s at step %d: the run was asked to stop", what, step)
            except Exception:
                log.exception("no %s at step %d", what, step)
            finally:
                objective.train()
            self._meetings += 1
            self._world.meet(f"evaluated/{self._meetings}", self._while_others_work)
        return found

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
