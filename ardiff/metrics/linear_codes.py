"""Linear codes of single frames: what an auto-encoder with as many numbers per frame has to beat.

Each takes frames [N, 3, H, W] in [0, 1] to their reconstructions (not clamped) from `numbers` numbers per frame that
are not quantised. `fit` learns from training frames uint8 [N, H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ardiff.data.dataset import ShardSet

MOST_BYTES = 1 << 28  # of the frames that a code is fitted on
CHUNK = 1 << 23  # numbers that are converted to float64 at a time


class Code(Protocol):
    """A code of single frames."""

    @property
    def numbers(self) -> int:
        """Numbers per frame."""

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Frames [N, 3, H, W] in [0, 1] -> their reconstructions."""


class MeanColour:
    """Each frame's mean colour everywhere."""

    numbers = 3

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] -> reconstructions."""
        return frames.mean(dim=(2, 3), keepdim=True).expand_as(frames)


class PCA:
    """The principal components of frames: the best linear code of its size for the frames it was fitted on.

    mean [D], components [n, D], of frames flattened to D = 3 * H * W numbers.
    """

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components

    @classmethod
    def fit(cls, frames: np.ndarray, numbers: int) -> PCA:
        """The first `numbers` components of frames uint8 [N, H, W, 3], or as many as these frames have.

        From the eigenvectors of the Gram matrix [N, N] or the covariance [D, D], whichever is smaller, in float64.
        """
        data = torch.from_numpy(frames).permute(0, 3, 1, 2).flatten(1)  # uint8 [N, D]
        count, size = data.shape
        mean = torch.cat([part.mean(0) for _, part in _columns(data)])
        gram = torch.zeros(min(count, size), min(count, size), dtype=torch.float64)
        if count <= size:
            for place, part in _columns(data):
                centred = part - mean[place]
                gram += centred @ centred.T
        else:
            for part in _rows(data):
                centred = part - mean
                gram += centred.T @ centred
        values, vectors = torch.linalg.eigh(gram)
        rank = int((values > values[-1].clamp(min=1e-6) * 1e-12).sum())
        vectors = vectors.flip(1)[:, : min(numbers, rank)]
        if count <= size:  # from frames to pixels; each vector sums to 0, so the mean drops out
            vectors = torch.cat([part.T @ vectors for _, part in _columns(data)])
            vectors = vectors / vectors.norm(dim=0).clamp(min=1e-12)
        return cls(mean.float(), vectors.T.contiguous().float())

    @property
    def numbers(self) -> int:
        """Numbers per frame."""
        return len(self.components)

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] -> reconstructions."""
        self.mean, self.components = self.mean.to(frames), self.components.to(frames)
        code = (frames.flatten(1) - self.mean) @ self.components.T  # [N, n]
        return (self.mean + code @ self.components).reshape(frames.shape)


class LargestBlockDCT:
    """The discrete cosine transform (DCT-II, orthonormal) of the whole frame as one block, the largest there is.

    The colours are transformed in the same way, which makes brightness and two colour differences of them (R + G + B,
    R - B and R - 2G + B, orthonormal, close to Ohta's I1, I2, I3): energies then add up to squared error in RGB. Of the
    coefficients those with the most mean energy in the training frames are kept; they are those of low frequencies,
    most of them of brightness. kept: bool [3, H, W].
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self._bases = [dct_matrix(size) for size in kept.shape]

    @classmethod
    def fit(cls, frames: np.ndarray, numbers: int) -> LargestBlockDCT:
        """Keep the `numbers` coefficients with the largest mean square over frames uint8 [N, H, W, 3]."""
        height, width = frames.shape[1:3]
        energy = torch.zeros(3, height, width, dtype=torch.float64)
        bases = [dct_matrix(size).float() for size in energy.shape]
        for part in _rows(torch.from_numpy(frames).permute(0, 3, 1, 2)):
            energy += _transform(part.float(), bases).square().sum(0)
        chosen = energy.flatten().topk(min(numbers, energy.numel())).indices
        kept = torch.zeros(energy.numel(), dtype=torch.bool)
        kept[chosen] = True
        return cls(kept.reshape(energy.shape))

    @property
    def numbers(self) -> int:
        """Numbers per frame."""
        return int(self.kept.sum())

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] -> reconstructions."""
        bases = [basis.to(frames) for basis in self._bases]
        code = _transform(frames, bases) * self.kept.to(frames.device)
        return _transform(code, [basis.T for basis in bases])


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix float64 [size, size]: row k holds frequency k."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * places[:, None] * (places + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def _transform(frames: Tensor, bases: list[Tensor]) -> Tensor:
    """A matrix applied along each of the last three axes of [N, 3, H, W]."""
    colour, rows, columns = bases
    return torch.einsum("dc,nchw->ndhw", colour, rows @ frames @ columns.T)


def _columns(data: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of uint8 [N, D] as float64 in [0, 1], some at a time, and which they are."""
    step = max(1, CHUNK // len(data))
    for first in range(0, data.shape[1], step):
        place = slice(first, first + step)
        yield place, data[:, place].double() / 255


def _rows(data: Tensor) -> Iterator[Tensor]:
    """Rows of uint8 [N, ...] as float64 in [0, 1], some at a time."""
    for part in data.split(max(1, CHUNK // data[0].numel())):
        yield part.double() / 255


def random_frames(shards: ShardSet, count: int, seed: int) -> np.ndarray:
    """Up to `count` frames of a data set, each at most once, that fit into 256 MiB: uint8 [N, H, W, 3]."""
    size = shards.manifest.details["size"]
    first = np.concatenate([[0], np.cumsum(shards.frames)])
    count = min(count, int(first[-1]), max(2, MOST_BYTES // (3 * size * size)))
    chosen = np.sort(np.random.default_rng(seed).choice(int(first[-1]), count, replace=False))
    videos = np.searchsorted(first, chosen, side="right") - 1
    frames = np.empty((count, size, size, 3), dtype=np.uint8)
    for number, (video, place) in enumerate(zip(videos.tolist(), (chosen - first[videos]).tolist(), strict=True)):
        frames[number] = shards.read_frames(video, place, 1)[0]
    return frames
