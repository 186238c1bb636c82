"""Between pictures and the latents of a model: an AR-VAE with the normalisation that training used."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError

DECODED_FRAMES = 64  # decoded at a time, so that memory does not grow with the video


def default_device() -> torch.device:
    """This rank's GPU, if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class Decoder:
    """An AR-VAE bound to the latent space that it decodes."""

    def __init__(self, space: LatentSpace, path: str | Path | None = None, device: torch.device | None = None) -> None:
        from ardiff.training.weights import load_arvae

        source = Path(path or space.arvae_path)
        if not source.exists():
            raise UserError(f"{source}: the AR-VAE of these latents is not there; name it with --arvae or --data.arvae")
        self.space, self.device = space, device or default_device()
        network, found = load_arvae(source)
        self.network = network.to(self.device)
        if found != space.arvae_id:
            raise UserError(
                f"{source}: AR-VAE {found} cannot decode latents made by AR-VAE {space.arvae_id}; "
                "name that one with --arvae or --data.arvae"
            )

    @property
    def image_size(self) -> int:
        """Height and width of its pictures."""
        return self.network.config.image_size

    @property
    def by_frame(self) -> bool:
        """Whether a frame is decoded without the others; otherwise videos are decoded one by one, whole."""
        return not getattr(self.network, "temporal", False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents of the model [V, F, L, C] -> pictures uint8 [V, F, H, W, 3]."""
        found = self.space.to_arvae(latents).to(self.device)
        if self.by_frame:
            flat = found.flatten(0, 1)[None]
            pieces = [flat[:, i : i + DECODED_FRAMES] for i in range(0, flat.shape[1], DECODED_FRAMES)]
        else:
            pieces = list(found.split(1))
        pixels = torch.cat([self._pixels(self.network.decode(piece)) for piece in pieces])
        return pixels.permute(0, 2, 3, 1).unflatten(0, latents.shape[:2]).numpy()

    @staticmethod
    def _pixels(video: Tensor) -> Tensor:
        """[1, F, 3, H, W] in [0, 1] -> uint8 [F, 3, H, W] on the host."""
        return video[0].float().clamp(0, 1).mul(255).round().byte().cpu()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Pictures uint8 [F, H, W, 3] -> latents of the model [1, F, L, C]."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].to(self.device).float() / 255
        return torch.from_numpy(self.space.to_model(self.network.encode(video).float().cpu().numpy()))
