"""Frechet distance between two sets of features, seen as Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features [n, D] and [m, D], in float64.

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)); the root is taken of a symmetric matrix, so
    rank-deficient covariances (fewer samples than D) are no problem. Raises ValueError for fewer than 2 samples.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, found {len(first)} and {len(second)}")
    (mean1, cov1), (mean2, cov2) = _gaussian(first), _gaussian(second)
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])
