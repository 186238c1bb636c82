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
            batch = trainer.next_batch()
            if batch is None:  # all ranks were asked to stop while they waited for data
                trainer.save_if_good()
                reason = trainer.asked_to_stop() or reason
                break
            terms = trainer.train_step(batch)
            if trainer.report_is_due:
                trainer.report(terms)
            agreed, rolled_back = trainer.agree()
            if agreed.failed:
                trainer.settle()  # raises on every rank: metrics or a checkpoint could not be written
            ends = trainer.step == last or agreed.stop is not None or trainer.problem is not None
            with clock.paused():
                if not rolled_back and (ends or agreed.save or trainer.step % config.save_every == 0):
                    rolled_back = not trainer.save_if_good()
                if trainer.preview_is_due and not rolled_back and agreed.stop is None:
                    trainer.preview()
            if trainer.problem is not None:
                trainer.settle()
                trainer.world.agree(trainer.problem)
            if agreed.stop is not None and trainer.step < last:
                reason = agreed.stop
                break
        trainer.settle()
    return Outcome(reason, trainer.step)
