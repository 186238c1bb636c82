"""Every method of the family, as its preset sets it, through the sampler that the programs use."""

import pytest
import torch
from data_helpers import randomize

from ardiff.config import load, presets
from ardiff.models import DiT
from ardiff.sampling.generate import Request, Video, default_request, generate, rows_of, start, window_of
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
    grid = 1000 // 48
    assert first == 15 and t == [(3 * (frame + 1) - 1) * grid + 1 for frame in range(16)]


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
    levels = rows.levels(70, 7, 71)
    assert levels.tolist() == list(range(1, 65))


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
