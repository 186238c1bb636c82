"""The discriminator of patches and the hinge losses."""

import pytest
import torch
from torch import nn

from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.models.discriminator import PatchDiscriminator, group_norm, hinge_discriminator, hinge_generator


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (31, 64), (128, 128)])
def test_one_logit_per_patch(layers, size):
    network = PatchDiscriminator(8, layers)
    logits = network(torch.rand(2, 3, *size))
    assert logits.shape == (2, 1, size[0] // 2**layers, size[1] // 2**layers)
    assert logits.isfinite().all() and logits.std() > 0


def test_shape_is_that_of_pix2pix():
    network = PatchDiscriminator(64, 4)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [c.in_channels for c in convolutions] == [3, 64, 128, 256, 512, 512]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 512, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 1, 1]
    assert {c.kernel_size for c in convolutions} == {(4, 4)}
    assert [c.weight.std().item() for c in convolutions] == pytest.approx([0.02] * 6, rel=0.1)
    slopes = [module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.2] * 5
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_channels for norm in norms] == [128, 256, 512, 512]
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert not list(network.buffers())
    assert sum(p.numel() for p in PatchDiscriminator(64, 3).parameters()) == 2_765_633  # as with BatchNorm


def test_patch_of_70_pixels():
    """A logit in the middle reads 70 x 70 pixels, apart from what the norms add up."""
    network = PatchDiscriminator(8, 3)
    for stage, module in enumerate(network.stages):
        if isinstance(module, nn.GroupNorm):
            network.stages[stage] = nn.Identity()
    picture = torch.rand(1, 3, 128, 128, requires_grad=True)
    network(picture)[0, 0, 8, 8].backward()
    read = picture.grad.abs().sum(dim=(0, 1)) > 0
    assert read.any(dim=0).sum() == read.any(dim=1).sum() == 70


def test_a_frame_does_not_depend_on_the_rest_of_the_batch():
    network, pictures = PatchDiscriminator(8, 3), torch.rand(4, 3, 32, 32)
    alone = torch.cat([network(pictures[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(network(pictures), alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network.eval()(pictures), alone, atol=1e-6, rtol=1e-5)
    pictures.requires_grad_()
    network(pictures)[1].sum().backward()
    assert (pictures.grad.flatten(1).abs().sum(dim=1) > 0).tolist() == [False, True, False, False]


def test_channels_are_grouped():
    found = {channels: group_norm(channels).num_groups for channels in (2, 6, 16, 18, 128, 256, 512)}
    assert found == {2: 1, 6: 1, 16: 4, 18: 3, 128: 32, 256: 32, 512: 32}


def test_pictures_that_are_too_small():
    with pytest.raises(
        UserError, match=r"vae\.discriminator_layers = 4 .* 8 x 64 pixels .* lower it to 3, .*image_size"
    ):
        PatchDiscriminator(8, 4)(torch.rand(1, 3, 8, 64))
    with pytest.raises(UserError, match=r"vae\.discriminator_layers = 5 .* 16 x 16 pixels"):
        PatchDiscriminator.of(VAEConfig(image_size=16, discriminator_layers=5))
    network = PatchDiscriminator.of(VAEConfig(image_size=16, discriminator_layers=2, discriminator_width=12))
    assert network(torch.rand(1, 3, 16, 16)).shape == (1, 1, 4, 4)


def test_hinge_losses():
    real = torch.tensor([[2.0, 1.0], [0.5, -1.0]]).view(2, 1, 1, 2)
    fake = torch.tensor([[-3.0, -1.0], [0.5, -0.5]]).view(2, 1, 1, 2)
    assert hinge_discriminator(real, fake).tolist() == [0.0, pytest.approx((0.5 * (0.5 + 2) + 0.5 * (1.5 + 0.5)) / 2)]
    assert hinge_generator(fake).tolist() == [2.0, 0.0]
    zeros = torch.zeros(3, 1, 4, 4, dtype=torch.bfloat16)
    assert hinge_discriminator(zeros, zeros).tolist() == [1.0] * 3 and hinge_generator(zeros).dtype == torch.float32


def test_it_learns_to_tell_sharp_from_blurred_and_its_verdict_sharpens():
    torch.manual_seed(0)
    network = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(40):
        real = torch.rand(8, 3, 16, 16)
        fake = nn.functional.avg_pool2d(nn.functional.pad(real, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        loss = hinge_discriminator(network(real), network(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    fake.requires_grad_()
    before = hinge_generator(network(fake))
    before.sum().backward()
    assert (hinge_generator(network(fake - 0.05 * fake.grad / fake.grad.abs().mean())) < before).all()
