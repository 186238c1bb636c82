import itertools
import time

import numpy as np
import pytest
import torch
from data_helpers import GOLDEN, chi_square

from ardiff.config import DiffusionConfig, StaircaseConfig, TimestepsShare
from ardiff.diffusion.timesteps import DISTRIBUTIONS, Timesteps, draw, draw_from_seeds, fopp, fopp_from_seeds
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed

DRAWS = 20_000
SMALL = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 3), (3, 5), (5, 3), (4, 4)]


def counts(num_frames, num_timesteps):
    """The reference's tables [T, F]: non-decreasing completions from (t, f) and prefixes up to (t, f), by recursion."""
    starts, ends = np.ones((num_timesteps, num_frames)), np.ones((num_timesteps, num_frames))
    for frame in range(num_frames - 2, -1, -1):
        for t in range(num_timesteps - 2, -1, -1):
            starts[t, frame] = starts[t + 1, frame] + starts[t, frame + 1]
    for frame in range(1, num_frames):
        for t in range(1, num_timesteps):
            ends[t, frame] = ends[t - 1, frame] + ends[t, frame - 1]
    return starts, ends


def fopp_law(num_frames, num_timesteps):
    """Every non-decreasing sequence with its probability: a uniform anchor, then all paths through it alike."""
    starts, ends = counts(num_frames, num_timesteps)
    sequences = np.array(list(itertools.combinations_with_replacement(range(num_timesteps), num_frames)))
    frames = np.arange(num_frames)
    chances = (1 / (ends[sequences, frames] * starts[sequences, frames])).sum(1) / (num_frames * num_timesteps)
    return sequences, chances


def misfit(drawn, sequences, chances):
    """chi_square of draws [n, F] against a law; sequences outside of the law fail at once."""
    base = int(max(drawn.max(), sequences.max())) + 1
    digits = base ** np.arange(sequences.shape[1])
    known = sequences @ digits
    order = np.argsort(known)
    codes = np.asarray(drawn).astype(np.int64) @ digits
    place = np.searchsorted(known[order], codes)
    assert (place < len(known)).all()
    assert (known[order][place] == codes).all(), "impossible sequence"
    observed = np.bincount(order[place], minlength=len(known))
    return chi_square(observed, chances * len(codes))


def settings_for(name, process="ddpm"):
    """Settings under which every distribution can draw clips of 16 frames."""
    parts = [TimestepsShare("fopp", 2.0), TimestepsShare("pavdm", 1.0)] if name == "mixture" else []
    stairs = StaircaseConfig(num_steps=48, gap=3, block=2, prefix=4, variable_length=0.5)
    return DiffusionConfig(process=process, timesteps=name, mixture=parts, staircase=stairs)


def two_sample(one, other):
    """chi_square of two histograms with equally many draws; below 1 they agree."""
    # sum (a - b)^2 / (a + b) is chi-square: twice the statistic against their mean
    seen = one + other > 0
    return 2 * chi_square(one[seen], (one + other)[seen] / 2)


def seeds_of(count):
    return hashed(0, Stream.TIMESTEPS, np.arange(count))


def test_the_tables_of_this_test_are_those_of_the_paper():
    starts, ends = counts(3, 3)
    assert (starts * ends).tolist() == [[6, 3, 1], [3, 4, 3], [1, 3, 6]]  # figure 3
    for num_frames, num_timesteps in SMALL:
        assert fopp_law(num_frames, num_timesteps)[1].sum() == pytest.approx(1)


@pytest.mark.parametrize(("num_frames", "num_timesteps"), SMALL)
@pytest.mark.parametrize("source", ["generator", "seeds"])
def test_fopp_follows_the_exact_law(source, num_frames, num_timesteps):
    if source == "generator":
        drawn = fopp(DRAWS, num_frames, num_timesteps)
    else:
        drawn = fopp_from_seeds(seeds_of(DRAWS), num_frames, num_timesteps)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (DRAWS, num_frames)
    assert misfit(drawn.numpy(), *fopp_law(num_frames, num_timesteps)) < 1


@pytest.mark.parametrize(("num_frames", "num_timesteps"), SMALL)
def test_uniform_monotone_is_uniform_over_non_decreasing_sequences(num_frames, num_timesteps):
    sequences, _ = fopp_law(num_frames, num_timesteps)
    drawn = draw("uniform_monotone", DRAWS, num_frames, num_timesteps)
    assert misfit(drawn.numpy(), sequences, np.full(len(sequences), 1 / len(sequences))) < 1


@pytest.mark.parametrize(("num_frames", "num_timesteps"), SMALL)
def test_independent_is_uniform_over_all_sequences(num_frames, num_timesteps):
    sequences = np.array(list(itertools.product(range(num_timesteps), repeat=num_frames)))
    drawn = draw("independent", DRAWS, num_frames, num_timesteps)
    assert misfit(drawn.numpy(), sequences, np.full(len(sequences), 1 / len(sequences))) < 1


@pytest.mark.parametrize(("num_frames", "num_timesteps"), SMALL)
def test_synchronous_is_one_uniform_timestep_for_all_frames(num_frames, num_timesteps):
    sequences = np.repeat(np.arange(num_timesteps)[:, None], num_frames, axis=1)
    drawn = draw("synchronous", DRAWS, num_frames, num_timesteps)
    assert misfit(drawn.numpy(), sequences, np.full(num_timesteps, 1 / num_timesteps)) < 1


def test_the_laws_differ_enough_to_be_told_apart():
    # the control of the tests above: FoPP draws fail the test for uniform sequences and the other way round
    sequences, chances = fopp_law(3, 3)
    assert misfit(fopp(DRAWS, 3, 3).numpy(), sequences, np.full(len(sequences), 1 / len(sequences))) > 5
    assert misfit(draw("uniform_monotone", DRAWS, 3, 3).numpy(), sequences, chances) > 5


@pytest.mark.parametrize("case", ["F3_T3", "F5_T10"])
def test_draws_of_the_reference_follow_the_same_law(case):
    golden = np.load(GOLDEN / "fopp_small.npz")
    starts, ends, drawn = (golden[f"{case}_{name}"] for name in ("starts", "ends", "samples"))
    num_timesteps, num_frames = starts.shape
    ours = counts(num_frames, num_timesteps)
    assert np.array_equal(ours[0], starts)
    assert np.array_equal(ours[1], ends)
    law = fopp_law(num_frames, num_timesteps)
    assert misfit(drawn, *law) < 1
    assert misfit(fopp(len(drawn), num_frames, num_timesteps).numpy(), *law) < 1


@pytest.mark.parametrize("case", ["F3_T3", "F5_T10"])
def test_histograms_equal_those_of_the_reference(case):
    drawn = np.load(GOLDEN / "fopp_small.npz")[f"{case}_samples"].astype(np.int64)
    num_timesteps = drawn.max() + 1
    ours = fopp(len(drawn), drawn.shape[1], num_timesteps).numpy()
    for frame in range(drawn.shape[1]):
        one, other = (np.bincount(part[:, frame], minlength=num_timesteps) for part in (ours, drawn))
        assert two_sample(one, other) < 1


def test_means_of_the_papers_setting():
    means = fopp(20_000, 16, 1000).double().mean(0)
    assert means[0].item() == pytest.approx(106, rel=0.04)
    assert means[15].item() == pytest.approx(895, rel=0.01)
    assert (means.diff() > 0).all()


def test_the_anchor_makes_every_timestep_likely():
    # what FoPP is for: pooled over frames, both ends are well covered (16 to 17 % per outer decile, 7 % in the middle)
    deciles = torch.bincount((fopp(20_000, 16, 1000) // 100).flatten(), minlength=10) / (20_000 * 16)
    assert 0.15 < deciles[0] < 0.18
    assert 0.15 < deciles[9] < 0.18
    assert 0.06 < deciles[4:6].mean() < 0.08


@pytest.mark.parametrize("process", ["ddpm", "rectified_flow"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_depend_on_their_own_seed_alone(name, process):
    seeds = seeds_of(40)
    distribution = Timesteps(settings_for(name, process), 16)
    together = distribution.from_seeds(seeds)
    for part in (slice(0, 1), slice(7, 20), slice(39, 40), slice(None, None, -1)):
        split = distribution.from_seeds(np.ascontiguousarray(seeds[part]))
        for one, other in zip(split, together, strict=True):
            assert torch.equal(one, other[range(40)[part]])
    # and they do depend on it (under ddpm a rolling clip has 83 possible timesteps)
    assert len(torch.unique(together.timesteps, dim=0)) > (25 if name == "rolling" else 35)


@pytest.mark.parametrize("process", ["ddpm", "rectified_flow"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_seeds_and_generators_give_one_distribution(name, process):
    distribution = Timesteps(settings_for(name, process), 16)
    both = [distribution.from_seeds(seeds_of(8000)), distribution.from_generator(8000)]
    for frame in range(0, 16, 5):
        for column in ([part.timesteps[:, frame] / 50 for part in both], [part.given[:, frame] for part in both]):
            assert two_sample(*(torch.bincount(part.long(), minlength=21).numpy() for part in column)) < 1
    assert two_sample(*(torch.bincount(part.window, minlength=17).numpy() for part in both)) < 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_process_decides_between_integers_and_real_numbers(name):
    integers, real = (
        Timesteps(settings_for(name, process), 16).from_seeds(seeds_of(2000)).timesteps
        for process in ("ddpm", "rectified_flow")
    )
    assert integers.dtype == torch.int64
    assert 0 <= integers.min() < 10
    assert 990 <= integers.max() <= 999
    assert real.dtype == torch.float64
    assert 0 <= real.min() < 10
    assert 990 < real.max() <= 1000
    assert (real != real.round()).double().mean() > 0.1  # teacher_forced: one block of eight


@pytest.mark.parametrize(("name", "num_frames"), [("fopp", 1), ("fopp", 5), ("uniform_monotone", 5), ("fopp", 16)])
def test_real_timesteps_are_the_limit_of_fine_grids(name, num_frames):
    # ties have no weight there, so both are compared in 20 bins, frame by frame
    fine = draw(name, DRAWS, num_frames, 10_000_000).double() / 10_000
    real = draw(name, DRAWS, num_frames, 1000, settings=DiffusionConfig(process="rectified_flow"))
    assert (real.diff(dim=1) >= 0).all()
    for frame in range(num_frames):
        one, other = (torch.bincount((part[:, frame] / 50).long(), minlength=20).numpy() for part in (fine, real))
        assert two_sample(one, other) < 1
    if num_frames > 1:  # and not only the marginals
        gaps = [part[:, -1] - part[:, 0] for part in (fine, real)]
        assert two_sample(*(torch.bincount((gap / 50).long(), minlength=20).numpy() for gap in gaps)) < 1


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_fvdm_is_shared_or_independent(share):
    sequences = np.array(list(itertools.product(range(3), repeat=3)))
    chances = (1 - share) / 27 + np.where((sequences == sequences[:, :1]).all(1), share / 3, 0)
    drawn = draw("fvdm", DRAWS, 3, 3, settings=DiffusionConfig(shared_probability=share)).numpy()
    possible = chances > 0
    assert misfit(drawn, sequences[possible], chances[possible]) < 1


def test_fvdm_shares_eighty_percent_by_default():
    drawn = draw("fvdm", DRAWS, 8, 1000)
    shared = (drawn == drawn[:, :1]).all(dim=1).double().mean().item()
    assert shared == pytest.approx(0.8, abs=0.015)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    sequences, fopp_chances = fopp_law(3, 3)
    equal = (sequences == sequences[:, :1]).all(1)
    law = (3 * fopp_chances + 1 * np.where(equal, 1 / 3, 0)) / 4
    parts = [TimestepsShare("fopp", 3.0), TimestepsShare("synchronous", 1.0), TimestepsShare("independent", 0.0)]
    drawn = draw("mixture", DRAWS, 3, 3, settings=DiffusionConfig(timesteps="mixture", mixture=parts))
    assert misfit(drawn.numpy(), sequences, law) < 1
    assert misfit(drawn.numpy(), sequences, fopp_chances) > 5  # the control


def test_seeds_may_be_a_tensor():
    seeds = torch.arange(5)
    assert torch.equal(fopp_from_seeds(seeds, 4, 100), fopp_from_seeds(seeds.numpy(), 4, 100))


def test_seeds_neither_read_nor_change_the_global_generator():
    before = fopp_from_seeds(seeds_of(3), 4, 100)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(before, fopp_from_seeds(seeds_of(3), 4, 100))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_generator_decides_alone(name):
    state = torch.get_rng_state()
    settings = settings_for(name)
    one, other, third = (draw(name, 8, 16, 1000, torch.Generator().manual_seed(seed), settings) for seed in (3, 3, 4))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("num_frames", "num_timesteps"), [(4096, 1000), (300, 10), (16, 1_000_000), (308, 1000)])
def test_any_size_works(num_frames, num_timesteps):
    # the reference's float64 tables overflow from 308 frames on
    drawn = fopp(16, num_frames, num_timesteps)
    assert drawn.shape == (16, num_frames)
    assert drawn.min() >= 0
    assert drawn.max() < num_timesteps
    assert (drawn.diff(dim=1) >= 0).all()
    assert drawn.double().std() > 0.15 * num_timesteps


def test_a_batch_is_drawn_fast():
    # aim 2 microseconds a sample, the reference takes 2 ms; a margin of ten for a busy machine
    fopp(1024, 16, 1000)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        fopp(1024, 16, 1000)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.02


@pytest.mark.parametrize("call", [lambda: draw("fop", 1, 2, 3), lambda: draw_from_seeds("", np.arange(1), 2, 3)])
def test_unknown_names_are_refused(call):
    with pytest.raises(UserError, match="fopp"):
        call()
