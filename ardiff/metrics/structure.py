"""Structural similarity of pictures (SSIM): a measure of quality and, through its gradient, a loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # pixels, of the Gaussian
STABILITY = (0.01**2, 0.03**2)  # C1 and C2 for a data range of 1


def wide_enough(a: Tensor) -> Tensor:
    """a in at least float32: squares and differences of squares are too coarse in less."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


def _local_mean(x: Tensor, size: int) -> Tensor:
    """x [N, C, H, W] under a Gaussian window of `size` x `size`, unpadded: [N, C, H - size + 1, W - size + 1]."""
    places = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    window = torch.exp(-0.5 * (places / SIGMA) ** 2)
    window = window / window.sum()
    channels = x.shape[1]
    x = x.contiguous()  # the kernel of this layout is exact; that of channels_last may compute in TF32
    x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the pictures a and b, each [N, C, H, W] with values in [0, 1] -> [N], at most 1.

    Wang et al. 2004, equation 13, with K1 = 0.01, K2 = 0.03 and population moments under a Gaussian window of 11 x 11
    pixels and deviation 1.5, at all places where the window lies inside the picture; the mean over places and
    channels. A picture of fewer than 11 pixels gets the largest odd window that fits. Computed in float32 or wider,
    whatever autocast says; differentiable.

    Raises ValueError for shapes that differ or are not [N, C, H, W].
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures {tuple(a.shape)} and {tuple(b.shape)} must both be [N, C, H, W]")
    size = (min(WINDOW, *a.shape[2:]) - 1) // 2 * 2 + 1
    c1, c2 = STABILITY
    with torch.autocast(a.device.type, enabled=False):
        a, b = wide_enough(a), wide_enough(b)
        moments = _local_mean(torch.cat([a, b, a * a, b * b, a * b], dim=1), size)
        mean_a, mean_b, square_a, square_b, product = moments.chunk(5, dim=1)
        variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
        covariance = product - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        return (luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean(dim=(1, 2, 3))
