import dataclasses

import pytest
import torch
from sampling_helpers import BATCH, CHANNELS, FRAMES, SMALL, STEPS, TOKENS, Oracle, assert_same, build, noise_of

from ardiff.config import SamplingConfig, load
from ardiff.diffusion.schedule import PREDICTIONS, Schedule
from ardiff.errors import UserError
from ardiff.sampling import sample
from ardiff.sampling.generate import Request, Video, generate, video_seeds


def by_the_book(model, x, num_steps, gap, schedule, block=1, prefix=None):
    """The reference's sampler: every row computes every frame, and the update is written out."""
    x, given = x.clone(), 0
    if prefix is not None:
        given = prefix.shape[1]
        x[:, :given] = prefix
    steps_done = [num_steps if frame < given else 0 for frame in range(x.shape[1])]
    row = 0
    while min(steps_done) < num_steps:
        row += 1
        before = list(steps_done)
        for frame in range(given, x.shape[1]):
            steps_done[frame] = min(max(row - gap * (frame // block - given // block), 0), num_steps)
        times = [
            schedule.num_timesteps - 1 if k == 0 else (num_steps - k) * schedule.num_timesteps // num_steps + 1
            for k in steps_done
        ]
        t = torch.tensor(times).expand(len(x), -1)
        with torch.no_grad():
            x0 = schedule.to_x0(model(x, t), x, t)
        for frame, k in enumerate(steps_done):
            if k == before[frame]:
                continue
            alpha = schedule.alphas_cumprod[times[frame]].item()
            after = (num_steps - k - 1) * schedule.num_timesteps // num_steps + 1 if k < num_steps else 0
            below = schedule.alphas_cumprod[after].item()
            eps = (x[:, frame] / alpha**0.5 - x0[:, frame]) / (1 / alpha - 1) ** 0.5
            x[:, frame] = below**0.5 * x0[:, frame] + (1 - below) ** 0.5 * eps
    return x


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("gap", [0, 1, 3, 7, STEPS])
def test_cached_and_uncached_equal_the_sampler_by_the_book(gap, prediction):
    model, schedule, noise = build(), Schedule(prediction=prediction), noise_of()
    expected = by_the_book(model, noise, STEPS, gap, schedule)
    for cache in ("none", "exact"):
        assert_same(sample(model, noise, STEPS, gap, schedule, cache=cache), expected, 1e-12)


@pytest.mark.parametrize("gap", [0, 1, 3, 7, STEPS])
def test_cached_equals_uncached_in_single_precision(gap):
    model, noise = build(torch.float32), noise_of(torch.float32)
    one, other = (sample(model, noise, STEPS, gap, Schedule(), cache=cache) for cache in ("exact", "none"))
    assert one.dtype == torch.float32
    assert_same(one, other, 1e-5)


@pytest.mark.parametrize("gap", [0, 2, STEPS])
@pytest.mark.parametrize(
    ("mask_block", "block", "prefix"),
    [(1, 1, 1), (1, 1, 5), (1, 2, 0), (1, 3, 1), (1, 4, 3), (2, 2, 0), (2, 2, 4), (2, 4, 0), (2, 4, 2), (4, 4, 0)],
)
def test_blocks_and_prefixes(mask_block, block, prefix, gap):
    # 6 frames: the last block of 4 is cut short
    model = build(mask="block_causal" if mask_block > 1 else "frame_causal", block=mask_block)
    noise = noise_of()
    given = torch.randn(BATCH, prefix, TOKENS, CHANNELS, dtype=torch.float64) if prefix else None
    expected = by_the_book(model, noise, STEPS, gap, Schedule(), block, given)
    for cache in ("none", "exact"):
        found = sample(model, noise, STEPS, gap, Schedule(), block=block, prefix=given, cache=cache)
        assert_same(found, expected, 1e-12)
        if given is not None:
            assert torch.equal(found[:, :prefix], given)


def guided(model, scale, label, context, null_context):
    """Guidance as two plain forwards, for the sampler by the book."""

    def call(x, t):
        null_label = None if label is None else torch.full_like(label, model.config.num_classes)
        null = None if null_context is None else null_context.expand_as(context)
        conditional = model(x, t, label, context)
        unconditional = model(x, t, null_label, null)
        return unconditional + scale * (conditional - unconditional)

    return call


@pytest.mark.parametrize("gap", [0, 2, STEPS])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("conditions", ["label", "context", "both"])
def test_guidance(conditions, scale, gap):
    model = build(num_classes=3, context_dim=5)
    label = torch.tensor([0, 2]) if conditions != "context" else None
    context = null_context = None
    if conditions != "label":
        context = torch.randn(BATCH, 3, 5, dtype=torch.float64)
        null_context = torch.randn(1, 3, 5, dtype=torch.float64)
    noise, given = noise_of(), torch.randn(BATCH, 1, TOKENS, CHANNELS, dtype=torch.float64)
    expected = by_the_book(
        guided(model, scale, label, context, null_context), noise, STEPS, gap, Schedule(), prefix=given
    )
    for cache in ("none", "exact"):
        options = {"label": label, "context": context, "null_context": null_context, "prefix": given}
        found = sample(model, noise, STEPS, gap, Schedule(), guidance=scale, cache=cache, **options)
        assert_same(found, expected, 1e-12)


def test_guidance_acts_on_the_clean_sample_of_every_branch():
    # for other predictions than x0 the combination is linear in x0 too, so the branches may not be mixed up
    model, schedule, noise = build(num_classes=2), Schedule(prediction="v"), noise_of()
    label = torch.tensor([0, 1])
    expected = by_the_book(guided(model, 2.0, label, None, None), noise, STEPS, 3, schedule)
    found = sample(model, noise, STEPS, 3, schedule, guidance=2.0, label=label)
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gap", [0, 4, STEPS])
def test_an_oracle_gets_its_video_back(gap, prediction, cache):
    schedule, clean, noise = Schedule(prediction=prediction), noise_of(), noise_of()
    found = sample(Oracle(clean, schedule), noise, STEPS, gap, schedule, cache=cache)
    # one path from noise to clean: the noise that is left is the one of the first step, at 1 % of its size
    start = schedule.alphas_cumprod[schedule.timesteps(STEPS)[1]]
    first, last = start.item(), schedule.alphas_cumprod[0].item()
    eps = (noise - first**0.5 * clean) / (1 - first) ** 0.5
    assert_same(found, last**0.5 * clean + (1 - last) ** 0.5 * eps, 1e-10)
    assert (found - clean).abs().max() < 0.06


@pytest.mark.parametrize(
    ("frames", "gap", "cache", "count"),
    # the table of async-diffusion-family.md, section 3, for 50 steps
    [
        (16, 50, "exact", 815),
        (16, 5, "exact", 815),
        (16, 0, "exact", 800),
        (16, 50, "none", 12_800),
        (16, 5, "none", 2_000),
        (128, 5, "exact", 6_527),
        (128, 25, "exact", 6_527),
    ],
)
def test_no_frame_is_computed_in_vain(frames, gap, cache, count):
    schedule = Schedule()
    oracle = Oracle(torch.zeros(1, frames, 1, 1), schedule)
    rows = []
    sample(oracle, torch.zeros(1, frames, 1, 1), 50, gap, schedule, cache=cache, on_row=lambda *row: rows.append(row))
    assert oracle.frames == count
    total = 50 + gap * (frames - 1)
    assert oracle.calls == total
    assert rows == [(row, total) for row in range(1, total + 1)]


def test_a_finished_frame_is_shown_once_more_as_clean():
    schedule, seen = Schedule(), []

    def model(x, t, cache):
        seen.append((cache.num_frames, t[0].tolist()))
        return x

    sample(model, torch.zeros(1, 3, 1, 1), 2, 2, schedule, prefix=torch.zeros(1, 1, 1, 1))
    # the prefix rides along with the first row, frame 1 with the first row of frame 2; label 1 is "clean"
    assert seen == [(0, [1, 501]), (1, [1]), (1, [1, 501]), (2, [1])]


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_inputs_are_left_alone_and_rounds_repeat(cache):
    model, noise, given = build(), noise_of(), noise_of(frames=2)
    before = noise.clone(), given.clone()
    one, other = (sample(model, noise, 4, 2, Schedule(), prefix=given, cache=cache) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(noise, before[0])
    assert torch.equal(given, before[1])
    assert not one.requires_grad


def test_videos_of_a_batch_do_not_influence_each_other():
    model, noise, label = build(num_classes=2), noise_of(), torch.tensor([0, 1])
    together = sample(model, noise, 5, 2, Schedule(), label=label, guidance=2.0)
    alone = sample(model, noise[1:], 5, 2, Schedule(), label=label[1:], guidance=2.0)
    assert_same(alone, together[1:], 1e-12)


def test_any_number_of_frames():
    model = build()
    for frames in (1, 2 * FRAMES + 1):
        noise = noise_of(frames=frames)
        assert_same(sample(model, noise, 4, 3, Schedule()), by_the_book(model, noise, 4, 3, Schedule()), 1e-12)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"context": "leaky"}, {}, "leaky"),
        ({"mask": "bidirectional"}, {}, "bidirectional"),
        ({"mask": "block_causal", "block": 2}, {}, "block"),
        ({"mask": "block_causal", "block": 2}, {"block": 3}, "block"),
        ({"mask": "block_causal", "block": 2}, {"block": 2, "prefix": 1}, "prefix"),
        ({}, {"guidance": 2.0}, "label or a context"),
        ({"context_dim": 3}, {"guidance": 2.0, "context": 1}, "null_context"),
        ({}, {"cache": "some"}, "some"),
        ({}, {"gap": STEPS + 1}, "gap"),
        ({}, {"gap": -1}, "gap"),
        ({}, {"num_steps": 1000}, "1000"),
        ({}, {"prefix": FRAMES}, "prefix"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, settings, message):
    model = build(**options)
    settings = {"num_steps": STEPS, "gap": 1, **settings}
    if "prefix" in settings:
        settings["prefix"] = noise_of(frames=settings["prefix"])
    if "context" in settings:
        settings["context"] = torch.zeros(BATCH, 2, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=message):
        sample(model, noise_of(), schedule=Schedule(), **settings)


@pytest.mark.parametrize("options", [{"context": "leaky"}, {"mask": "bidirectional"}])
def test_what_cannot_be_cached_can_be_recomputed(options):
    model, noise = build(**options), noise_of()
    expected = by_the_book(model, noise, 4, 2, Schedule())
    assert_same(sample(model, noise, 4, 2, Schedule(), cache="none"), expected, 1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_generated_videos_depend_on_their_own_number_only(batch_size):
    config = load("tiny")
    config.model = dataclasses.replace(SMALL, num_classes=3)
    network = build(num_classes=3)
    prefix = noise_of(frames=1)[0].float()
    seeds = video_seeds(3, range(5))
    videos = [Video(seed, label, prefix=prefix) for seed, label in zip(seeds, [0, 1, 2, 1, 0], strict=True)]
    sampling = SamplingConfig(num_steps=4, gap=2, guidance=1.5)
    request = Request(videos, FRAMES, sampling, batch_size)
    whole = generate(network, config, request)
    assert whole.shape == (5, FRAMES, TOKENS, CHANNELS)
    one = dataclasses.replace(request, videos=videos[3:4])
    torch.testing.assert_close(generate(network, config, one)[0], whole[3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[0], whole[4])  # the same label, other noise
