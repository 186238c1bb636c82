"""The way of a loss from the step to the verdict."""

import dataclasses

import pytest
import torch

from ardiff.config import TrainConfig
from ardiff.data.stream import GlobalBatch
from ardiff.training.spikes import SpikeWatch

SIZE = 8


def watch(**settings) -> SpikeWatch:
    return SpikeWatch(dataclasses.replace(TrainConfig(), spike_window=20, **settings))


def put(watched: SpikeWatch, step: int, loss: float, phase: int = 0) -> None:
    """A step of two micro-batches."""
    terms = [{"loss": (torch.tensor(loss * count), torch.tensor(float(count)))} for count in (3, 5)]
    watched.put(step, GlobalBatch((step - 1) * SIZE, SIZE, 1, []), phase, terms)


def train(watched: SpikeWatch, losses: list[float], first: int = 1, phase: int = 0, save: bool = False) -> list:
    """As the loop does: tell a loss after each step and judge it one step later; save: judge all of them at the end."""
    found, pending = [], (0.0, 0.0)
    for step, loss in enumerate(losses, first):
        put(watched, step, loss, phase)
        (total, count), pending = pending, watched.next_loss()
        found.append(watched.judge(total / count if count else None))
    while save and pending[1]:
        (total, count), pending = pending, watched.next_loss(newest_too=True)
        found.append(watched.judge(total / count))
    return found


LOSSES = [1.0 + 0.01 * (step % 3) for step in range(30)]


def test_a_spike_is_judged_two_steps_late_with_its_own_samples():
    watched = watch()
    found = train(watched, [*LOSSES, 100.0, 1.0, 1.0, 1.0])
    assert [number for number, spike in enumerate(found, 1) if spike] == [33]
    spike = found[32]
    assert (spike.step, spike.loss, spike.start, spike.end) == (31, pytest.approx(100.0), 30 * SIZE, 31 * SIZE)


def test_more_batches_before_it_are_left_out_where_that_is_wanted():
    found = train(watch(spike_batches=3), [*LOSSES, 100.0, 1.0, 1.0])
    assert (found[-1].start, found[-1].end) == (28 * SIZE, 31 * SIZE)


def test_before_a_checkpoint_all_losses_are_judged():
    watched = watch()
    found = train(watched, [*LOSSES, 100.0], save=True)
    assert not watched.untold
    assert [bool(spike) for spike in found[-2:]] == [False, True] and found[-1].step == 31


def test_another_phase_is_another_level():
    watched = watch()
    train(watched, LOSSES, save=True)
    assert not any(train(watched, [50.0] * 30, first=31, phase=1, save=True))


def test_a_restarted_run_judges_as_the_undisturbed_one():
    losses = [*LOSSES, 100.0, 1.0, 1.0]
    whole, first, again = watch(), watch(), watch()
    expected = [spike.step for spike in train(whole, losses, save=True) if spike]
    train(first, losses[:20], save=True)
    again.restart(first.detector.state(), 0)
    assert [spike.step for spike in train(again, losses[20:], first=21, save=True) if spike] == expected == [31]
    assert again.detector.state() == whole.detector.state()


def test_switched_off_nothing_is_kept():
    watched = watch(spike_sigmas=0.0)
    assert not any(train(watched, [*LOSSES, 1e9, 1e9])) and not watched.untold
