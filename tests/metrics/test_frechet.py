"""The Frechet distance against closed forms."""

import pytest
import torch

from ardiff.metrics.frechet import frechet_distance


def whitened(count: int, dim: int, seed: int) -> torch.Tensor:
    """Samples whose mean is exactly 0 and whose covariance is exactly 1, so that the closed forms are exact."""
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_distance_to_itself_is_zero():
    x = whitened(200, 5, 0) * torch.arange(1, 6) + 3
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_gaussians_with_commuting_covariances():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2."""
    x, y = whitened(300, 4, 0), whitened(250, 4, 1)
    s1, s2 = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 0.1, 1.5, 3.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    expected = float(shift.square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(x * s1 + shift, y * s2) == pytest.approx(expected, abs=1e-8)


def test_general_covariances_against_the_matrix_square_root():
    a, b = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    x, y = whitened(300, 4, 0) @ a.T, whitened(300, 4, 1) @ b.T
    product = torch.linalg.eigvals(a @ a.T @ b @ b.T).sqrt().sum().real  # eigenvalues of C1 C2
    expected = float((a @ a.T).trace() + (b @ b.T).trace() - 2 * product)
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-8)


def test_symmetric_and_growing_with_noise():
    x, noise = whitened(100, 3, 0), whitened(100, 3, 1)
    distances = [frechet_distance(x, x + level * noise) for level in (0.0, 0.3, 0.6, 1.2)]
    assert distances == sorted(distances)
    assert frechet_distance(x + noise, x) == pytest.approx(frechet_distance(x, x + noise), abs=1e-9)


def test_fewer_samples_than_dimensions():
    """Rank-deficient covariances: two points each, a known answer along one axis."""
    x, y = torch.zeros(2, 50), torch.zeros(2, 50)
    x[1, 0], y[1, 0] = 2.0, 4.0  # standard deviations sqrt(2) and sqrt(8), means 1 and 2
    assert frechet_distance(x, y) == pytest.approx(1 + 2, abs=1e-6)


def test_single_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
