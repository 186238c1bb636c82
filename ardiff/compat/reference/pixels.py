"""The convolutional decoder of MaskGIT-VQGAN, which turns embedded codes into pixels."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 128
MULTIPLES = (1, 1, 2, 2, 4)  # of WIDTH, by level; level 0 has the full resolution
BLOCKS = 2


class ResBlock(nn.Module):
    """Two convolutions with a residual.

    Where the width changes, the shortcut reads the output of the convolutions instead of the input, which is lost:
    a slip in the code that the weights were trained with.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C', h, w]."""
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (x if self.nin_shortcut is None else self.nin_shortcut(out))


class Level(nn.Module):
    """Residual blocks of one resolution, then twice the resolution unless it is the last."""

    def __init__(self, channels: int, out_channels: int, upsample: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * BLOCKS
        self.block = nn.ModuleList(ResBlock(before, after) for before, after in pairwise(widths))
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C', 2h, 2w] (or h, w)."""
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelDecoder(nn.Module):
    """Embedded codes [N, C, h, w] -> frames [N, 3, 16h, 16w]."""

    def __init__(self, code_width: int) -> None:
        super().__init__()
        widths = [WIDTH * multiple for multiple in MULTIPLES]
        self.conv_in = nn.Conv2d(code_width, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(BLOCKS))
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(Level(inputs[level], widths[level], level > 0) for level in range(len(widths)))
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Levels from the coarsest to the finest."""
        x = self.conv_in(codes)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
