"""What an auto-encoder does with its latents: their spread per channel and how many dimensions they really use."""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 0.01  # a number whose variance is at most this share of the median variance carries next to nothing
ROUNDING = 1e-12  # variance that float32 alone gives numbers of tokens of length 1


def effective_rank(covariance: Tensor) -> float:
    """The effective rank of a covariance matrix [D, D] (Roy & Vetterli 2007, definition 1): between 1 and D.

    exp of the entropy (in nats) of the eigenvalues, which are made to sum to 1: D for equal ones, k for k equal ones
    beside zeros. 0 for a covariance of zero, NaN where it is not finite.
    """
    if not bool(covariance.isfinite().all()):
        return float("nan")
    values = torch.linalg.eigvalsh(covariance.double()).clamp(min=0)
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


class LatentStatistics:
    """Statistics of latents [..., L, C], taken in batch by batch; all sums in float64.

    The latents are brought to length 1 per token first, as the decoder (and by default the diffusion model) does: only
    their direction counts, and a channel that merely follows the length of the tokens carries nothing. The length
    itself, which matters beside the noise of the posterior, is reported as `length`.
    """

    def __init__(self) -> None:
        self.count = 0  # frames
        self._length = 0.0  # sum over tokens
        self._origin = self._total = self._products = torch.zeros(0)
        self._shape = (0, 0)

    def add(self, latents: Tensor) -> None:
        """Take in latents [..., L, C] as the encoder gives them. Raises ValueError for another L or C than before."""
        tokens = latents.detach().flatten(0, -3).double().cpu()  # [N, L, C]
        if not len(tokens):
            return
        lengths = tokens.norm(dim=-1, keepdim=True)
        frames = (tokens / lengths.clamp(min=1e-12)).flatten(1)  # [N, L*C]
        if not self.count:
            self._shape = (tokens.shape[1], tokens.shape[2])
            self._origin = frames.mean(0)  # sums around it keep their digits
            self._total = torch.zeros_like(self._origin)
            self._products = torch.zeros(frames.shape[1], frames.shape[1], dtype=torch.float64)
        elif (tokens.shape[1], tokens.shape[2]) != self._shape:
            raise ValueError(f"latents of {tuple(tokens.shape[1:])} numbers a frame after some of {self._shape}")
        frames = frames - self._origin
        self.count += len(frames)
        self._length += float(lengths.sum())
        self._total += frames.sum(0)
        self._products += frames.T @ frames

    @property
    def numbers(self) -> int:
        """Numbers per frame, L*C."""
        return self._shape[0] * self._shape[1]

    def covariance(self) -> Tensor:
        """The covariance of the frames' vectors, population form: float64 [L*C, L*C]."""
        mean = self._total / self.count
        return self._products / self.count - torch.outer(mean, mean)

    def result(self) -> dict[str, float | list[float]]:
        """The statistics, ready for JSON. Raises ValueError if nothing was added.

        latent_mean, latent_std: per channel [C], over all frames and tokens.
        effective_rank: of the covariance of the frames' vectors of L*C numbers; at most min(frames - 1, L*C).
        dead_channels: share of the L*C numbers of a frame whose variance over the frames is at most 1 % of the median
        variance of the L*C numbers (1 if no number varies).
        latent_length: mean Euclidean length of a token before it is brought to 1.
        """
        if not self.count:
            raise ValueError("statistics need at least one frame of latents")
        covariance, (num_tokens, channels) = self.covariance(), self._shape
        variance = covariance.diagonal()  # [L*C]
        if float(variance.max()) < ROUNDING:  # every frame has the same latents
            covariance = torch.zeros_like(covariance)
            variance = covariance.diagonal()
        per_number = (self._origin + self._total / self.count).reshape(num_tokens, channels)
        mean = per_number.mean(0)
        second = (variance.clamp(min=0).reshape(num_tokens, channels) + (per_number - mean).square()).mean(0)
        return {
            "latent_mean": mean.tolist(),
            "latent_std": second.sqrt().tolist(),
            "effective_rank": effective_rank(covariance),
            "dead_channels": float((variance <= DEAD * variance.median()).double().mean()),
            "latent_length": self._length / (self.count * num_tokens),
        }
