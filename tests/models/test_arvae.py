import dataclasses

import pytest
import torch
from arvae_helpers import SMALL, frames
from torch.nn import functional as F

from ardiff.models import ARVAE
from ardiff.models.arvae import local_average, token_places

OTHERS = {
    "prime numbers": {"image_size": 15, "patch_size": 5, "num_tokens": 7, "channels": 3, "hidden_size": 6},
    "single pixels": {"image_size": 4, "patch_size": 1, "num_tokens": 2, "channels": 1},
    "one patch, one token": {"patch_size": 16, "num_tokens": 1},
    "more tokens than patches": {"patch_size": 8, "num_tokens": 64, "hidden_size": 32},
    "deep": {"encoder_depth": 3, "decoder_depth": 4},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_shapes_of_any_size(options):
    config = dataclasses.replace(SMALL, **options)
    model, video = ARVAE(config), frames(config)
    latents = model.encode(video)
    assert latents.shape == (2, 3, config.num_tokens, config.channels)
    assert all(part.shape == latents.shape for part in model.posterior(video))
    decoded = model.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.isfinite().all()


def test_encode_is_the_posterior_mean_not_normalised():
    model, video = ARVAE(SMALL), frames(SMALL)
    latents = model.encode(video)
    assert torch.equal(latents, model.posterior(video)[0])
    assert not torch.allclose(latents.norm(dim=-1), torch.ones(2, 3, SMALL.num_tokens))


@pytest.mark.parametrize("shape", [(1, 1, 3, 32, 32), (1, 3, 16, 16), (1, 1, 1, 16, 16)])
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[B, F, 3, 16, 16\]"):
        ARVAE(SMALL).encode(torch.rand(shape))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_frames_are_independent(direction):
    model, video = ARVAE(SMALL), frames(SMALL)
    function = getattr(model, direction)
    first = video if direction == "encode" else model.encode(video)
    second = torch.rand_like(first)
    second[1, 1] = first[1, 1]
    one, other = function(first), function(second)
    assert torch.equal(one[1, 1], other[1, 1])
    assert not torch.allclose(one[0, 1], other[0, 1])


def test_only_the_direction_of_a_token_is_decoded():
    model = ARVAE(SMALL).double()
    latents = torch.randn(2, 3, SMALL.num_tokens, SMALL.channels, dtype=torch.float64)
    lengths = torch.rand(2, 3, SMALL.num_tokens, 1, dtype=torch.float64) * 5 + 0.1
    expected = model.decode(F.normalize(latents, dim=-1))
    torch.testing.assert_close(model.decode(lengths * latents), expected)
    assert not torch.allclose(model.decode(-latents), expected)


def test_tokens_start_at_their_places():
    places = token_places(12)  # 3 rows of 4
    assert len(places.unique(dim=0)) == 12
    torch.testing.assert_close(places.mean(0), torch.full((2,), 0.5))
    torch.testing.assert_close(places[0], torch.tensor([1 / 6, 1 / 8]))
    weights = local_average(places, places)
    torch.testing.assert_close(weights.sum(1), torch.ones(12))
    assert torch.equal(weights.argmax(1), torch.arange(12))
