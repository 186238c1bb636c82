"""The detector of loss spikes, on losses of real training runs and on made-up ones."""

import json
import math
import random
from pathlib import Path

import pytest

from ardiff.training.guards import SpikeDetector

# Training losses of 300 steps from the start, five seeds: the preset tiny with hidden size 32, 2 layers, 2 tokens and 4
# frames on the random latents of data_helpers, 8 clips a batch. They are as noisy as losses get.
RUNS = json.loads((Path(__file__).parent / "golden" / "fopp_losses.json").read_text())
SIGMAS, WINDOW = 8.0, 100


def fed(detector, losses):
    return [detector.see(loss) for loss in losses]


def level(size, scale=1.0, noise=0.05, seed=0):
    draw = random.Random(seed)
    return [scale * math.exp(draw.gauss(0, noise)) for _ in range(size)]


@pytest.mark.parametrize("window", [10, 20, 50, 100, 300])
@pytest.mark.parametrize("run", range(5))
def test_training_rings_no_alarm(run, window):
    assert fed(SpikeDetector(SIGMAS, window), RUNS[run]) == [None] * 300


@pytest.mark.parametrize("run", range(5))
def test_a_tenfold_loss_is_seen(run):
    detector = SpikeDetector(SIGMAS, WINDOW)
    seen = []
    for step, loss in enumerate(RUNS[run]):
        if step >= 25:
            twin = SpikeDetector(SIGMAS, WINDOW)
            twin.restore(detector.state())
            seen.append(twin.see(10 * loss))
        detector.see(loss)
    assert len(seen) == 275
    assert sum(found is not None for found in seen) >= 0.98 * len(seen)  # 10 times the lowest losses are not much
    assert all(found > SIGMAS for found in seen if found is not None)


def test_what_is_returned_are_deviations():
    losses = level(100, noise=0.05)
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, losses)
    assert detector.see(math.exp(1.0)) == pytest.approx(20, rel=0.35)  # 1 / 0.05


def test_a_falling_loss_hides_no_spike():
    falling = [loss * 10 ** (-step / 100) for step, loss in enumerate(level(200, noise=0.1))]  # 1 to 0.01
    detector = SpikeDetector(SIGMAS, WINDOW)
    assert fed(detector, falling) == [None] * 200
    assert detector.see(0.1) is not None  # where the window began


def test_a_rising_loss_is_not_a_spike():
    rising = [loss * 10 ** (step / 200) for step, loss in enumerate(level(600, noise=0.1))]
    assert fed(SpikeDetector(SIGMAS, WINDOW), rising) == [None] * 600


def test_silent_until_there_are_enough():
    detector = SpikeDetector(SIGMAS, WINDOW)
    assert fed(detector, [1.0, 1e6] * 12) == [None] * 24
    detector = SpikeDetector(SIGMAS, 10)
    fed(detector, level(10))
    assert detector.see(10.0) is not None


def test_spikes_do_not_enter_the_statistics():
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, level(100))
    first = detector.see(100.0)
    for _ in range(20):
        assert detector.see(100.0) == pytest.approx(first, rel=0.25)  # older losses leave the window
    assert fed(detector, level(50, seed=1)) == [None] * 50


def test_a_new_level_is_accepted_after_half_a_window():
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, level(100))
    found = fed(detector, level(300, scale=5.0, seed=1))
    assert all(each is not None for each in found[:49])
    assert found[49:] == [None] * 251
    assert detector.see(50.0) is not None


def test_two_levels_in_turn_do_not_ring_for_ever():
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, level(100))
    low, high = level(300, seed=1), level(300, scale=5.0, seed=2)
    found = fed(detector, [loss for pair in zip(low, high, strict=True) for loss in pair])
    assert any(each is not None for each in found)
    assert found[150:] == [None] * 450


def test_a_steady_loss_may_wobble():
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, [0.5] * 100)
    assert detector.see(0.55) is None
    assert detector.see(0.7) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_passed_over(bad):
    losses = level(200)
    detector, undisturbed = SpikeDetector(SIGMAS, WINDOW), SpikeDetector(SIGMAS, WINDOW)
    for loss in losses:
        assert detector.see(bad) is None
        assert detector.see(loss) == undisturbed.see(loss)
    assert detector.state() == undisturbed.state()


def test_negative_losses():
    losses = [-0.3 + 0.1 * math.log(loss) for loss in level(200, noise=1.0)]  # as a hinge loss of a generator
    detector = SpikeDetector(SIGMAS, WINDOW)
    assert fed(detector, losses) == [None] * 200
    assert detector.see(0.1) is None
    assert detector.see(2.0) is not None
    zero = SpikeDetector(SIGMAS, WINDOW)
    assert fed(zero, [0.0] * 100) == [None] * 100
    assert zero.see(1.0) is not None


def test_zero_sigmas_never_ring():
    detector = SpikeDetector(0.0, WINDOW)
    assert fed(detector, [*level(200), 1e9]) == [None] * 201


def test_reset_forgets_the_level():
    detector = SpikeDetector(SIGMAS, WINDOW)
    fed(detector, level(100))
    detector.reset()
    assert detector.state() == []
    assert fed(detector, level(100, scale=50.0, seed=1)) == [None] * 100


@pytest.mark.parametrize("stop", [0, 7, 60, 130, 145, 151, 220])
def test_an_interrupted_run_decides_as_an_undisturbed_one(stop):
    losses = [*level(130), *level(80, scale=4.0, seed=1), 90.0, *level(90, scale=4.0, seed=2)]
    undisturbed = SpikeDetector(SIGMAS, WINDOW)
    expected = fed(undisturbed, losses)
    assert sum(each is not None for each in expected) > 40
    before, after = SpikeDetector(SIGMAS, WINDOW), SpikeDetector(SIGMAS, WINDOW)
    found = fed(before, losses[:stop])
    after.restore(json.loads(json.dumps(before.state())))
    assert found + fed(after, losses[stop:]) == expected
    assert after.state() == undisturbed.state()


def test_a_state_of_another_window_is_taken_as_far_as_it_fits():
    before, shorter, longer = (SpikeDetector(SIGMAS, window) for window in (100, 40, 200))
    fed(before, level(100))
    shorter.restore(before.state())
    longer.restore(before.state())
    assert shorter.state() == before.state()[-80:]
    assert longer.state() == before.state()
    assert shorter.see(10.0) is not None
    assert longer.see(10.0) is not None
