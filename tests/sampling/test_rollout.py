import pytest
import torch
from sampling_helpers import BATCH, CHANNELS, STEPS, TOKENS, Oracle, assert_same, build, noise_of

from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.sampling import SlidingWindow, ad_levels, pinned_levels, pyramid_levels, sample, sample_levels, stream
from ardiff.sampling.guidance import Guidance
from ardiff.sampling.levels import ADRows
from ardiff.sampling.sampler import build_rollout

PLAIN = Guidance(1.0, None, None)


def source(noise):
    return lambda first, count: noise[:, first : first + count]


@pytest.mark.parametrize("gap", [0, 1, 2, 4, STEPS])
@pytest.mark.parametrize(
    ("mask_block", "window", "prefix"),
    [(1, (1, 0), 0), (1, (3, 0), 0), (1, (3, 2), 0), (1, (4, 1), 3), (1, (20, 0), 0), (2, (4, 2), 2), (2, (2, 0), 0)],
)
def test_a_windowed_cache_equals_the_same_band_without_a_cache(mask_block, window, prefix, gap):
    model = build(mask="block_causal" if mask_block > 1 else "frame_causal", block=mask_block, context_dim=3)
    noise = noise_of(frames=12)
    given = noise_of(frames=prefix) if prefix else None
    options = {"block": mask_block, "prefix": given, "window": window, "guidance": 2.0}
    options |= {"context": torch.randn(BATCH, 2, 3, dtype=torch.float64), "null_context": torch.zeros(1, 2, 3).double()}
    one, other = (sample(model, noise, STEPS, gap, Schedule(), cache=cache, **options) for cache in ("exact", "none"))
    assert_same(one, other, 1e-12)
    everything = sample(model, noise, STEPS, gap, Schedule(), **{**options, "window": None})
    assert torch.allclose(one, everything) == (window[0] >= 12)


def test_the_window_a_model_was_trained_with_is_used_without_asking():
    model, noise = build(window=3, sink=1), noise_of(frames=9)
    free = build()
    free.load_state_dict(model.state_dict())
    for cache in ("exact", "none"):
        found = sample(model, noise, STEPS, 2, Schedule(), cache=cache)
        assert_same(found, sample(free, noise, STEPS, 2, Schedule(), window=(3, 1), cache="none"), 1e-12)


def test_a_band_is_what_its_name_says():
    """Changing a frame reaches exactly those later ones that read it, in one forward of one layer."""
    model, noise = build(depth=1), noise_of(frames=8)
    t = torch.full((BATCH, 8), 500)
    for window, sink in ((1, 0), (3, 0), (2, 2), (8, 0)):
        base = model(noise, t, window=(window, sink))
        for frame in range(8):
            changed = noise.clone()
            changed[:, frame] += 1
            moved = (model(changed, t, window=(window, sink)) != base).any(dim=(0, 2, 3))
            expected = [i >= frame and (i - frame < window or frame < sink) for i in range(8)]
            assert moved.tolist() == expected


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("gap", [1, 3, STEPS])
def test_frames_stream_out_in_order_and_as_soon_as_they_are_final(gap, solver):
    model, noise = build(), noise_of(frames=10)
    expected = sample(model, noise, STEPS, gap, Schedule(), window=(3, 1), solver=solver)
    rows = ADRows(None, STEPS, gap)
    streamed = stream(model, source(noise), STEPS, gap, Schedule(), num_frames=10, window=(3, 1), solver=solver)
    assert_same(torch.cat([latents for _, latents in streamed], dim=1), expected, 1e-12)
    rollout = build_rollout(
        model, rows, source(noise.repeat(1, 3, 1, 1)), Schedule(), PLAIN, window=(3, 1), solver=solver
    )
    seen = 0
    for first, latents in rollout:
        assert first == seen
        assert rollout.row == STEPS + gap * first  # the row that finished it
        seen += latents.shape[1]
        if seen <= 10:
            assert_same(latents, expected[:, first:seen], 1e-12)
        if seen == 12:
            break


@pytest.mark.parametrize("options", [{}, {"solver": "dpmpp"}, {"window": (3, 1)}, {"cache": "none"}])
@pytest.mark.parametrize("gap", [2, STEPS])
def test_a_saved_state_goes_on_to_the_last_bit(options, gap):
    model, noise, given = build(num_classes=2), noise_of(frames=8), noise_of(frames=1)
    guide = Guidance.build(2.0, torch.tensor([0, 1]), 2, None, None)

    def fresh():
        rows = ADRows(8, STEPS, gap, prefix=1)
        return build_rollout(model, rows, source(noise), Schedule(), guide, given=given, **options)

    expected = torch.cat([latents for _, latents in fresh()], dim=1)
    for stop in (1, STEPS, 2 * STEPS - 1):
        rollout, parts = fresh(), []
        while rollout.row < stop:
            finished = rollout.step()
            parts += [finished.latents] if finished else []
        again = fresh()
        again.restore(rollout.state())
        parts += [latents for _, latents in again]
        assert torch.equal(torch.cat(parts, dim=1), expected)


def test_what_is_held_does_not_grow_with_the_video():
    model, sizes = build(torch.float32), set()
    rollout = build_rollout(
        model,
        ADRows(None, 10, 2),
        lambda first, count: torch.randn(BATCH, count, TOKENS, CHANNELS),
        Schedule(),
        PLAIN,
        window=(4, 1),
    )
    for first, _ in rollout:
        if first > 20:
            sizes.add((rollout.x.shape[1], rollout.cache.num_bytes, rollout.cache.held_tokens))
        if first == 200:
            break
    assert len({size[1] for size in sizes}) == 1
    assert max(size[0] for size in sizes) <= 6
    assert rollout.cache.num_bytes < 100_000


def test_pinned_frames_are_kept_and_read_by_all():
    model, noise, video = build(mask="bidirectional"), noise_of(), noise_of()
    levels = pinned_levels(6, STEPS, [0, 5])
    found = sample_levels(model, noise, levels, Schedule(), given=video)
    assert torch.equal(found[:, [0, 5]], video[:, [0, 5]])
    other = video.clone()
    other[:, 5] += 1
    moved = (sample_levels(model, noise, levels, Schedule(), given=other) != found).any(dim=(0, 2, 3))
    assert moved.tolist() == [False, *5 * [True]]


def test_a_pyramid_is_the_ad_scheduler_where_it_is_whole_and_works_in_between():
    for gap in (0, 1, 4, STEPS):
        assert torch.equal(pyramid_levels(5, STEPS, gap), ad_levels(5, STEPS, gap))
    model, noise, levels = build(), noise_of(), pyramid_levels(6, STEPS, 0.5)
    assert levels.shape == (STEPS + 2 + 1, 6)
    one, other = (sample_levels(model, noise, levels, Schedule(), cache=cache) for cache in ("exact", "none"))
    assert_same(one, other, 1e-12)


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize("gap", [0, 2, STEPS])
def test_a_matrix_gives_what_its_rows_give(gap, cache):
    model, noise, given = build(), noise_of(), noise_of()
    levels = ad_levels(6, STEPS, gap, prefix=2)
    found = sample_levels(model, noise, levels, Schedule(), given=given, cache=cache)
    assert_same(found, sample(model, noise, STEPS, gap, Schedule(), prefix=given[:, :2]), 1e-12)


def test_a_rolling_window_sees_its_frames_only():
    seen = []

    def model(x, t):
        seen.append(t[0].tolist())
        return x

    sample(model, torch.zeros(1, 6, 1, 1), 9, 3, Schedule(), cache="none", window=SlidingWindow(3))
    assert all(len(row) == 3 for row in seen)
    assert seen[0] == [889, 999, 999]
    assert seen[8] == [1, 334, 667]  # the staircase: gap = S / W
    assert seen[9] == [223, 556, 889]
    assert len(seen) == 9 + 3 * 5


def test_pavdm_grows_slides_and_shrinks_its_window():
    seen = []

    def model(x, t):
        seen.append(t[0].tolist())
        return x

    window = SlidingWindow(8, history=2, variable=True)
    given = torch.zeros(1, 2, 1, 1)
    sample(model, torch.zeros(1, 12, 1, 1), 9, 3, Schedule(), cache="none", window=window, block=2, prefix=given)
    lengths = [len(row) for row in seen]
    # one clean chunk of 2 and the noisy ones: 1, 2, 3, 3, 3 and, at the end, 2 and 1
    assert lengths == [4] * 3 + [6] * 3 + [8] * 9 + [6] * 3 + [4] * 3
    assert all(row[:2] == [1, 1] for row in seen)  # the chunk that was emitted last, clean (keep_x0)
    assert all(row[2 * i] == row[2 * i + 1] for row in seen for i in range(len(row) // 2))


def test_fifo_evaluates_its_queue_in_pieces():
    """n = 2 partitions of f = 4 frames; with lookahead each piece but the first counts for its noisier half."""
    clean, schedule = torch.randn(1, 30, 1, 2, dtype=torch.float64), Schedule()
    pieces = []

    def model(x, t):
        pieces.append((x.shape[1], t[0].tolist()))
        return x

    for lookahead, count in ((False, 2), (True, 3)):
        pieces.clear()
        window = SlidingWindow(8, partition=4, lookahead=lookahead)
        found = sample(model, clean, 8, 1, schedule, cache="none", window=window)
        assert torch.isfinite(found).all()
        assert {size for size, _ in pieces} == {4}
        assert len(pieces) == count * (8 + 29)
        steady = pieces[20 * count : 21 * count]
        assert steady[0][1] == [1, 126, 251, 376]
        assert steady[-1][1] == [501, 626, 751, 876]
        if lookahead:
            assert steady[1][1] == [251, 376, 501, 626]


def test_a_warm_start_takes_up_the_staircase():
    schedule, video = Schedule(), noise_of(frames=9)
    oracle = Oracle(video, schedule)
    rows = ADRows(9, STEPS, 3, prefix=1)
    rollout = build_rollout(
        oracle, rows, source(noise_of(frames=9)), schedule, PLAIN, given=video[:, :1], warm=video[:, :4]
    )
    # frames 1, 2, 3 are on their way, none after them has begun
    assert rows.levels(rollout.row, 0, 9).tolist() == [0, 3, 6, 9, 9, 9, 9, 9, 9]
    found = torch.cat([latents for _, latents in rollout], dim=1)
    assert found.shape == video.shape
    assert (found - video).abs().max() < 0.1


@pytest.mark.parametrize(
    ("settings", "window", "message"),
    [
        ({"gap": 2}, SlidingWindow(3), "gap >= 3"),
        ({"gap": 0}, SlidingWindow(3), "all frames"),
        ({"gap": 3, "block": 2}, SlidingWindow(4), r"ceil\(9 / 3\) \* 2 \+ 0 = 6"),
        ({"gap": 3}, SlidingWindow(3, history=1), "= 4 frames"),
        ({"gap": 3}, SlidingWindow(3, history=3), "history of 3"),
        ({"gap": 3}, SlidingWindow(4, partition=3), "multiple of partition = 3"),
        ({"gap": 3}, (0, 0), "frames >= 1"),
    ],
)
def test_windows_that_would_lose_frames_are_refused_with_the_arithmetic(settings, window, message):
    options = {"num_steps": STEPS, "schedule": Schedule(), "cache": "none", "window": window, **settings}
    with pytest.raises(UserError, match=message):
        sample(build(), noise_of(frames=9), **options)


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_idle_rows_cost_nothing(cache):
    levels = torch.tensor([[2, 2], [2, 2], [1, 2], [0, 2], [0, 2], [0, 1], [0, 0]])
    model, noise = build(), noise_of(frames=2)
    busy = levels[[1, 2, 3, 5, 6]]
    found = sample_levels(model, noise, levels, Schedule(), cache=cache)
    assert_same(found, sample_levels(model, noise, busy, Schedule(), cache=cache), 1e-12)


def test_what_a_cache_or_a_mask_cannot_do_is_refused():
    noise, schedule = noise_of(), Schedule()
    with pytest.raises(UserError, match="use cache = 'none'"):
        sample(build(), noise, STEPS, 3, schedule, window=SlidingWindow(3))
    with pytest.raises(UserError, match="later frames do not reach"):
        sample_levels(build(), noise, pinned_levels(6, STEPS, [0, 5]), schedule, given=noise)
    with pytest.raises(UserError, match="SlidingWindow"):
        sample(build(mask="bidirectional"), noise, STEPS, 3, schedule, cache="none", window=(3, 0))
    with pytest.raises(UserError, match="gap of at least 1"):
        ADRows(None, STEPS, 0)
    with pytest.raises(UserError, match="needs a window"):
        build_rollout(build(), ADRows(None, STEPS, 1), source(noise), schedule, PLAIN)
    with pytest.raises(UserError, match=r"given frames \[6\]"):
        pinned_levels(6, STEPS, [6])
    with pytest.raises(UserError, match="multiples of the mask's block"):
        sample(build(mask="block_causal", block=2), noise, STEPS, 2, schedule, block=2, window=(3, 0))
