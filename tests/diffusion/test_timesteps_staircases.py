"""Timesteps that imitate sampling: against the published formulas, and against the rows that sampling goes through."""

import itertools
import math

import numpy as np
import pytest
import torch
from data_helpers import chi_square

from ardiff.config import DiffusionConfig, StaircaseConfig
from ardiff.diffusion.schedule import Schedule
from ardiff.diffusion.timesteps import Timesteps
from ardiff.errors import UserError
from ardiff.sampling.levels import ADRows, SlidingWindow, ad_levels

FLOW, DDPM = "rectified_flow", "ddpm"
PUBLISHED = {"num_steps": 30, "block": 5, "prefix": 5}


def drawn(name, num_frames, count=4000, process=FLOW, num_timesteps=1000, **options):
    """A draw with the given fields of the staircase (and init_probability)."""
    others = {key: options.pop(key) for key in ("init_probability",) if key in options}
    settings = DiffusionConfig(
        process=process, timesteps=name, num_timesteps=num_timesteps, staircase=StaircaseConfig(**options), **others
    )
    return Timesteps(settings, num_frames).from_generator(count)


def law(draw):
    """Every different row of timesteps, given frames and window, with its number."""
    rows = torch.cat([draw.timesteps.double(), draw.given.double(), draw.window[:, None].double()], dim=1)
    found, counts = rows.unique(dim=0, return_counts=True)
    return {tuple(row): count for row, count in zip(found.tolist(), counts.tolist(), strict=True)}


def row_of(timesteps, given, window):
    """A row as `law` writes it."""
    return (*map(float, timesteps), *map(float, given), float(window))


def assert_law(draw, expected):
    """expected: the rows and their probabilities."""
    found = law(draw)
    assert found.keys() == expected.keys()
    observed = np.array([found[row] for row in expected])
    assert chi_square(observed, np.array(list(expected.values())) * len(draw.window)) < 1


def add(chances, row, chance):
    chances[row] = chances.get(row, 0) + chance


# PA-VDM


def test_pavdm_is_one_of_the_five_published_staircases():
    expected = {}
    for stage in range(5):
        levels = [1000 * (chunk * 5 - stage) / 30 for chunk in range(1, 7) for _ in range(5)]
        add(expected, row_of([0] * 5 + [min(level, 999.0) for level in levels], [True] * 5 + [False] * 30, 35), 0.2)
    assert_law(drawn("pavdm", 35, jitter=0.0, **PUBLISHED), expected)


def test_the_stages_are_those_of_the_fact_sheet():
    found = sorted(law(drawn("pavdm", 30, jitter=0.0, num_steps=30, block=5)), reverse=True)
    stages = [[round(t) for t in row[:30:5]] for row in found]
    assert stages[0] == [167, 333, 500, 667, 833, 999]
    assert stages[4] == [33, 200, 367, 533, 700, 867]


def test_the_resolution_warp_gives_the_published_levels():
    # 240 x 426 pixels, 35 latent frames
    shift = (240 * 426 / 512**2) ** 0.5 * 35**0.5
    assert shift == pytest.approx(3.69, abs=0.005)
    draw = drawn("pavdm", 30, count=400, jitter=0.0, num_steps=30, block=5)
    first = draw.timesteps[draw.timesteps[:, -1] > 998][0]  # stage 0
    warped = Schedule(process=FLOW, prediction="v", flow_shift=shift).labels(first[::5])
    assert [round(t) for t in warped.tolist()] == [425, 649, 787, 881, 949, 1000]


def test_twice_as_many_steps_make_twice_as_many_levels():
    # the trap of the release: levels built from the number of frames would be 15 of these 60
    draw = drawn("pavdm", 35, jitter=0.0, num_steps=60, block=5, prefix=5)
    levels = (draw.timesteps[:, 5:] * 60 / 1000).round().unique()
    assert levels.tolist() == list(range(1, 61))


def test_every_sample_draws_a_stage_of_its_own():
    draw = drawn("pavdm", 35, count=64, jitter=0.0, **PUBLISHED)
    assert len(draw.timesteps.unique(dim=0)) == 5


def test_under_ddpm_the_levels_are_the_labels_of_sampling():
    grid = Schedule().grid(30)
    draw = drawn("pavdm", 35, process=DDPM, jitter=0.0, **PUBLISHED)
    expected = {}
    for stage in range(5):
        levels = [chunk * 5 - stage for chunk in range(1, 7) for _ in range(5)]
        row = row_of([1] * 5 + grid.labels[levels].tolist(), [True] * 5 + [False] * 30, 35)
        add(expected, row, 0.2)
    assert_law(draw, expected)
    assert draw.timesteps.dtype == torch.int64


def test_the_shift_moves_all_frames_alike_by_a_normal_distance():
    # one frame per chunk and one stage, so that the distance from the staircase is the shift
    draw = drawn("pavdm", 30, count=40_000, num_steps=30)
    ramp = torch.arange(1, 31).double() * 1000 / 30
    inner = (draw.timesteps - ramp)[:, 5:25]  # never cut
    assert (inner - inner[:, :1]).abs().max() < 1e-9
    shift = inner[:, 0] / (0.4 * 1000 / 30)  # 0.4 of a solver step, 13.3 units
    assert shift.mean().item() == pytest.approx(0, abs=0.02)
    assert shift.std().item() == pytest.approx(1, abs=0.015)
    quantiles = torch.special.ndtr(shift)
    assert chi_square(torch.histc(quantiles, 20, 0, 1).numpy(), np.full(20, 2000.0)) < 1


@pytest.mark.parametrize("jitter", [0.1, 0.4, 2.0])
def test_the_shift_scales_with_its_setting(jitter):
    draw = drawn("pavdm", 60, count=20_000, num_steps=60, jitter=jitter)
    shift = draw.timesteps[:, 29] - 500
    assert shift.std().item() == pytest.approx(jitter * 1000 / 60, rel=0.03)


@pytest.mark.parametrize("process", [FLOW, DDPM])
def test_levels_are_cut_to_0_and_999(process):
    draw = drawn("pavdm", 30, process=process, jitter=10.0, num_steps=30)
    assert draw.timesteps.min() == 0
    assert draw.timesteps.max() == 999
    assert (draw.timesteps.diff(dim=1) >= 0).all()


def test_half_of_the_noisiest_frames_are_cut():
    # the level is 1000, and 999 is 1 / 13.3 deviations below it
    published = drawn("pavdm", 30, count=40_000, num_steps=30)
    cut = (published.timesteps[:, -1] == 999).double().mean().item()
    assert cut == pytest.approx(0.5 * (1 + math.erf(0.075 / 2**0.5)), abs=0.01)


@pytest.mark.parametrize(
    ("pattern", "shared", "own"),
    [("linear", 0, 0), ("linear-shift", 1, 0), ("linear-variance", 0, 1), ("linear-variance-shift", 1, 1)],
)
def test_patterns_move_frames_together_or_each_by_itself(pattern, shared, own):
    # `linear` without chunks is the plain ramp over the frames
    draw = drawn("pavdm", 30, count=20_000, num_steps=30, pattern=pattern)
    moved = (draw.timesteps - torch.arange(1, 31) * 1000 / 30)[:, 10:20] / (0.4 * 1000 / 30)
    covariance = torch.cov(moved.T)
    expected = torch.full((10, 10), float(shared), dtype=torch.float64) + own * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, atol=0.06, rtol=0)


def test_without_overlapped_conditioning_nothing_is_given():
    distribution = Timesteps(
        DiffusionConfig(process=FLOW, timesteps="pavdm", staircase=StaircaseConfig(num_steps=30, block=5)), 30
    )
    assert not distribution.gives
    assert not distribution.cuts
    assert not distribution.from_generator(100).given.any()


def test_variable_windows_hold_the_noisiest_or_the_cleanest_chunks():
    options = {"num_steps": 12, "block": 2, "prefix": 2, "jitter": 0.0}  # 3 chunks, 4 stages
    draw = drawn("pavdm", 8, count=20_000, variable_length=0.6, **options)
    expected = {}
    for stage in range(4):
        chunks = {(8, (1, 2, 3)): 0.4}
        for present in (1, 2):
            chunks[(2 + 2 * present, tuple(range(1, present + 1)))] = 0.15  # the end of a video
            chunks[(2 + 2 * present, tuple(range(4 - present, 4)))] = 0.15  # its start
        for (window, present), chance in chunks.items():
            levels = [chunk * 4 - stage for chunk in present for _ in range(2)]
            add(expected, (window, tuple(levels)), chance / 4)
    found = {}
    for timesteps, given, window in zip(*(part.tolist() for part in draw), strict=True):
        assert timesteps[:2] == [0, 0]
        assert given == [True, True] + [False] * 6
        levels = tuple(12 if t == 999 else round(t * 12 / 1000) for t in timesteps[2:window])
        found[window, levels] = found.get((window, levels), 0) + 1
    assert found.keys() == expected.keys()
    observed, chances = np.array([[found[key], expected[key]] for key in expected]).T
    assert chi_square(observed, chances * 20_000) < 1


def test_training_meets_exactly_the_windows_of_sampling():
    # long videos through a sliding window of variable length: PA-VDM is AD with s = S / K
    window = SlidingWindow(frames=2 * 6, history=2, variable=True)
    met = set()
    for prefix in (0, 2):  # from nothing, and from given frames
        rows = ADRows(num_frames=2 * 13, num_steps=15, gap=3, block=2, prefix=prefix)
        window.check(rows)
        for row in range(rows.num_rows):
            levels = rows.levels(row, 0, rows.num_frames)
            first, end = window.visible(rows, row, int((levels > 0).nonzero()[0]))
            met.add(tuple(levels[first:end].tolist()))
    options = {"num_steps": 15, "block": 2, "prefix": 2, "jitter": 0.0}
    draw = drawn("pavdm", 12, variable_length=0.8, prefix_dropout=0.5, **options)
    trained = set()
    for timesteps, length in zip(draw.timesteps.tolist(), draw.window.tolist(), strict=True):
        trained.add(tuple(15 if t == 999 else round(t * 15 / 1000) for t in timesteps[:length]))
    assert met <= trained
    # what is more: a video from nothing that ends before its first frames are finished
    assert all(levels[0] > 0 and len(levels) < 10 for levels in trained - met)


@pytest.mark.parametrize("name", ["pavdm", "rolling"])
def test_a_dropped_prefix_leaves_the_rest_in_front(name):
    options = {"num_steps": 12, "block": 2, "prefix": 2, "jitter": 0.0, "init_probability": 0.0}
    whole, dropped, some = (drawn(name, 8, prefix_dropout=share, **options) for share in (0.0, 1.0, 0.3))
    assert (whole.window == 8).all()
    assert (dropped.window == 6).all()
    assert not dropped.given.any()
    if name == "pavdm":
        rows = [
            {tuple(row[2:]) for row in whole.timesteps.tolist()},
            {tuple(row[:6]) for row in dropped.timesteps.tolist()},
        ]
        assert rows[0] == rows[1]
    else:
        torch.testing.assert_close(dropped.timesteps[:, :6].diff(dim=1), torch.full((4000, 5), 1000 / 6).double())
    assert (some.window == 6).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(some.given.any(dim=1), some.window == 8)


# AD-matched


@pytest.mark.parametrize("process", [FLOW, DDPM])
@pytest.mark.parametrize(
    ("num_frames", "num_steps", "gap", "block", "prefix"),
    [
        (4, 5, 2, 1, 0),
        (4, 5, 0, 1, 0),
        (3, 4, 4, 1, 0),
        (6, 6, 2, 2, 2),
        (7, 4, 3, 3, 2),
        (1, 3, 1, 1, 0),
        (5, 4, 1, 1, 3),
    ],
)
def test_ad_matched_is_a_uniform_row_of_sampling(num_frames, num_steps, gap, block, prefix, process):
    levels = ad_levels(num_frames, num_steps, gap, block, prefix)
    grid = Schedule(process=process, prediction="x0").grid(num_steps)
    expected = {}
    for row in levels[:-1]:
        index = len(expected)
        moves = levels[list(map(tuple, levels.tolist())).index(tuple(row.tolist())) + 1] != row
        waiting = (row == num_steps) & ~moves
        timesteps = torch.where(waiting, grid.waiting, grid.labels[row]).clamp(max=999)
        add(expected, row_of(timesteps, row == 0, num_frames), 1 / (len(levels) - 1))
        assert len(expected) == index + 1  # rows differ
    options = {"num_steps": num_steps, "gap": gap, "block": block, "prefix": prefix}
    assert_law(drawn("ad_matched", num_frames, process=process, jitter=0.0, **options), expected)


def test_ad_matched_leaves_out_what_has_not_begun():
    options = {"num_steps": 5, "gap": 2, "jitter": 0.0}
    draw = drawn("ad_matched", 4, variable_length=1.0, **options)
    begun = 1 + (torch.arange(11) // 2).clamp(max=3)  # one more frame every second row
    found = torch.bincount(draw.window, minlength=5).numpy()[1:]
    assert chi_square(found, torch.bincount(begun, minlength=5).numpy()[1:] * len(draw.window) / 11) < 1
    for timesteps, window in zip(draw.timesteps, draw.window, strict=True):
        assert (timesteps[window:] == 999).all()
    share = drawn("ad_matched", 4, variable_length=0.25, num_steps=5, gap=5).window < 4
    assert share.double().mean().item() == pytest.approx(0.25 * 15 / 20, abs=0.03)


def test_ad_matched_shifts_the_whole_row():
    draw = drawn("ad_matched", 8, num_steps=50, gap=5)
    inner = (draw.timesteps > 60) & (draw.timesteps < 940)
    for timesteps, chosen in zip(draw.timesteps[:200], inner[:200], strict=True):
        steps = timesteps[chosen].diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 100.0))


def test_the_jitter_fills_the_gaps_between_levels():
    # between two levels the normal distributions around all of them add up to 1 + 2 exp(-2 (0.4 pi)^2) cos(2 pi x)
    first = drawn("ad_matched", 8, count=40_000, num_steps=50, gap=5).timesteps[:, 0]
    places = (first[(first > 60) & (first < 940)] / 20) % 1
    edges = np.linspace(0, 1, 21)
    primitive = edges + 2 * np.exp(-2 * (0.4 * np.pi) ** 2) * np.sin(2 * np.pi * edges) / (2 * np.pi)
    assert chi_square(torch.histc(places, 20, 0, 1).numpy(), np.diff(primitive) * len(places)) < 1


def test_jitter_never_makes_a_frame_given():
    draw = drawn("ad_matched", 4, num_steps=10, gap=10, jitter=3.0)
    assert (draw.given.sum(dim=1) < 4).all()
    assert ((draw.timesteps == 0) & ~draw.given).any()


@pytest.mark.parametrize("process", [FLOW, DDPM])
def test_gap_s_over_k_is_pavdm_in_the_middle_of_a_video(process):
    # the rows of AD in which the whole staircase lies inside of the clip are PA-VDM's
    options = {"num_steps": 6, "block": 1, "jitter": 0.0, "process": process}
    ad = drawn("ad_matched", 4, gap=2, **options)
    whole = ~ad.given.any(dim=1) & (ad.timesteps.diff(dim=1) > 100).all(dim=1)
    ours = drawn("pavdm", 3, **options)
    assert {tuple(row[:3]) for row in ad.timesteps[whole].tolist()} <= {tuple(r) for r in ours.timesteps.tolist()}
    assert whole.any()


# Teacher forcing and rolling diffusion


@pytest.mark.parametrize(("num_frames", "block", "prefix"), [(3, 1, 0), (5, 2, 0), (4, 1, 2), (4, 2, 1)])
def test_teacher_forcing_noises_one_block(num_frames, block, prefix):
    blocks = range(prefix // block, -(-num_frames // block))
    expected = {}
    for current, t in itertools.product(blocks, range(5)):
        given = [frame // block < current or frame < prefix for frame in range(num_frames)]
        later = [frame // block > current for frame in range(num_frames)]
        timesteps = [1 if given[i] else 4 if later[i] else t for i in range(num_frames)]
        add(expected, row_of(timesteps, given, num_frames), 1 / len(blocks) / 5)
    options = {"process": DDPM, "num_timesteps": 5, "num_steps": 4, "gap": 4, "block": block, "prefix": prefix}
    assert_law(drawn("teacher_forced", num_frames, **options), expected)


def test_teacher_forcing_ends_the_window_with_its_block():
    draw = drawn("teacher_forced", 6, block=2, variable_length=1.0)
    assert set(draw.window.tolist()) == {2, 4, 6}
    assert torch.equal(draw.given.sum(dim=1) + 2, draw.window)


@pytest.mark.parametrize("prefix", [0, 2])
def test_rolling_is_the_published_staircase(prefix):
    width = 8 - prefix
    draw = drawn("rolling", 8, prefix=prefix, init_probability=0.0)
    shares = draw.timesteps[:, prefix:] / 1000
    local = shares[:, :1] * width
    assert local.min() >= 0
    assert local.max() < 1
    torch.testing.assert_close(shares, (torch.arange(width) + local) / width)
    assert chi_square(torch.histc(local, 20, 0, 1).numpy(), np.full(20, 200.0)) < 1
    assert (draw.timesteps[:, :prefix] == 0).all()
    assert torch.equal(draw.given, (torch.arange(8) < prefix).expand(4000, 8))


@pytest.mark.parametrize("prefix", [0, 2])
def test_rolling_starts_from_noise(prefix):
    width = 8 - prefix
    shares = drawn("rolling", 8, prefix=prefix, init_probability=1.0).timesteps[:, prefix:] / 1000
    local = shares[:, :1]  # the first frame is at u
    torch.testing.assert_close(shares, (torch.arange(width) / width + local).clamp(0, 1))
    assert chi_square(torch.histc(local, 20, 0, 1).numpy(), np.full(20, 200.0)) < 1


def test_rolling_mixes_both():
    shares = drawn("rolling", 8, count=20_000, init_probability=0.3).timesteps / 1000
    start = shares[:, 0] >= 1 / 8  # only a start has its first frame there, in 7 of 8 cases
    assert start.double().mean().item() == pytest.approx(0.3 * 7 / 8, abs=0.015)


def test_rolling_under_ddpm_rounds_down():
    draw = drawn("rolling", 4, process=DDPM, num_timesteps=8, init_probability=0.0)
    assert set(map(tuple, draw.timesteps.tolist())) == {(0, 2, 4, 6), (1, 3, 5, 7)}


# What cannot be drawn


@pytest.mark.parametrize(
    ("name", "num_frames", "options", "message"),
    [
        ("pavdm", 35, {"num_steps": 32, "block": 5, "prefix": 5}, "num_steps = 32 is no multiple of the 6 chunks"),
        ("pavdm", 16, {"num_steps": 30, "block": 5}, "16 - 0 = 16 noisy"),
        ("pavdm", 13, {"num_steps": 30, "block": 5, "prefix": 3}, "must be multiples"),
        ("pavdm", 10, {"num_steps": 30, "block": 5, "prefix": 5, "variable_length": 0.1}, "at least 2 noisy chunks"),
        ("pavdm", 2000, {"num_steps": 2000}, "must not exceed"),
        ("ad_matched", 16, {"num_steps": 4, "gap": 5}, "gap = 5 must lie between 0"),
        ("ad_matched", 16, {"prefix": 16}, "prefix = 16"),
        ("rolling", 4, {"prefix": 4}, "prefix = 4"),
        ("teacher_forced", 4, {"block": 0}, "block = 0"),
        ("ad_matched", 4, {"jitter": -1.0}, "jitter = -1"),
        ("ad_matched", 4, {"variable_length": 1.5}, "variable_length = 1.5"),
    ],
)
def test_impossible_staircases_are_refused_with_the_arithmetic(name, num_frames, options, message):
    with pytest.raises(UserError, match="staircase") as caught:
        drawn(name, num_frames, **options)
    assert message in str(caught.value)
