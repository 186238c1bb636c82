"""Every method of the family, as its preset sets it, through the sampler that the programs use."""

import pytest
import torch
from data_helpers import randomize

from ardiff.config import load, presets
from ardiff.errors import UserError
from ardiff.models import DiT
from ardiff.sampling.generate import Request, Video, cost, default_request, generate, rows_of, start, window_of
from ardiff.sampling.levels import SlidingWindow

SMALL = ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.tokens_per_frame=2"]
METHODS = [name for name in presets() if not name.startswith(("reference", "arvae")) and name != "images_and_video"]


def prepared(name, *overrides):
    config = load(name, [*SMALL, *overrides])
    return randomize(DiT(config.model)).eval(), config


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_samples_a_clip_and_a_longer_video(name):
    network, config = prepared(name)
    block = config.sampling.block or config.model.block
    for num_frames in (config.model.num_frames, config.model.num_frames + 2 * block):
        if num_frames > config.model.num_frames and config.sampling.gap == 0:
            continue
        request = default_request(config, 2, seed=3)
        request.num_frames = num_frames
        found = generate(network, config, request)
        assert found.shape == (2, num_frames, 2, config.model.in_channels)
        assert torch.isfinite(found).all()
        assert (found[0] - found[1]).abs().max() > 1e-3


def shown(network, config, request):
    """For every row: the first frame that the network sees and the timesteps that it is told."""
    seen = []
    rollout = start(network, config, request, range(len(request.videos)))
    forward = rollout.denoiser.model

    def watching(x, t, **more):
        seen.append((rollout.first, t[0].tolist()))
        return forward(x, t, **more)

    rollout.denoiser.model = watching
    for _ in rollout:
        pass
    return seen


def test_pavdm_sees_the_staircase_that_it_was_trained_on():
    network, config = prepared("pavdm", "diffusion.flow_shift=3.69466")
    given = torch.randn(5, 2, config.model.in_channels)
    request = Request([Video(1, prefix=given)], 60, config.sampling)
    seen = shown(network, config, request)
    assert len(seen) == 30 + 5 * (60 // 5 - 2)  # S + (generated chunks - 1) s
    assert [len(t) for _, t in seen[:6]] == [10] * 5 + [15]  # the window grows by a chunk every 5 rows
    first, t = seen[5 * 5]  # the first row in which all six noisy chunks are in the window: stage 0
    assert first == 0 and len(t) == 35
    expected = [0, 425, 649, 787, 881, 949, 1000]
    assert [round(t[5 * chunk]) for chunk in range(7)] == expected
    assert all(t[i] == t[i - i % 5] for i in range(35))
    assert [len(t) for _, t in seen[-5:]] == [10] * 5  # and shrinks again
    assert seen[-1][0] == 50


def test_rolling_sees_w_frames_from_nearly_clean_to_noise():
    network, config = prepared("rolling")
    request = Request([Video(1)], 40, config.sampling)
    seen = shown(network, config, request)
    assert all(len(t) == 16 for _, t in seen)
    first, t = seen[3 * 30]
    assert first == 15 and t == [(3 * (frame + 1) - 1) * 1000 // 48 + 1 for frame in range(16)]
    assert cost(request, config.model) == sum(len(t) for _, t in seen)
    with pytest.raises(UserError, match="history = 0 never shows the 8 given frames"):
        start(network, config, Request([Video(1, prefix=torch.randn(8, 2, 4))], 40, config.sampling), [0])


def test_fifo_goes_down_a_diagonal_in_pieces_of_a_clip():
    network, config = prepared("fifo")
    window = window_of(config.sampling)
    assert isinstance(window, SlidingWindow) and window.partition == 16 and window.lookahead
    request = Request([Video(1)], 80, config.sampling)
    rows = rows_of(request, config.model)
    assert rows.num_rows == 64 + 79
    seen = shown(network, config, request)
    assert {len(t) for _, t in seen} == {16}
    assert len(seen) == 7 * rows.num_rows  # 64 frames in pieces of 16, every 8 frames
    assert cost(request, config.model) == sum(len(t) for _, t in seen)
    levels = rows.levels(70, 7, 71)
    assert levels.tolist() == list(range(1, 65))


@pytest.mark.parametrize(
    ("name", "overrides", "prefix", "warm"),
    [
        ("pavdm", [], 35, 0),
        ("pavdm", [], 60, 30),
        ("pavdm", ["sampling.variable=false"], 10, 0),
        ("ardiff_xl", ["sampling.sliding=16"], 16, 0),
        ("ardiff_xl", ["sampling.window=16"], 64, 64),
        ("ardiff_xl", ["sampling.window=8", "sampling.sink=2"], 20, 4),
        ("fifo", ["sampling.num_steps=32", "sampling.sliding=32"], 40, 40),
    ],
)
def test_prefixes_longer_than_the_window_and_warm_starts(name, overrides, prefix, warm):
    network, config = prepared(name, *overrides)
    given = torch.randn(prefix, 2, config.model.in_channels)
    request = Request([Video(5, prefix=given)], prefix + 20, config.sampling, warm_frames=warm)
    found = generate(network, config, request)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0, : prefix - warm], given[: prefix - warm])
    request.videos = [Video(5, prefix=given + 1)]
    assert (generate(network, config, request)[0, prefix:] - found[0, prefix:]).abs().max() > 1e-4
    if config.model.mask != "bidirectional" and not config.sampling.sliding:
        recomputed = prepared(name, *overrides, "sampling.cache=none")[1]
        request = Request([Video(5, prefix=given)], prefix + 20, recomputed.sampling, warm_frames=warm)
        torch.testing.assert_close(generate(network, recomputed, request), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fvdm", "pavdm_causal", "ardiff_xl"])
def test_given_frames_stay_as_they_are(name):
    network, config = prepared(name)
    block = config.sampling.block or config.model.block
    given = torch.randn(block, 2, config.model.in_channels)
    request = Request([Video(5, prefix=given)], 4 * block, config.sampling)
    assert torch.equal(generate(network, config, request)[0, :block], given)
    if config.model.mask == "bidirectional":
        request.videos = [Video(5, prefix=given, ending=given)]
        found = generate(network, config, request)
        assert torch.equal(found[0, :block], given) and torch.equal(found[0, -block:], given)
    elif name == "ardiff_xl":
        config.sampling.gap = 0
        request.videos = [Video(5, prefix=given, ending=given)]
        with pytest.raises(UserError, match="later frames do not reach earlier ones"):
            generate(network, config, request)
