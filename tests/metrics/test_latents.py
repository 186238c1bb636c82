"""Statistics of latents against known spectra."""

import json
import math

import pytest
import torch

from ardiff.metrics.latents import LatentStatistics, effective_rank
from ardiff.metrics.linear_codes import dct_matrix


def statistics(*batches):
    found = LatentStatistics()
    for batch in batches:
        found.add(batch)
    return found.result()


def rotated(spectrum):
    """A covariance with these eigenvalues and no zero in sight."""
    basis = dct_matrix(len(spectrum))
    return basis.T @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis


def test_effective_rank_of_known_spectra():
    assert effective_rank(rotated([3.0] * 7)) == pytest.approx(7)
    assert effective_rank(rotated([2.0] * 4 + [0.0] * 12)) == pytest.approx(4)
    assert effective_rank(rotated([5.0, 0.0, 0.0])) == pytest.approx(1)
    shares = torch.tensor([0.5, 0.25, 0.25])  # entropy 1.5 bits
    assert effective_rank(rotated((8 * shares).tolist())) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(3, 3)) == 0
    assert math.isnan(effective_rank(torch.full((2, 2), float("nan"))))


def test_latents_of_a_known_covariance():
    """Tokens on the circle whose angles are independent and uniform: equal, uncorrelated numbers."""
    angles = torch.rand(20_000, 3) * 2 * math.pi
    found = statistics(torch.stack([angles.cos(), angles.sin()], dim=-1))
    assert found["effective_rank"] == pytest.approx(6, rel=1e-2)
    assert found["latent_mean"] == pytest.approx([0, 0], abs=0.02)
    assert found["latent_std"] == pytest.approx([0.5**0.5] * 2, rel=0.02)
    assert found["dead_channels"] == 0 and found["latent_length"] == pytest.approx(1)


def test_mean_and_deviation_per_channel_are_over_frames_and_tokens_of_unit_length():
    latents = torch.randn(2, 50, 5, 3) * torch.tensor([1.0, 2.0, 0.3]) + torch.tensor([4.0, 0.0, -1.0])
    found = statistics(latents)
    unit = torch.nn.functional.normalize(latents.double(), dim=-1).reshape(-1, 3)
    assert found["latent_mean"] == pytest.approx(unit.mean(0).tolist(), abs=1e-12)
    assert found["latent_std"] == pytest.approx(unit.std(0, correction=0).tolist(), abs=1e-12)
    assert found["latent_length"] == pytest.approx(latents.norm(dim=-1).mean().item(), rel=1e-6)
    assert json.loads(json.dumps(found)) == found


def test_batches_and_lengths_of_tokens_do_not_matter():
    latents = torch.randn(60, 4, 3) + 2
    whole = statistics(latents)
    scaled = latents * torch.rand(60, 4, 1).add(0.1)
    cut = statistics(scaled[:1], scaled[None, 1:7], scaled[7:7], scaled[7:])
    for name in ("latent_mean", "latent_std", "effective_rank", "dead_channels"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-6)


def test_dead_numbers_are_those_that_hardly_vary():
    angles = 0.3 * torch.randn(5000, 10)
    angles[:, 0] *= 0.02  # its sine has 0.04 % of the others' variance
    latents = torch.stack(
        [angles.sin(), angles.cos()], dim=-1
    )  # the cosines vary less, but more than 1 % of the median
    assert statistics(latents)["dead_channels"] == pytest.approx(2 / 20)
    assert statistics(latents[:, 1:])["dead_channels"] == 0
    angles = math.pi / 4 + 0.01 * torch.randn(500, 10)
    angles[:, 0] *= 100  # one that varies very much does not make the others dead
    assert statistics(torch.stack([angles.sin(), angles.cos()], dim=-1))["dead_channels"] == 0


def test_latents_that_do_not_vary_are_all_dead():
    same = torch.randn(1, 4, 3).double() + 1e-8 * torch.randn(40, 4, 3)  # but for rounding
    found = statistics(same[:7], same[7:])
    assert found["dead_channels"] == 1 and found["effective_rank"] == 0


def test_mistakes():
    with pytest.raises(ValueError, match="at least one frame"):
        statistics()
    with pytest.raises(ValueError, match="4, 2"):
        statistics(torch.randn(3, 4, 2), torch.randn(3, 2, 4))
