"""Between latents as the AR-VAE gives them and latents as the diffusion model sees them, and what decodes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ardiff.data.shards import Manifest
from ardiff.errors import UserError


@dataclass
class LatentSpace:
    """Kept in every checkpoint, so that a model can be sampled where its data are not.

    normalize: `unit`, every token to length 1 (the decoder does the same, so nothing is lost); `standardize`,
    per-channel mean 0 and deviation 1; `none`.
    """

    normalize: str
    mean: list[float]  # per channel, of the data set
    std: list[float]
    arvae_id: str
    arvae_path: str
    fps: float | None  # of the latents: the source's, divided by the stride
    stride: int  # every how-manieth frame of the source was encoded
    classes: list[str]
    text_tokens: int = 0  # of the longest text; shorter ones are padded with zeros
    sampled_fps: str | None = None  # frames were taken at this rate, a fraction, instead of every stride-th

    @classmethod
    def of(cls, manifest: Manifest, normalize: str) -> LatentSpace:
        """The latent space of a folder of latent shards."""
        try:
            return cls._from(manifest.details, manifest.classes, normalize)
        except (KeyError, TypeError) as error:
            raise UserError(f"{manifest.folder / 'manifest.json'}: not a manifest of latents ({error!r})") from error

    @classmethod
    def _from(cls, details: dict[str, Any], classes: list[str], normalize: str) -> LatentSpace:
        return cls(
            normalize,
            details["mean"],
            details["std"],
            details["arvae"]["id"],
            details["arvae"]["path"],
            details.get("fps"),
            details.get("stride", 1),
            classes,
            details.get("text_tokens", 0),
            details.get("sampled_fps"),
        )

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint; `LatentSpace(**value)` reads it back."""
        return asdict(self)

    def to_model(self, latents: np.ndarray) -> np.ndarray:
        """Latents [..., C] of the AR-VAE -> latents of the model, float32."""
        latents = latents.astype(np.float32, copy=False)
        if self.normalize == "unit":
            return latents / np.maximum(np.linalg.norm(latents, axis=-1, keepdims=True), 1e-6)
        if self.normalize == "standardize":
            std = np.maximum(np.asarray(self.std, dtype=np.float32), 1e-6)
            return (latents - np.asarray(self.mean, dtype=np.float32)) / std
        return latents

    def to_arvae(self, latents: Tensor) -> Tensor:
        """Latents [..., C] of the model -> latents that the AR-VAE decodes."""
        if self.normalize != "standardize":
            return latents
        std = torch.tensor(self.std).clamp(min=1e-6)
        return latents * std.to(latents) + torch.tensor(self.mean).to(latents)
