"""The temporal-causal decoder, of our AR-VAE and of the published one: what frames read, and streaming."""

import dataclasses
import itertools

import arvae_helpers
import pytest
import torch
from torch import nn

from ardiff.compat.reference import options, pixels
from ardiff.config import ReferenceVAEConfig, VAEConfig
from ardiff.errors import UserError
from ardiff.models import build_arvae, temporal
from ardiff.models.temporal import TemporalCache, banded_attention

SMALL = dataclasses.replace(arvae_helpers.SMALL, num_tokens=3, decoder_depth=2, temporal=True, window=4)
PUBLISHED = VAEConfig(
    image_size=32,
    patch_size=16,
    num_tokens=3,
    window=4,
    architecture="reference",
    reference=ReferenceVAEConfig(encoder="small", decoder="small", temporal=True),
)
BOTH = pytest.mark.parametrize("config", [SMALL, PUBLISHED], ids=["ours", "published"])
OTHERS = {
    "prime numbers": {"image_size": 15, "patch_size": 5, "num_tokens": 7, "channels": 3, "hidden_size": 6},
    "single pixels": {"image_size": 4, "patch_size": 1, "num_tokens": 2, "channels": 1},
    "one patch, one token": {"patch_size": 16, "num_tokens": 1},
    "more tokens than patches": {"patch_size": 8, "num_tokens": 64, "hidden_size": 32, "num_heads": 2},
    "deep": {"encoder_depth": 3, "decoder_depth": 4},
    "no layers": {"decoder_depth": 0},
    "one frame wide": {"window": 1},
    "wider than the video": {"window": 99},
}


@pytest.fixture(autouse=True)
def small_published_networks(monkeypatch):
    monkeypatch.setitem(options.VIT_SIZES, "small", (2, 32, 2))
    monkeypatch.setattr(pixels, "WIDTH", 32)
    monkeypatch.setattr(pixels, "MULTIPLES", (1, 1, 1, 1, 1))
    monkeypatch.setattr(pixels, "BLOCKS", 1)


def build(config, **changes):
    """A network in float64 whose temporal blocks do something."""
    network = build_arvae(dataclasses.replace(config, **changes)).double()
    for name, parameter in network.named_parameters():
        if "temporal" in name and "out_proj" in name:
            nn.init.normal_(parameter, std=0.2)
    return network


def latents_of(network, batch=2, num_frames=6):
    config, dtype = network.config, next(network.parameters()).dtype
    return torch.randn(batch, num_frames, config.num_tokens, config.channels, dtype=dtype)


def streamed(network, latents, lengths, cache=None):
    """Decoded in pieces of these lengths."""
    cache = TemporalCache() if cache is None else cache
    assert sum(lengths) == latents.shape[1]
    with torch.no_grad():
        return torch.cat([network.decode(piece, cache) for piece in latents.split(list(lengths), dim=1)], dim=1)


def worst(found, expected):
    return float((found - expected).detach().abs().max())


def reads(network, num_frames):
    """[F, F] bool: whether the pixels of frame i depend on the latents of frame j."""
    latents = latents_of(network, 1, num_frames).requires_grad_()
    video = network.decode(latents)
    weights = torch.randn_like(video[:, 0])
    rows = []
    for frame in range(num_frames):
        (found,) = torch.autograd.grad((video[:, frame] * weights).sum(), latents, retain_graph=True)
        rows.append(found[0].abs().amax((1, 2)) > 0)
    return torch.stack(rows)


def band(num_frames, reach):
    """[F, F] bool: frames i - reach .. i."""
    ones = torch.ones(num_frames, num_frames, dtype=torch.bool)
    return ones.tril() & ones.triu(-reach)


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_videos_of_any_size_and_length(changes):
    network = build(SMALL, **({"num_heads": 1} | changes))
    size = network.config.image_size
    for num_frames in (1, 2, 5, 40):
        latents = latents_of(network, 2, num_frames)
        video = network.decode(latents)
        assert video.shape == (2, num_frames, 3, size, size)
        assert video.isfinite().all()
        assert worst(streamed(network, latents, [1] * num_frames), video) < 1e-12


@BOTH
def test_a_frame_never_reads_later_ones(config):
    network = build(config, window=16)
    latents = latents_of(network)
    with torch.no_grad():
        video = network.decode(latents)
        for changed in range(6):
            other = latents.clone()
            other[:, changed] += 1
            found = network.decode(other)
            assert torch.equal(found[:, :changed], video[:, :changed])
            assert (found[:, changed:] - video[:, changed:]).abs().amax((0, 2, 3, 4)).min() > 1e-6
    assert torch.equal(reads(network, 6), band(6, 6))


@BOTH
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_two_layers_read_two_windows_back(config, window):
    assert torch.equal(reads(build(config, window=window), 9), band(9, 2 * (window - 1)))


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("window", [1, 3])
def test_fine_and_coarse_attention_have_the_same_window(kind, window):
    network = build_arvae(dataclasses.replace(SMALL, window=window, decoder_depth=1)).double()
    for name, parameter in network.named_parameters():
        if f"{kind}_temporal" in name and "out_proj" in name:
            nn.init.normal_(parameter)
    assert torch.equal(reads(network, 6), band(6, window - 1))


def test_fine_attention_reads_the_same_place_only():
    block = temporal.FineBlock(8, 2).double()
    nn.init.normal_(block.attn.out_proj.weight)
    x, clip = torch.randn(4, 5, 8, dtype=torch.float64), temporal.Clip(4, 16, None, None)
    other = x.clone()
    other[0, 2] += torch.randn(8, dtype=torch.float64)
    changed = (block(x, clip, "") - block(other, clip, "")).abs().amax(2) > 0
    assert changed.nonzero()[:, 1].unique().tolist() == [2]
    assert changed[:, 2].all()


@pytest.mark.parametrize(("past", "window"), [(0, 9), (0, 3), (2, 3), (4, 5), (1, 1), (0, 1), (7, 4)])
@pytest.mark.parametrize("queries", [1, 6, 1000])
def test_the_band_is_plain_attention_under_a_mask(past, window, queries, monkeypatch):
    monkeypatch.setattr(temporal, "QUERIES_AT_ONCE", queries)
    q = torch.randn(2, 3, 7, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, past + 7, 5, 4, dtype=torch.float64)
    scores = torch.einsum("nhitd,nhjsd->nhitjs", q, k) / 2
    for i, j in itertools.product(range(7), range(past + 7)):
        if not past + i - window < j <= past + i:
            scores[:, :, i, :, j] = -torch.inf
    weights = scores.flatten(4).softmax(-1).view_as(scores)
    expected = torch.einsum("nhitjs,nhjsd->nhitd", weights, v)
    assert worst(banded_attention(q, k, v, window), expected) < 1e-12


@BOTH
def test_a_temporal_network_begins_as_the_per_frame_one(config):
    reference = dataclasses.replace(config.reference, temporal=False)
    torch.manual_seed(3)
    plain = build_arvae(dataclasses.replace(config, temporal=False, reference=reference))
    torch.manual_seed(3)
    network = build_arvae(config)
    assert (plain.temporal, network.temporal) == (False, True)
    alone, together = plain.state_dict(), network.state_dict()
    added = [name for name in together if name not in alone]
    assert added
    assert all("temporal" in name for name in added)
    assert not any("temporal" in name for name in alone)
    assert [name for name in together if name in alone] == list(alone)
    assert all(torch.equal(value, together[name]) for name, value in alone.items())
    latents, video = latents_of(plain), torch.rand(1, 2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        assert torch.equal(network.decode(latents), plain.decode(latents))
        assert torch.equal(network.encode(video), plain.encode(video))


@BOTH
def test_decoding_per_frame_leaves_the_temporal_blocks_out(config):
    reference = dataclasses.replace(config.reference, temporal=False)
    network, cache = build(config), TemporalCache()
    plain = build_arvae(dataclasses.replace(config, temporal=False, reference=reference)).double()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if "temporal" not in name})
    latents = latents_of(network)
    expected = plain.decode(latents)
    assert torch.equal(network.decode(latents, temporal=False), expected)
    assert worst(network.decode(latents), expected) > 1e-3
    assert torch.equal(plain.decode(latents, cache), expected)  # networks without temporal blocks need no cache
    assert torch.equal(network.decode(latents, cache, temporal=False), expected)
    assert (cache.num_frames, cache.nbytes) == (0, 0)


@BOTH
@pytest.mark.parametrize("lengths", [[1] * 23, [3] * 7 + [2], [1, 4, 2, 7, 1, 8], [9, 14], [23]], ids=str)
def test_streaming_gives_the_same_video(config, lengths):
    network = build(config)
    latents = latents_of(network, 2, 23)
    whole, cache = network.decode(latents), TemporalCache()
    assert worst(streamed(network, latents, lengths, cache), whole) < 1e-12
    assert cache.num_frames == 23
    network, latents = network.float(), latents.float()
    # untrained, the published convolutions amplify rounding: frames by themselves differ by 2e-5 with the batch size
    limit = 1e-4 if config is PUBLISHED else 1e-5
    assert worst(streamed(network, latents, lengths), network.decode(latents)) < limit


@BOTH
def test_long_videos_are_decoded_in_pieces_unless_gradients_are_needed(config, monkeypatch):
    monkeypatch.setattr(temporal, "PIECE", 5)
    network, seen = build(config), []
    network.last_layer.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    latents = latents_of(network, 1, 23)
    whole = network.decode(latents)
    with torch.no_grad():
        assert worst(network.decode(latents), whole) < 1e-12
        assert worst(network.decode(latents[:, :10]), whole[:, :10]) < 1e-12
        network.decode(latents[:, :13], cache := TemporalCache())
        assert worst(network.decode(latents[:, 13:], cache), whole[:, 13:]) < 1e-12
    assert seen == [23, 5, 5, 5, 5, 3, 10, 5, 5, 3, 10]


def test_the_state_of_a_thousand_frames_is_that_of_a_few():
    network = build(SMALL).float()
    latents, cache, sizes, video = latents_of(network, 2, 1000), TemporalCache(), set(), []
    for piece in latents.split(([1] * 20 + [20]) * 25, dim=1):
        with torch.no_grad():
            video.append(network.decode(piece, cache))
        if cache.num_frames >= SMALL.window - 1:
            sizes.add(cache.nbytes)
    tokens = SMALL.num_tokens + (SMALL.image_size // SMALL.patch_size) ** 2
    kept = (SMALL.window - 1) * tokens * SMALL.hidden_size  # of one layer and video, keys and values each
    assert sizes == {2 * 2 * SMALL.decoder_depth * kept * 4}
    assert cache.num_frames == 1000
    # only differences of positions count, so a video that begins later is the same once both have the same past
    with torch.no_grad():
        later = network.decode(latents[:, 970:])
    reach = SMALL.decoder_depth * (SMALL.window - 1)
    assert worst(later[:, reach:], torch.cat(video, dim=1)[:, 970 + reach :]) < 1e-4
    assert worst(later[:, 0], torch.cat(video, dim=1)[:, 970]) > 1e-2


def test_our_decoder_knows_the_order_of_earlier_frames_and_the_published_one_does_not(monkeypatch):
    monkeypatch.setitem(options.VIT_SIZES, "small", (1, 32, 2))  # deeper layers see who could read whom
    for config, known in ((dataclasses.replace(SMALL, decoder_depth=1), True), (PUBLISHED, False)):
        network = build(config)
        latents = latents_of(network, 1, 3)
        with torch.no_grad():
            found, swapped = network.decode(latents), network.decode(latents[:, [1, 0, 2]])
        assert (worst(found[:, 2], swapped[:, 2]) > 1e-4) == known
        assert (worst(found[:, 2], swapped[:, 2]) < 1e-12) != known


@BOTH
def test_gradients_reach_all_temporal_parameters(config):
    for network, expected in ((build_arvae(config), "out_proj"), (build(config), "")):
        network.decode(latents_of(network)).square().sum().backward()
        for name, parameter in network.named_parameters():
            # without positions a bias of all keys changes nothing
            if "temporal" in name and not (config is PUBLISHED and "ln_k.bias" in name):
                assert bool(parameter.grad.abs().max() > 0) == (expected in name), name


@BOTH
def test_no_gradients_flow_into_the_remembered_frames(config):
    network, cache = build(config), TemporalCache()
    first, second = (latents_of(network, 1, 2).requires_grad_() for _ in range(2))
    network.decode(first, cache)
    network.decode(second, cache).sum().backward()
    assert first.grad is None
    assert second.grad.abs().max() > 0


@BOTH
def test_bfloat16_stays_close_over_hundreds_of_frames(config):
    network = build(config).float()
    latents = latents_of(network, 1, 400)
    with torch.no_grad():
        expected, scale = network.decode(latents), network.decode(latents).std()
        found = streamed(network.bfloat16(), latents, [50] * 8).float()
    errors = (found - expected).square().mean((0, 2, 3, 4)).sqrt() / scale  # by frame
    assert errors.max() < 0.1
    assert errors[-100:].mean() < 1.5 * errors[:100].mean()


@BOTH
def test_the_last_layer_paints_the_pixels(config):
    network = build(config)
    assert isinstance(network.last_layer, (nn.Linear, nn.Conv2d))
    nn.init.zeros_(network.last_layer.weight)
    nn.init.zeros_(network.last_layer.bias)
    video = network.decode(latents_of(network))
    assert (video == video[0, 0, 0, 0, 0]).all()
    video.square().sum().backward()
    assert network.last_layer.bias.grad is not None


def test_a_cache_continues_only_its_own_videos():
    network, cache = build(SMALL), TemporalCache()
    network.decode(latents_of(network), cache)
    with pytest.raises(UserError, match="the TemporalCache is of 2 videos and cannot continue 3"):
        network.decode(latents_of(network, 3), cache)
    latents = latents_of(network)
    network.decode(latents, cache)  # a refusal changes nothing
    assert cache.num_frames == 12
    handle = network.last_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.decode(latents, cache)
    handle.remove()
    with pytest.raises(UserError, match="failed midway; start the video again with a new one"):
        network.decode(latents, cache)
