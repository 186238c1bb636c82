"""Perceptual losses: how different two pictures look, beyond the difference of their pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.metrics.structure import ssim, wide_enough
from ardiff.models import lpips
from ardiff.models.lpips import LPIPS

SMALLEST = 4  # pixels of a side, of the picture and of its smallest octave
OCTAVES = 5  # at most, as in multi-scale SSIM (Wang et al. 2003)


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """[N, C, H, W] twice -> [N]: absolute difference between the steps from a pixel to the next, down and right."""
    difference = a - b
    down, right = difference.diff(dim=-2), difference.diff(dim=-1)
    return down.abs().mean(dim=(1, 2, 3)) + right.abs().mean(dim=(1, 2, 3))


def octaves(picture: Tensor) -> list[Tensor]:
    """picture [N, C, H, W] and its halves, quarters, ... while both sides have at least 4 pixels, five at most.

    An odd last row or column is averaged by itself, so that every pixel counts at every scale.
    """
    scales = [picture]
    while len(scales) < OCTAVES and min(scales[-1].shape[2:]) >= 2 * SMALLEST:
        scales.append(F.avg_pool2d(scales[-1], 2, ceil_mode=True, count_include_pad=False))
    return scales


def check_size(height: int, width: int) -> None:
    """Raise UserError for pictures that are too small to compare."""
    if min(height, width) < SMALLEST:
        raise UserError(
            f"vae.perceptual = structure needs pictures of at least {SMALLEST} x {SMALLEST} pixels, "
            f"not {height} x {width}: raise vae.image_size or set vae.perceptual_weight = 0"
        )


class StructureLoss(nn.Module):
    """Difference in structure between pictures a and b: image gradients and SSIM at several scales.

    Called with a, b [N, 3, H, W] in about [0, 1] -> [N], each frame by itself: 0 for equal pictures, about 1 to 2 for
    unrelated ones. It is the mean over the octaves (full size, half, quarter, ...: as many as keep 4 pixels, five at
    most) of `1 - SSIM` and of the L1 distance of the horizontal and vertical image gradients.

    What it is: it has no learned weights. It knows edges, local contrast and texture energy at their exact places, so
    it punishes blur much more than a change of brightness. What it is not: it knows nothing of objects, faces or
    semantics, and grass whose blades lie elsewhere is as wrong to it as no grass. LPIPS (vae.perceptual = lpips) is
    closer to what people see, and needs a file of weights.

    Raises UserError for pictures of fewer than 4 pixels.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        check_size(a.shape[-2], a.shape[-1])
        scales = zip(octaves(wide_enough(a)), octaves(wide_enough(b)), strict=True)
        return torch.stack([1 - ssim(x, y) + gradient_difference(x, y) for x, y in scales]).mean(dim=0)


def build_perceptual(config: VAEConfig, measured: LPIPS | None = None) -> nn.Module | None:
    """The perceptual loss of the configuration, called with pictures [N, 3, H, W] twice -> [N]; None without one.

    measured: of `measured_lpips`, where its file has been read already. Weights, if there are any, are frozen. Raises
    UserError if the file of vae.lpips is not what it should be.
    """
    if config.perceptual_weight == 0:
        return None
    if config.perceptual == "structure":
        check_size(config.image_size, config.image_size)
        return StructureLoss()
    if config.lpips is None:
        raise UserError("vae.perceptual = lpips needs vae.lpips, the file with its weights")
    return measured_lpips(config) if measured is None else measured


def measured_lpips(config: VAEConfig) -> LPIPS | None:
    """LPIPS with the weights of vae.lpips, None without. Raises UserError as `LPIPS`, for small frames too."""
    if config.lpips is None:
        return None
    lpips.check_size(config.image_size, config.image_size)
    return LPIPS(config.lpips)
