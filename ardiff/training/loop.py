"""The training loop; the same for everything ardiff trains. What its verbs do is in trainer.py."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ardiff.training.trainer import Trainer

log = logging.getLogger("ardiff")
FINISHED = "finished"


@dataclass
class Outcome:
    """How a call of `train` ended."""

    reason: str  # FINISHED, the name of the signal, or the time limit
    step: int


def train(trainer: Trainer) -> Outcome:
    """Train until max_steps or an agreed stop; always ends with a checkpoint of the last step."""
    config, clock = trainer.config.train, trainer.reporter.clock
    last = trainer.config.max_steps
    if (asked := trainer.asked_to_stop()) and trainer.step < last:
        return Outcome(asked, trainer.step)  # nothing has been done since the checkpoint
    reason = FINISHED
    with trainer.running():
        while trainer.step < last:
            terms = trainer.train_step(trainer.next_batch())
            if trainer.report_is_due:
                trainer.report(terms)
            agreed, rolled_back = trainer.agree()
            if agreed.failed:
                trainer.settle()  # raises on every rank: metrics or a checkpoint could not be written
            ends = trainer.step == last or agreed.stop is not None or trainer.problem is not None
            due = ends or agreed.save or trainer.step % config.save_every == 0
            with clock.paused():
                if due and not rolled_back and trainer.is_good():
                    trainer.save()
                if trainer.preview_is_due and agreed.stop is None:
                    trainer.preview()
            if trainer.problem is not None:
                trainer.settle()
                trainer.world.agree(trainer.problem)
            if agreed.stop is not None and trainer.step < last:
                reason = agreed.stop
                break
        trainer.settle()
    return Outcome(reason, trainer.step)
