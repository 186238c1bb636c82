"""The state of a run and what can be done with it: step, report, agree, save, resume, roll back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ardiff.data.describing import describe_samples
from ardiff.data.stream import BatchStream, GlobalBatch
from ardiff.errors import UserError
from ardiff.monitor.writers import Details, MetricsWriter
from ardiff.terms import Terms, mean_terms
from ardiff.training import checkpoint, probe, run_dir
from ardiff.training.bad_samples import BadSamples
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.engine import Engine, learning_rate
from ardiff.training.evaluation import Evaluation
from ardiff.training.flat import FlatState
from ardiff.training.job import Feed, Job
from ardiff.training.reporting import Reporter
from ardiff.training.saving import Saver
from ardiff.training.spikes import MOST_ROLLBACKS, Spike, SpikeWatch
from ardiff.training.stop import Agreed, Agreement, Say, StopSignal, leave_together
from ardiff.training.watchdog import Watchdog

log = logging.getLogger("ardiff")
PATIENCE = 1.0  # seconds of waiting for data after which a rank looks whether it is to stop
NAMED_SAMPLES = 16  # of a step that went wrong, so many in the log


class Trainer:
    """State of a run: engine, EMA, position in the data. The loop is `ardiff.training.loop.train`."""

    def __init__(
        self, job: Job, folder: Path, ds_settings: dict[str, Any], world: World, watchdog: Watchdog, stop: StopSignal
    ) -> None:
        self.job, self.config, self.folder, self.world, self.watchdog = job, job.config, folder, world, watchdog
        train = job.config.train
        # Initial weights are a function of the seed alone, whatever else was built before them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)
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
        self.engine = Engine(objective, self.config, ds_settings, world, discriminator)
        self.flat = FlatState(self.engine.optimizers, self.engine.parameter_names(), world.rank)
        self.ema = ShardedEMA(self.engine.optimizers[0], [train.ema_decay, *train.extra_ema_decays])
        self.saver = Saver(folder, self.config, world)
        self.stop = stop
        self.reporter = Reporter(world, self.config)
        self.engine.forward_timer = self._forward
        self.evaluation = Evaluation(job, self.engine, self.ema, world, watchdog, self.stop)
        self.step, self.samples = 0, 0
        self.saved = 0  # the step of the newest checkpoint
        self.problem: UserError | None = None  # what ends the run, after a checkpoint; the same on all ranks
        self.bad_samples = BadSamples(job.data, job.config.data, world)
        self.skipped: list[list[Any]] = []  # stretches of samples [start, end, reason] that are left out
        self._agreement, self._agreed = Agreement(world), Agreed()
        self._spikes = SpikeWatch(train)
        self._rollbacks = (0, 0)  # to which step, how often
        self._saved_at = time.monotonic()
        self._skipped_in_a_row = 0
        self._phase = -1  # that the engine is prepared for
        self._mistake: UserError | None = None  # of this rank, which the others do not know yet
        self._stream: BatchStream | None = None
        self._writer: MetricsWriter | None = None

    # --- where the run is ---

    @property
    def updates(self) -> int:
        """Steps that changed the weights: skipped ones do not advance the schedule."""
        return self.step - self.engine.skipped_steps

    @property
    def feed(self) -> Feed:
        """Where the next step's batch comes from."""
        return self.job.feeds[self.config.phase_number(self.updates + 1)]

    def state(self) -> checkpoint.State:
        """What a checkpoint says of this moment."""
        return checkpoint.State(
            step=self.step,
            samples=self.samples,
            skipped_steps=self.engine.skipped_steps,
            adam_steps=self.flat.adam_steps(),
            ema_updates=list(self.ema.num_updates),
            ema_decays=list(self.ema.decays),
            seed=self.config.train.seed,
            order=self.job.data.order,
            data_identity=self.job.data.identity,
            mixture=[list(change) for change in self.job.data.history],
            bad_samples=self.bad_samples.state(),
            skipped=[list(stretch) for stretch in self.skipped],
            recent_losses=self._spikes.detector.state(),
            precision=self.engine.precision,
            world_size=self.world.size,
            layout=self.flat.layout,
            phase=self.config.phase_number(max(1, self.updates)),
            latent_space=self.job.latent_space.as_json() if self.job.latent_space else None,
            versions=run_dir.versions(),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, batches and metrics flow."""
        if self.step < self.config.max_steps:
            self.saver.check_space(self.flat, self.ema, self.engine.objective)
        self._open()
        try:
            with self.reporter.sampling():
                yield
        finally:
            self._close()
            self.saver.close()

    def _open(self) -> None:
        self._stream = self._open_stream()
        if self.world.is_main:
            self._writer = MetricsWriter(self.folder, self.step + 1, self.config.max_steps)
            if self.step == 0 and self.job.pictures is not None:
                for tag, picture in self.job.pictures().items():
                    self._writer.add_picture(tag, picture, 0)
        self.reporter.clock.reset()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._writer is not None:
            self._writer.close()

    def _open_stream(self) -> BatchStream:
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
            skipped=[(start, end) for start, end, _ in self.skipped],
            prefetch=self.config.data.prefetch,
            pin_memory=self.world.device.type == "cuda",
        )

    # --- a step ---

    def next_batch(self) -> GlobalBatch | None:
        """The next global batch; None when all ranks are to stop while they wait for it."""
        assert self._stream is not None
        self.watchdog.enter("waiting for data", self.step + 1)
        if self._stream.collate is not self.feed.collate:  # a phase with other clips begins
            self._stream.close()
            self._stream = self._open_stream()
        stream = self._stream
        with self.reporter.clock.waiting_for_data():
            while not stream.ready(PATIENCE):
                if self.stop.reason is not None:
                    self.world.tally("stop", 1)
                if self.world.tally("stop") and leave_together(self.world, self.step, lambda: stream.ready(0.1)):
                    return None
            return next(stream)

    def train_step(self, batch: GlobalBatch) -> list[Terms]:
        """One optimizer step, EMA included."""
        self.watchdog.enter("training step", self.step + 1)
        scheduled = self.updates + 1
        if self._phase != self.config.phase_number(scheduled):
            self._enter_phase(scheduled)
        measure = bool(self.config.train.grad_norms_every) and (self.step + 1) % self.config.train.grad_norms_every == 0
        terms, applied = self.engine.step(batch, scheduled, measure)
        self.bad_samples.add(batch.bad)
        self.step += 1
        self.samples = batch.position + batch.size
        self._skipped_in_a_row = 0 if applied.everything else self._skipped_in_a_row + 1
        if applied.network:
            self.ema.update(self.engine.learns())
            self._spikes.put(self.step, batch, self._phase, terms)
        if not applied.everything:
            self._tell_of_skipped(batch)
        self.reporter.clock.step()
        return terms

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Around a forward pass, behind which the ranks wait for each other."""
        with self.reporter.times.forward():
            yield
        self.watchdog.enter("gradients and update", self.step + 1)

    def _tell_of_skipped(self, batch: GlobalBatch) -> None:
        most = self.config.train.max_skipped_steps
        if self.world.is_main:
            log.warning(
                "SKIPPED STEP %d: loss or gradients are not finite (%d in a row, %d end the run); samples %d to %d: %s",
                *(self.step, self._skipped_in_a_row, most, batch.position, batch.position + batch.size - 1),
                self._named(self._phase, batch.position, batch.size),
            )
        if self._skipped_in_a_row >= most:
            self.problem = UserError(
                f"step {self.step}: gradients were not finite in {self._skipped_in_a_row} steps in a row "
                "(train.max_skipped_steps); lower train.phases' lr or train.grad_clip and start again, it goes on from "
                "the checkpoint of this step"
            )

    def _named(self, phase: int, first: int, size: int) -> str:
        names = describe_samples(self.job.feeds[phase].data, first, min(size, NAMED_SAMPLES))
        return ", ".join(names) + (f" and {size - NAMED_SAMPLES} more" if size > NAMED_SAMPLES else "")

    def _enter_phase(self, scheduled: int) -> None:
        """Freeze and thaw what the phase of the next step wants (collective)."""
        self._phase = self.config.phase_number(scheduled)
        if self.job.enter is not None:
            self.job.enter(self.engine.objective, self.config.train.phases[self._phase])
        learns = self.engine.learns()
        if self.updates and self.config.phase_number(self.updates) != self._phase and not all(learns):
            self.ema.settle(learns)  # it is the average that is measured, kept and used

    # --- what the ranks tell each other ---

    def asked_to_stop(self) -> str | None:
        """Whether any rank was, before training began (collective)."""
        return next(filter(None, self.world.gather(self.stop.reason)), None)

    def agree(self) -> tuple[Agreed, bool]:
        """What all ranks said up to the step before (no waiting), and whether its loss made the run roll back."""
        minutes = self.config.train.save_minutes
        late = self.world.is_main and bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        failed = self.saver.failed or self._mistake is not None
        rolled_back = self._hear(self._agreement.tell(Say(self.stop.reason, late, failed, self._spikes.next_loss())))
        return self._agreed, rolled_back

    def _hear(self, agreed: Agreed | None) -> bool:
        """Take in what was agreed; whether it made the run roll back."""
        if agreed is None:
            return False
        self._agreed.add(agreed)
        return self._handle(self._spikes.judge(agreed.loss))

    def settle(self) -> None:
        """Wait for what is being written (collective). Raises UserError on every rank if anything could not be."""
        self.world.agree(self._mistake)
        self.saver.wait()

    def _is_good(self) -> bool:
        """Whether the losses of all steps so far are (collective, waits); if not, the run has been rolled back."""
        while True:
            if self._hear(self._agreement.settle()):
                return False
            if not self._spikes.untold:
                return True
            self._agreement.tell(Say(loss=self._spikes.next_loss(newest_too=True)))

    def _handle(self, spike: Spike | None) -> bool:
        """Tell of a spike and roll back, if wanted and possible; whether it was done (the same on all ranks)."""
        if spike is None:
            return False
        if self.world.is_main:
            names = self._named(spike.phase, spike.start, spike.end - spike.start)
            log.warning("%s; samples %d to %d: %s", spike, spike.start, spike.end - 1, names)
        return self.config.train.spike_action == "rollback" and self._roll_back(spike)

    # --- reports and evaluation ---

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never), and after the last, is due."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.max_steps)

    @property
    def report_is_due(self) -> bool:
        """Whether this step's metrics are written."""
        train = self.config.train
        measured = bool(train.grad_norms_every) and self.step % train.grad_norms_every == 0
        return self.is_due(train.log_every) or self.is_due(self.evaluation.validate_every) or measured

    def report(self, terms: list[Terms]) -> None:
        """Metrics of this step (collective); speeds are means since the last report."""
        train = self.config.train
        validation: dict[str, Any] = {}
        if self.is_due(self.evaluation.validate_every):
            with self.reporter.clock.paused():
                validation = self.evaluation.validate(self.step)
        self.watchdog.enter("report", self.step)
        scheduled = max(1, self.updates)
        feed = self.job.feeds[self.config.phase_number(scheduled)]
        self.problem = self.problem or self.bad_samples.meet(self.samples)
        means = mean_terms(terms, self.world.sum)
        norms: dict[str, Any] = {}
        if train.grad_norms_every and self.step % train.grad_norms_every == 0:
            norms = {"grad_norm_of": self.engine.layer_norms()}
        speeds, details = self.reporter.report(feed, self.step)
        self._write(
            {
                "step": self.step,
                "samples": self.samples,
                "loss": means.pop("loss"),
                "grad_norm": float(self.engine.grad_norm()),
                "lr": learning_rate(self.config, scheduled),
                "skipped_steps": self.engine.skipped_steps,
                "bad_samples": self.bad_samples.count,
                **speeds,
                **means,
                **norms,
                **validation,
            },
            details,
        )

    def _write(self, metrics: dict[str, Any] | None, details: Details | None = None) -> None:
        """On rank 0, a report, or (None) have all of them on the disk. What fails is told to all ranks by `agree`."""
        if self._writer is None:
            return
        try:
            if metrics is None:
                self._writer.flush()
            else:
                self._writer.write(metrics, details)
        except UserError as error:
            self._mistake = self._mistake or error

    @property
    def preview_is_due(self) -> bool:
        """Whether sample videos are drawn after this step."""
        every = self.evaluation.sample_every
        return bool(every) and self.step % every == 0

    def preview(self) -> None:
        """Sample videos with the averaged weights (collective)."""
        self.evaluation.preview(self.step, self._writer)

    # --- checkpoints ---

    def save_if_good(self) -> bool:
        """Begin to write a checkpoint (collective), unless a loss so far made the run roll back: then False.

        Training goes on when this rank's state is copied. Raises UserError on every rank when metrics could not be
        written: a resumed run takes those before its checkpoint for complete.
        """
        self.watchdog.enter("checkpoint", self.step)
        if not self._is_good():
            return False
        if self.saved == self.step:
            return True
        self.problem = self.problem or self.bad_samples.meet(self.samples)
        self._write(None)
        self.world.agree(self._mistake)
        predictions = probe.take(self.engine.objective) if self.world.is_main else None
        self.saver.begin(self.state(), self.flat, self.ema, self.engine.objective, predictions)
        self.saved, self._saved_at, self._agreed.save = self.step, time.monotonic(), False
        if self.world.is_main:
            with suppress(OSError):  # of use to people only
                run_dir.write_exit(self.folder, run_dir.RUNNING, None, self.step)
        return True

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the run, if there is one (collective)."""
        found = self.world.from_main(lambda: checkpoint.newest_valid(self.folder))
        if found is None:
            return
        state = self._restore(found)
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

    def _restore(self, found: Path) -> checkpoint.State:
        """Make this run what a checkpoint says (collective)."""
        self.watchdog.enter("loading a checkpoint", self.step)
        mistake: UserError | None = None
        state: checkpoint.State | None = None
        try:
            state = checkpoint.read_state(found)
            run_dir.check_state(state, self.state(), found)
            checkpoint.load(found, state, self.flat, self.ema, self.engine.objective)
        except UserError as error:
            mistake = error
        self.world.agree(mistake)
        assert state is not None
        self.flat.publish()
        self.engine.deepspeed.skipped_steps = state.skipped_steps
        self.step, self.samples, self.saved = state.step, state.samples, state.step
        self.bad_samples.restore(state.bad_samples)
        self._phase, self._skipped_in_a_row = -1, 0
        self.skipped = [list(stretch) for stretch in state.skipped]
        self._spikes.restart(state.recent_losses, state.phase)
        self._compare_predictions(found, state)
        return state

    def _compare_predictions(self, found: Path, state: checkpoint.State) -> None:
        """Refuse weights that do not predict what they did when they were saved (collective)."""

        def compare() -> None:
            stored = checkpoint.read_probe(found)
            if stored is not None:
                predictions = probe.take(self.engine.objective)
                probe.compare(found, stored, predictions, self.config.train.probe_tolerance, state.versions)

        self.world.from_main(compare)

    def _roll_back(self, spike: Spike) -> bool:
        """Go back to the checkpoint before a spike and leave its samples out from then on (collective)."""
        self.saver.wait()
        found = self.world.from_main(lambda: checkpoint.newest_valid(self.folder))
        if found is None:
            if self.world.is_main:
                log.warning("no checkpoint to roll back to yet: going on")
            return False
        self._agreed.add(self._agreement.settle() or Agreed())  # its loss is of a step that will be done again
        skipped = self.skipped
        self._close()
        state = self._restore(found)
        stretch = [max(spike.start, state.samples), spike.end, f"loss spike at step {spike.step}"]
        self.skipped = [*skipped, stretch]
        before, times = self._rollbacks
        self._rollbacks = (state.step, times + 1 if before == state.step else 1)
        if self._rollbacks[1] >= MOST_ROLLBACKS:
            self.problem = UserError(
                f"{found}: rolled back to {MOST_ROLLBACKS} times, and the loss still spikes (last at step "
                f"{spike.step}): lower train.phases' lr, or set train.spike_action = warn"
            )
        if self.world.is_main:
            log.warning("ROLLED BACK to %s; left out from now on: samples %d to %d", found, stretch[0], spike.end - 1)
        self._open()
        return True
