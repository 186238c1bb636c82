"""The training loop: data, step, EMA, report, checkpoint, stop; the same for everything ardiff trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ardiff.data.clips import BAD_IN_A_ROW, BadSample, count_bad
from ardiff.data.stream import BatchStream, GlobalBatch
from ardiff.errors import UserError
from ardiff.monitor.throughput import Clock, peak_flops
from ardiff.monitor.writers import MetricsWriter
from ardiff.terms import Terms, mean_terms
from ardiff.training import checkpoint, run_dir
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.engine import Engine, learning_rate
from ardiff.training.flat import FlatState
from ardiff.training.job import Feed, Job
from ardiff.training.stop import StopSignal

log = logging.getLogger("ardiff")
FINISHED = "finished"


@dataclass
class Outcome:
    """How a call of `train` ended."""

    reason: str  # FINISHED or the name of the signal
    step: int


class Trainer:
    """State of a run: engine, EMA, position in the data. `train` is the loop; the methods are its verbs."""

    def __init__(self, job: Job, folder: Path, ds_settings: dict[str, Any], world: World) -> None:
        self.job, self.config, self.folder, self.world = job, job.config, folder, world
        config = job.config
        # Initial weights are a function of the seed alone, whatever else was built before them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            objective = job.build_objective()
            discriminator = job.build_discriminator() if job.build_discriminator else None
        begun = world.from_main(lambda: checkpoint.exists_in(folder))
        if job.initialise is not None and begun and world.is_main:
            log.info("train.init is not read again: the run goes on from its checkpoint")
        elif job.initialise is not None and not begun:
            mistake: UserError | None = None
            try:
                job.initialise(objective.network)  # type: ignore[arg-type]
            except UserError as error:
                mistake = error
            world.agree(mistake)
        self.engine = Engine(objective, config, ds_settings, world, discriminator)
        self.flat = FlatState(self.engine.optimizers, self.engine.parameter_names(), world.rank)
        self.ema = ShardedEMA(self.engine.optimizers[0], config.train.ema_decay)
        self.step, self.samples = 0, 0
        self.bad_samples: list[BadSample] = []  # of all ranks, in the order of the run
        self._bad_here: list[BadSample] = []  # of this rank, since the ranks last met
        self.clock = Clock()
        # Decided by the rank that works: all enter the averaged weights together, or none does.
        self.sample_every, self.validate_every = world.from_main(
            lambda: (
                config.train.sample_every if job.preview is not None else 0,
                config.train.validate_every if job.validate is not None else 0,
            )
        )
        self._skipped_in_a_row = 0
        self._phase = -1  # that the engine is prepared for

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the run, if there is one (collective)."""
        found = self.world.from_main(lambda: checkpoint.newest_valid(self.folder))
        if found is None:
            return
        mistake: UserError | None = None
        try:
            state = checkpoint.read_state(found)
            run_dir.check_state(state, self.state(), found)
            checkpoint.load(found, state, self.flat, self.ema, self.engine.objective)
        except UserError as error:
            mistake = error
        self.world.agree(mistake)
        self.flat.publish()
        self.engine.deepspeed.skipped_steps = state.skipped_steps
        self.step, self.samples = state.step, state.samples
        self.bad_samples = [BadSample(*entry) for entry in state.bad_samples]
        if self.job.continue_with(state.mixture, state.samples) and self.world.is_main:
            log.warning("mixing with other weights from here on: %s", self.job.data.history[-1].weights)
        if self.world.is_main:
            log.info("resumed from %s (step %d, %d samples)", found, self.step, self.samples)
            if self.step >= self.config.max_steps:
                log.warning(
                    "the run has gone %d steps, and train.phases or train.max_steps plan %d: nothing is left to train; "
                    "plan more steps than it has gone",
                    self.step,
                    self.config.max_steps,
                )

    @property
    def feed(self) -> Feed:
        """Where the next step's batch comes from."""
        return self.job.feeds[self.config.phase_number(self.step + 1)]

    def open_stream(self) -> BatchStream:
        """Batches of this rank from the current position on."""
        feed = self.feed
        return BatchStream(
            feed.data,
            feed.collate,
            global_batch_size=self.config.train.global_batch_size // feed.counts_as,
            micro_batch_size=self.config.train.micro_batch_size // feed.counts_as,
            rank=self.world.rank,
            world_size=self.world.size,
            position=self.samples,
            prefetch=self.config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    def next_batch(self, stream: BatchStream) -> tuple[BatchStream, GlobalBatch]:
        """The next global batch, and the stream it comes from: another one where a phase with other clips begins."""
        if stream.collate is not self.feed.collate:
            stream.close()
            stream = self.open_stream()
        with self.clock.waiting_for_data():
            return stream, next(stream)

    def train_step(self, batch: GlobalBatch) -> list[Terms]:
        """One optimizer step, EMA included."""
        if self._phase != self.config.phase_number(self.step + 1):
            self._enter_phase()
        terms, applied = self.engine.step(batch, self.step + 1)
        self._bad_here += batch.bad
        self.step += 1
        self.samples += batch.size
        self._skipped_in_a_row = 0 if applied.everything else self._skipped_in_a_row + 1
        if applied.network:
            self.ema.update(self.engine.learns())
        if self._skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"step {self.step}: gradients were not finite in {self._skipped_in_a_row} steps in a row; lower "
                "train.phases' lr or train.grad_clip and start again, it resumes from the last checkpoint"
            )
        self.clock.step()
        return terms

    def meet_bad_samples(self) -> UserError | None:
        """Let all ranks know of all replaced samples (collective); returns why the run has to end, if it has to."""
        new = sorted(bad for part in self.world.gather(self._bad_here) for bad in part)
        self._bad_here = []
        if not new:
            return None
        self.bad_samples += (BadSample(*entry) for entry in new)
        if self.world.is_main:
            for position, shard, offset, reason in new:
                log.warning("BAD SAMPLE at position %d replaced: %s, byte %d: %s", position, shard, offset, reason)
        bad, in_a_row = count_bad(self.bad_samples, self.job.data.lanes)
        share, seen = self.config.data.max_bad_fraction, max(self.samples, self.job.data.visits_per_epoch)
        if in_a_row >= BAD_IN_A_ROW:
            problem = f"{in_a_row} bad samples in a row"
        elif bad > share * seen:
            problem = f"{bad} bad samples in {seen} (an epoch, or all so far)"
            problem += f", more than data.max_bad_fraction = {share:g}"
        else:
            return None
        return UserError(
            f"{problem}; the last: {new[-1].shard}, byte {new[-1].offset}: {new[-1].reason}; see "
            "`python -m data_tools.inspect_shards repair`, or allow more"
        )

    def _enter_phase(self) -> None:
        """Freeze and thaw what the phase of the next step wants (collective)."""
        self._phase = self.config.phase_number(self.step + 1)
        if self.job.enter is not None:
            self.job.enter(self.engine.objective, self.config.train.phases[self._phase])
        learns = self.engine.learns()
        if self.step and self.config.phase_number(self.step) != self._phase and not all(learns):
            self.ema.settle(learns)  # it is the average that is measured, kept and used

    def report(self, terms: list[Terms], writer: MetricsWriter | None, validation: dict[str, Any]) -> None:
        """Metrics of this step (collective); speeds are means since the last report."""
        feed = self.job.feeds[self.config.phase_number(self.step)]
        self.world.agree(self.meet_bad_samples())
        means = mean_terms(terms, self.world.sum)
        grad_norm = float(self.engine.grad_norm())
        speed = self.clock.report()
        waits = self.world.gather(speed["data_wait_frac"])
        if writer is None:
            return
        per_second = self.config.train.global_batch_size // feed.counts_as / speed["seconds_per_step"]
        flops = 3 * feed.flops_per_clip * per_second / self.world.size
        peak = peak_flops(self.world.device)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.world.device.type == "cuda" else None
        writer.write(
            {
                "step": self.step,
                "samples": self.samples,
                "loss": means.pop("loss"),
                "grad_norm": grad_norm,
                "lr": learning_rate(self.config, self.step),
                "skipped_steps": self.engine.skipped_steps,
                "bad_samples": count_bad(self.bad_samples, 1)[0],
                "clips_per_s": per_second,
                "tokens_per_s": per_second * feed.tokens_per_clip,
                "tflops_per_gpu": flops / 1e12,
                "mfu": flops / peak if peak else None,
                "data_wait_frac": max(waits),
                "step_ms": 1000 * speed["seconds_per_step"],
                "peak_memory_gb": memory,
                **means,
                **validation,
            }
        )

    def save(self, writer: MetricsWriter | None) -> None:
        """Write a checkpoint (collective)."""
        mistake = self.meet_bad_samples()
        if writer is not None:
            writer.flush()
        path = checkpoint.save(
            self.folder, self.state(), self.flat, self.ema, self.engine.objective, self.config, self.world
        )
        if self.world.is_main:
            log.info("checkpoint %s", path)
        self.world.agree(mistake)

    def state(self) -> checkpoint.State:
        """What a checkpoint says of this moment."""
        return checkpoint.State(
            step=self.step,
            samples=self.samples,
            skipped_steps=self.engine.skipped_steps,
            adam_steps=self.flat.adam_steps(),
            ema_updates=self.ema.num_updates,
            seed=self.config.train.seed,
            order=self.job.data.order,
            data_identity=self.job.data.identity,
            mixture=[list(change) for change in self.job.data.history],
            bad_samples=[list(bad) for bad in self.bad_samples],
            precision=self.engine.precision,
            world_size=self.world.size,
            layout=self.flat.layout,
            phase=self.config.phase_number(self.step),
            latent_space=self.job.latent_space.as_json() if self.job.latent_space else None,
            versions=run_dir.versions(),
        )

    def preview(self, writer: MetricsWriter | None) -> None:
        """Sample videos with the averaged weights (collective)."""

        def show(network: nn.Module) -> dict[str, Any]:
            assert writer is not None and self.job.preview is not None  # it is rank 0
            for tag, video in self.job.preview(network).items():
                writer.add_video(tag, video, self.step, self.config.sampling.fps)
            return {}

        self._averaged(show, "sample videos")

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never), and after the last, is due."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.max_steps)

    def validate(self) -> dict[str, Any]:
        """Where it is due: what the averaged weights do on held-out videos (collective); empty on all but rank 0."""
        if not self.is_due(self.validate_every):
            return {}
        with self.clock.paused():
            return self._averaged(self.job.validate, "validation")

    def _averaged(self, work: Callable[[nn.Module], dict[str, Any]] | None, what: str) -> dict[str, Any]:
        """What rank 0 finds with the averaged weights in evaluation mode; all ranks enter."""
        found: dict[str, Any] = {}
        with self.ema.swapped_in():
            if self.world.is_main and work is not None:
                objective = self.engine.objective.eval()
                try:  # a failure here must neither end a run of weeks nor leave the other ranks waiting
                    with torch.no_grad():
                        found = work(objective.network)  # type: ignore[arg-type]
                except Exception:
                    log.exception("no %s at step %d", what, self.step)
                objective.train()
            self.world.barrier()
        return found


def train(trainer: Trainer) -> Outcome:
    """Train until max_steps or an agreed stop; always ends with a checkpoint of the last step."""
    config, world, clock = trainer.config, trainer.world, trainer.clock
    last = config.max_steps
    writer = MetricsWriter(trainer.folder, trainer.step + 1, last) if world.is_main else None
    stream = trainer.open_stream()
    saved = trainer.step
    reason = FINISHED
    clock.reset()
    with StopSignal(world) as stop:
        try:
            while trainer.step < last:
                stream, batch = trainer.next_batch(stream)
                terms = trainer.train_step(batch)
                if trainer.is_due(config.train.log_every) or trainer.is_due(trainer.validate_every):
                    trainer.report(terms, writer, trainer.validate())
                signal_name = stop.agreed()
                with clock.paused():
                    if trainer.step % config.train.save_every == 0:
                        trainer.save(writer)
                        saved = trainer.step
                    if trainer.sample_every and trainer.step % trainer.sample_every == 0:
                        trainer.preview(writer)
                if signal_name and trainer.step < last:
                    reason = signal_name
                    break
            stop.close()
            if saved != trainer.step:
                trainer.save(writer)
        finally:
            stream.close()
            if writer is not None:
                writer.close()
    return Outcome(reason, trainer.step)
