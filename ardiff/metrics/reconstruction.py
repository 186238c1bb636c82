"""How close an auto-encoder's reconstructions are to the originals: in each frame, and from frame to frame.

Pictures have values in [0, 1]; reconstructions are clamped to that range, as they are when they are saved, but not
rounded to 8 bits. What is reported is the mean over frames of a figure per frame. So the PSNR is the mean over frames
of a frame's PSNR in dB, which is at least the PSNR of the mean squared error over all frames.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.metrics.latents import LatentStatistics
from ardiff.metrics.structure import ssim
from ardiff.models.temporal import TemporalCache

HIGHEST_PSNR = 100.0  # dB: what equal frames are given, and the most that any frame is
PIECE = 64  # frames that are encoded, decoded and measured at a time

Distance = Callable[[Tensor, Tensor], Tensor]  # pictures [N, 3, H, W] in [0, 1], twice -> [N]: LPIPS


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the pictures a and b [N, 3, H, W], clamped to [0, 1] -> dB per frame, float64 [N].

    10 log10(1 / mean squared error), at most 100 dB, which is what equal frames get. To report: the mean over frames.
    """
    difference = a.float().clamp(0, 1) - b.float().clamp(0, 1)
    error = difference.square().flatten(1).mean(1).double()
    return -10 * error.clamp(min=10 ** (-HIGHEST_PSNR / 10)).log10()


def gradient_energy(frames: Tensor) -> Tensor:
    """Sharpness of frames [N, 3, H, W]: mean squared difference of neighbouring pixels -> float64 [N].

    The sum of the mean over pairs side by side and of the mean over pairs one above the other. A blurred picture has
    less of it than its original, one with noise or invented texture has more.
    """
    frames = frames.float()
    down, right = (frames.diff(dim=axis).square().flatten(1).double() for axis in (2, 3))
    return down.sum(1) / max(1, down.shape[1]) + right.sum(1) / max(1, right.shape[1])


def flicker(original: Tensor, reconstruction: Tensor) -> Tensor:
    """What a decoder adds in time: videos [B, F, 3, H, W] in [0, 1] -> float64 [B, F - 1], one for each pair of frames.

    mean |(r[i+1] - r[i]) - (x[i+1] - x[i])| over pixels and colours, of the original x and the reconstruction r: the
    change from frame to frame that is not in the original. 0 for errors that stand still, however large they are.
    """
    error = reconstruction.float() - original.float()
    return error.diff(dim=1).abs().flatten(2).mean(2).double()


class Scores:
    """Sums of all measures over frames, one video after the other; `merge` adds up those of several."""

    def __init__(self, lpips: Distance | None = None) -> None:
        self.lpips = lpips
        self.frames = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._before: tuple[Tensor, Tensor] | None = None  # the last frames of the video, [1, 3, H, W] each

    def add(self, original: Tensor, rebuilt: Tensor) -> None:
        """Take in the next frames [n, 3, H, W] of a video and their reconstruction."""
        rebuilt = rebuilt.float().clamp(0, 1)
        found = {
            "psnr": psnr(original, rebuilt),
            "ssim": ssim(original, rebuilt),
            "gradient_energy": gradient_energy(rebuilt),
            "original_gradient_energy": gradient_energy(original),
        }
        if self.lpips is not None:
            found["lpips"] = self.lpips(original, rebuilt)
        before = self._before or (original[:0], rebuilt[:0])
        video = [torch.cat(parts)[None] for parts in zip(before, (original, rebuilt), strict=True)]
        found["flicker"] = flicker(*video)
        self._before = original[-1:], rebuilt[-1:]
        self.frames += len(original)
        for name, values in found.items():
            self._sums[name] += float(values.double().sum())
            self._counts[name] += values.numel()

    def merge(self, other: Scores) -> None:
        """Add the frames of another video."""
        self.frames += other.frames
        for name in other._sums:
            self._sums[name] += other._sums[name]
            self._counts[name] += other._counts[name]

    def means(self) -> dict[str, float]:
        """psnr (dB), ssim, lpips (if there is one), gradient_energy of the reconstructions, original_gradient_energy,
        gradient_energy_ratio (of the two) and flicker.

        What has no value is left out: flicker without two frames in a row, the ratio where the originals are flat.
        """
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        if means.get("original_gradient_energy"):
            means["gradient_energy_ratio"] = means["gradient_energy"] / means["original_gradient_energy"]
        return means


class Piece(NamedTuple):
    """Frames [n, 3, H, W] of a video in [0, 1], their reconstruction (not clamped) and their latents [n, L, C]."""

    original: Tensor
    rebuilt: Tensor
    latents: Tensor


class Reconstruction:
    """An auto-encoder at work on whole videos; `frames` and `seconds` tell how fast it encodes and decodes."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self.device = next(network.parameters()).device
        self.frames, self.seconds = 0, 0.0

    def pieces(self, video: np.ndarray) -> Iterator[Piece]:
        """A video uint8 [F, H, W, 3], at most 64 frames at a time."""
        return self.stream(video[first : first + PIECE] for first in range(0, len(video), PIECE))

    @torch.no_grad()
    def stream(self, parts: Iterable[np.ndarray]) -> Iterator[Piece]:
        """The parts uint8 [n, H, W, 3] of a video, in order from its first frame on, one by one."""
        cache = TemporalCache()  # a temporal decoder reads the parts before as well
        for part in parts:
            original = torch.from_numpy(part).to(self.device).permute(0, 3, 1, 2).float() / 255
            begin = self._now()
            latents = self.network.encode(original[None])
            rebuilt = self.network.decode(latents, cache)
            self.seconds += self._now() - begin
            self.frames += len(original)
            yield Piece(original, rebuilt[0].float(), latents[0].float())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def reconstruction_metrics(
    network: nn.Module, videos: Iterable[np.ndarray], lpips: Distance | None = None
) -> dict[str, float | list[float]]:
    """How well an auto-encoder (encode and decode as of ARVAE) rebuilds videos uint8 [F, H, W, 3] of its frame size.

    psnr, ssim, lpips, gradient_energy, original_gradient_energy, gradient_energy_ratio and flicker as in
    `Scores.means`; latent_mean, latent_std, effective_rank, dead_channels and latent_length as in
    `LatentStatistics.result`. On the network's device, without gradients, in evaluation mode and in pieces of at most
    64 frames. Raises ValueError for no videos.
    """
    was_training = network.training
    network.eval()
    try:
        work, total, statistics = Reconstruction(network), Scores(lpips), LatentStatistics()
        with torch.no_grad():
            for video in videos:
                scores = Scores(lpips)
                for piece in work.pieces(video):
                    scores.add(piece.original, piece.rebuilt)
                    statistics.add(piece.latents)
                total.merge(scores)
    finally:
        network.train(was_training)
    return {**total.means(), **statistics.result()}
