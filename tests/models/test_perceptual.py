"""SSIM against its definition, and the structure loss against what it promises."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.metrics.structure import ssim
from ardiff.models.perceptual import StructureLoss, build_perceptual, octaves


def pictures(num, height, width, seed=0):
    """Smooth pictures with some grain, [N, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, max(height // 8, 2), max(width // 8, 2), generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + 0.2 * torch.rand(num, 3, height, width, generator=generator)) / 1.2


def slow_ssim(a, b, size):
    """Wang et al. 2004, equations 14 to 16 and 13, place by place: a, b [H, W] in float64."""
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(a.shape[0] - size + 1):
        for x in range(a.shape[1] - size + 1):
            p, q = a[y : y + size, x : x + size], b[y : y + size, x : x + size]
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            both = (weights * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 0.01**2) * (2 * both + 0.03**2)
            values.append(top / ((mean_p**2 + mean_q**2 + 0.01**2) * (var_p + var_q + 0.03**2)))
    return np.mean(values)


@pytest.mark.parametrize(("height", "width", "size"), [(23, 19, 11), (11, 11, 11), (10, 30, 9), (4, 4, 3), (5, 4, 3)])
def test_ssim_is_that_of_the_paper(height, width, size):
    a = pictures(2, height, width)
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = [
        np.mean([slow_ssim(a[n, c].double().numpy(), b[n, c].double().numpy(), size) for c in range(3)])
        for n in range(2)
    ]
    assert ssim(a, b).numpy() == pytest.approx(np.array(expected), abs=2e-6)
    assert ssim(a, a).numpy() == pytest.approx(np.ones(2), abs=1e-6)
    assert ssim(a, b).numpy() == pytest.approx(ssim(b, a).numpy(), abs=1e-6)


def test_ssim_of_constant_pictures_is_their_luminance_term():
    a, b = torch.full((1, 3, 16, 16), 0.3), torch.full((1, 3, 16, 16), 0.5)
    assert ssim(a, b).item() == pytest.approx((2 * 0.3 * 0.5 + 1e-4) / (0.3**2 + 0.5**2 + 1e-4), abs=1e-4)


def test_ssim_has_correct_gradients_and_is_computed_wide():
    a = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ssim, (a, torch.rand(1, 1, 5, 5, dtype=torch.float64)))
    x, y = pictures(2, 16, 16), pictures(2, 16, 16, seed=1)
    outside = ssim(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(x, y), outside)
    torch.testing.assert_close(ssim(x.bfloat16(), y.bfloat16()), ssim(x, y), atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        ssim(x, y[:1])


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (16, 24), (33, 64), (100, 256)])
def test_structure_loss_of_any_size(size):
    loss, a = StructureLoss(), pictures(3, *size)
    b = torch.rand(a.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    value = loss(a, b)
    assert value.shape == (3,) and (value > 0.1).all() and (value < 3).all()
    assert loss(a, a).abs().max() < 1e-6
    value.sum().backward()
    assert b.grad.isfinite().all() and (b.grad != 0).all()  # every pixel counts
    a.requires_grad_()
    loss(a, a.detach()).sum().backward()
    assert a.grad.isfinite().all()
    assert not list(loss.parameters()) and not list(loss.buffers())


def test_structure_loss_adds_up_both_terms_over_the_octaves():
    a = torch.zeros(1, 1, 8, 8)
    ramp = 0.1 * torch.arange(8.0).expand(1, 1, 8, 8)  # rises by 0.1 per pixel to the right, by 0.2 in the half
    half = torch.tensor([0.05, 0.25, 0.45, 0.65]).expand(1, 1, 4, 4)
    expected = ((1 - ssim(a, ramp) + 0.1) + (1 - ssim(a[..., :4, :4], half) + 0.2)) / 2
    torch.testing.assert_close(StructureLoss()(a, ramp), expected)
    torch.testing.assert_close(StructureLoss()(a, ramp.mT), expected)


def test_number_of_octaves_follows_from_the_size():
    sizes = {4: 1, 7: 1, 8: 2, 16: 3, 32: 4, 64: 5, 512: 5}
    assert {size: len(octaves(torch.zeros(1, 3, size, 2 * size))) for size in sizes} == sizes
    assert [tuple(x.shape[2:]) for x in octaves(torch.zeros(1, 3, 17, 19))] == [(17, 19), (9, 10), (5, 5)]
    with pytest.raises(UserError, match=r"vae.perceptual = structure needs .* 4 x 4 .* not 3 x 9"):
        StructureLoss()(torch.zeros(1, 3, 3, 9), torch.zeros(1, 3, 3, 9))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_blur_is_worse_than_a_shift_of_brightness_of_the_same_squared_error(size):
    loss, a = StructureLoss(), pictures(4, size, size)
    blurred = F.avg_pool2d(F.pad(a, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    error = ((blurred - a) ** 2).mean(dim=(1, 2, 3), keepdim=True)
    shifted = a + error.sqrt()
    assert ((shifted - a) ** 2).mean(dim=(1, 2, 3)) == pytest.approx(error.flatten(), rel=1e-4)
    assert (loss(a, blurred) > 5 * loss(a, shifted)).all()


def test_more_noise_is_a_greater_loss():
    loss, a = StructureLoss(), pictures(2, 32, 32)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    values = torch.stack([loss(a, a + level * noise) for level in (0.0, 0.02, 0.05, 0.1, 0.3)])
    assert (values.diff(dim=0) > 0).all()


def test_a_frame_does_not_depend_on_the_rest_of_the_batch():
    loss, a, b = StructureLoss(), pictures(5, 24, 24), pictures(5, 24, 24, seed=1)
    alone = torch.cat([loss(a[n : n + 1], b[n : n + 1]) for n in range(5)])
    torch.testing.assert_close(loss(a, b), alone, atol=1e-6, rtol=1e-6)
    others = torch.cat([a[:1], torch.zeros_like(a[1:])])
    assert torch.equal(loss(others, b)[0], loss(a, b)[0])


def test_build_perceptual():
    assert build_perceptual(VAEConfig(perceptual_weight=0.0)) is None
    assert isinstance(build_perceptual(VAEConfig(perceptual_weight=0.5)), StructureLoss)
    with pytest.raises(UserError, match=r"vae\.lpips"):
        build_perceptual(VAEConfig(perceptual_weight=0.5, perceptual="lpips"))
