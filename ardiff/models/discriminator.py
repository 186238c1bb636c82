"""A discriminator of patches and the hinge losses of both sides (Isola et al. 2017; Lim and Ye 2017)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.config import VAEConfig
from ardiff.errors import UserError

WIDEST = 8  # channels, in multiples of the first layer's
MAX_GROUPS, GROUP_CHANNELS = 32, 4  # of a GroupNorm: groups at most, and channels per group at least


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels: a group of one channel at one place would be normalised to nothing."""
    possible = (groups for groups in range(MAX_GROUPS, 1, -1) if channels % groups == 0)
    return nn.GroupNorm(next((groups for groups in possible if channels // groups >= GROUP_CHANNELS), 1), channels)


def check_size(height: int, width: int, layers: int) -> None:
    """Raise UserError if `layers` halvings leave nothing of a picture."""
    if min(height, width) < 2**layers:
        raise UserError(
            f"vae.discriminator_layers = {layers} halves a picture {layers} times, for which {height} x {width} pixels "
            f"are too few: lower it to {max(min(height, width).bit_length() - 1, 0)}, or raise vae.image_size"
        )


class PatchDiscriminator(nn.Module):
    """Is each patch of a picture real? [N, 3, H, W] in [0, 1] -> logits [N, 1, H / 2^layers, W / 2^layers].

    The PatchGAN of pix2pix (Isola et al. 2017, section 6.1.2): convolutions of kernel 4 with LeakyReLU 0.2, the first
    `layers` of them halve the picture while channels double from `width` up to 8 x `width`, then one more and the
    logits. The padding of the last two makes them keep the size, so that pictures of 2^layers pixels are enough.

    GroupNorm replaces BatchNorm: the logits of a picture depend on that picture alone, hence not on how a batch is
    spread over ranks, and nothing has to be synchronised.

    Raises UserError for smaller pictures.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = layers
        stages: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, layers + 1):
            before, channels = channels, width * min(2**number, WIDEST)
            if number < layers:
                convolution = nn.Conv2d(before, channels, 4, stride=2, padding=1, bias=False)
            else:  # one pixel larger, which the logits' kernel takes away again
                convolution = nn.Conv2d(before, channels, 4, padding=2, bias=False)
            stages += [convolution, group_norm(channels), nn.LeakyReLU(0.2)]
        self.stages = nn.Sequential(*stages)
        self.to_logits = nn.Conv2d(channels, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def of(cls, config: VAEConfig) -> PatchDiscriminator:
        """The discriminator of the configuration. Raises UserError if its pictures are too small for it."""
        check_size(config.image_size, config.image_size, config.discriminator_layers)
        return cls(config.discriminator_width, config.discriminator_layers)

    def forward(self, pictures: Tensor) -> Tensor:
        check_size(pictures.shape[-2], pictures.shape[-1], self.layers)
        return self.to_logits(self.stages((pictures * 2 - 1).to(self.to_logits.weight.dtype)))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits [N, 1, h, w] of real and of decoded pictures -> the discriminator's loss [N], in float32.

    Half the sum of both margins, max(0, 1 - real) and max(0, 1 + fake), each averaged over the patches: 1 for an
    undecided discriminator.
    """
    margins = F.relu(1 - real.float()).mean(dim=(1, 2, 3)) + F.relu(1 + fake.float()).mean(dim=(1, 2, 3))
    return margins / 2


def hinge_generator(fake: Tensor) -> Tensor:
    """Logits [N, 1, h, w] of decoded pictures -> the generator's loss [N] in float32: minus their mean over patches."""
    return -fake.float().mean(dim=(1, 2, 3))
