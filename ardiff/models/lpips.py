"""LPIPS (Zhang et al. 2018): the distance of pictures in the features of VGG-16, with weights from a local file.

Nothing is downloaded, ever: the network is built here and its weights are read from the file of `vae.lpips`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ardiff.errors import UserError
from ardiff.metrics.structure import wide_enough

LISTED = 3  # names in a message
RECIPE = (
    "make the file where the lpips package is installed: "
    "python -c \"import lpips, torch; torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips_vgg.pth')\""
)
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG-16
SMALLEST = 16  # pixels of a side, which four of the blocks halve
FIRST = "net.slice1.0.weight"


def _convolutions() -> list[list[tuple[str, int, int]]]:
    """Per block: (name in the file, input channels, output channels) of each 3 x 3 convolution."""
    blocks, place, channels = [], 0, 3
    for number, widths in enumerate(BLOCKS, start=1):
        block = []
        for width in widths:
            block.append((f"net.slice{number}.{place}", channels, width))
            place, channels = place + 2, width  # the convolution and its ReLU
        blocks.append(block)
        place += 1  # the pooling that opens the next block
    return blocks


def check_size(height: int, width: int) -> None:
    """Raise UserError for pictures that the blocks would halve to nothing."""
    if min(height, width) < SMALLEST:
        raise UserError(
            f"vae.lpips needs pictures of at least {SMALLEST} x {SMALLEST} pixels, not {height} x {width}: leave it "
            "out (vae.perceptual = structure), or raise vae.image_size"
        )


class LPIPS(nn.Module):
    """Perceptual distance of pictures a and b, each [N, 3, H, W] in about [0, 1] -> [N], each frame by itself.

    Zhang et al. 2018, equation 1, with VGG-16: squared differences of the channel-normalised features after each of
    the five blocks, weighted per channel, averaged over places and added up. The input is mapped to [-1, 1], which
    is what the published weights expect. There is no dropout, so that training and evaluation mode are the same; the
    weights are frozen and gradients flow to the pictures only. In bfloat16 the convolutions run in it, the distances
    of the features in float32.

    path: a local file, .safetensors, or .pth, .pt, .bin (read without running what is pickled there), with the state
    dict of `lpips.LPIPS(net="vgg")` or of the LPIPS of taming-transformers, with or without a prefix such as
    `perceptual_loss.` or `module.`; what stands beside it is left out.

    Raises UserError that names vae.lpips and the file and says how to make one, and for pictures of fewer than 16
    pixels.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        with torch.device("meta"):  # the numbers come from the file, and nothing is drawn from the global generator
            self.blocks = nn.ModuleList(
                nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for _, inputs, outputs in block)
                for block in _convolutions()
            )
            self.channel_weights = nn.ParameterList(torch.empty(1, widths[-1], 1, 1) for widths in BLOCKS)
            self.shift = nn.Parameter(torch.empty(1, 3, 1, 1))
            self.scale = nn.Parameter(torch.empty(1, 3, 1, 1))
        found = _read(Path(path), {name: value.shape for name, value in self.state_dict().items()})
        self.load_state_dict({name: value.float() for name, value in found.items()}, assign=True)
        # All of it parameters, which are frozen: they belong neither to the optimizer nor to a checkpoint.
        self.requires_grad_(False)
        self.eval()

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [N, 3, H, W] in [0, 1] -> per block [N, C, h, w], of length 1 at each place."""
        x = (pictures * 2 - 1 - self.shift) / self.scale
        x = x.to(self.shift.dtype)
        found = []
        for number, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if number else x
            assert isinstance(block, nn.ModuleList)
            for convolution in block:
                x = convolution(x).relu()
            wide = wide_enough(x)
            # The square root has no finite gradient at 0, the length where no channel responds.
            length = wide.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt()
            found.append(wide / (length + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        check_size(a.shape[-2], a.shape[-1])
        distances = []
        for ours, theirs, weight in zip(self.features(a), self.features(b), self.channel_weights, strict=True):
            squared = (ours - theirs).square().mean(dim=(2, 3))  # [N, C]
            distances.append(squared @ weight.flatten().to(squared.dtype))
        return torch.stack(distances).sum(dim=0)


def file_names() -> dict[str, str]:
    """Name in LPIPS -> name in the file, which is that of the `lpips` package and of taming-transformers."""
    names = {"shift": "scaling_layer.shift", "scale": "scaling_layer.scale"}
    for number, block in enumerate(_convolutions()):
        names[f"channel_weights.{number}"] = f"lin{number}.model.1.weight"
        for place, (name, _, _) in enumerate(block):
            for part in ("weight", "bias"):
                names[f"blocks.{number}.{place}.{part}"] = f"{name}.{part}"
    return names


def _read(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of the file under the names of LPIPS, which has `shapes`."""
    from ardiff.compat.reference.state_dict import read_checkpoint  # it needs the models: not at the top

    if not path.is_file():
        raise UserError(f"vae.lpips = {path}: no such file; {RECIPE}")
    try:
        stored = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"vae.lpips = {error}; {RECIPE}") from error
    prefixes = {name.removesuffix(FIRST) for name in stored if name == FIRST or name.endswith(f".{FIRST}")}
    prefix = min(prefixes, default="")
    names = file_names()
    found = {name: stored[prefix + key] for name, key in names.items() if prefix + key in stored}
    problems = [f"{names[name]} is missing" for name in shapes if name not in found]
    for name, value in found.items():
        if value.shape != shapes[name]:
            problems.append(f"{names[name]} is {tuple(value.shape)} instead of {tuple(shapes[name])}")
        elif value.layout != torch.strided or not value.is_floating_point():
            problems.append(f"{names[name]} is no dense tensor of floating-point numbers")
        elif not value.isfinite().all():
            problems.append(f"{names[name]} is not finite")
    if len(prefixes) > 1:
        problems = [f"it holds several, under {', '.join(sorted(map(repr, prefixes)))}"]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(
            f"vae.lpips = {path}: not one LPIPS with VGG-16 ({', '.join(problems[:LISTED])}{more}); {RECIPE}"
        )
    return found
