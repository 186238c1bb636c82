"""Between pictures and the latents of a model: an AR-VAE with the normalisation that training used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.models.arvae import as_pictures
from ardiff.models.temporal import TemporalCache

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

    def decode(self, latents: Tensor, cache: TemporalCache | None = None) -> np.ndarray:
        """Latents of the model [V, F, L, C] -> pictures uint8 [V, F, H, W, 3].

        With a cache (needed by temporal AR-VAEs alone) they continue the videos that it has seen.
        """
        if self.network.temporal and cache is None:  # one by one: the cache of a video is large
            return np.concatenate([self.decode(video, TemporalCache()) for video in latents.split(1)])
        batch = latents if self.network.temporal else latents.flatten(0, 1)[None]  # frames of all videos are alike
        found = np.concatenate(list(self._pieces(batch, cache)), axis=1)
        return found.reshape(*latents.shape[:2], *found.shape[2:])

    def pick(self, latents: Tensor, places: Sequence[int]) -> np.ndarray:
        """The pictures uint8 [len(places), H, W, 3] at some places, in order, of a video with these latents [F, L, C].

        A temporal AR-VAE decodes the frames before them as well, a few at a time.
        """
        if not self.network.temporal:
            return self.decode(latents[list(places)][None])[0]
        chosen, first = [], 0
        for (piece,) in self._pieces(latents[None, : max(places) + 1], TemporalCache()):
            chosen += [piece[place - first] for place in places if first <= place < first + len(piece)]
            first += len(piece)
        return np.stack(chosen)

    @torch.no_grad()
    def _pieces(self, latents: Tensor, cache: TemporalCache | None) -> Iterator[np.ndarray]:
        """Pictures [V, f, H, W, 3] of a few frames of all videos at a time."""
        for piece in latents.split(max(1, DECODED_FRAMES // len(latents)), dim=1):
            yield as_pictures(self.network.decode(self.space.to_arvae(piece).to(self.device), cache))

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Pictures uint8 [F, H, W, 3] -> latents of the model [1, F, L, C]."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].to(self.device).float() / 255
        return torch.from_numpy(self.space.to_model(self.network.encode(video).float().cpu().numpy()))
