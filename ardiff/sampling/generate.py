"""From a trained network to latents and pictures: noise by video number, batches, decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.config import Config, ModelConfig
from ardiff.data.latent_space import LatentSpace
from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.randomness import Stream, normals
from ardiff.sampling.sampler import sample

DECODED_FRAMES = 64  # decoded at a time, so that memory does not grow with the video


@dataclass
class Request:
    """What to sample. Video i depends on (seed, first_video + i) only, not on batches."""

    num_videos: int
    num_frames: int
    num_steps: int
    gap: int
    guidance: float = 1.0
    labels: list[int] | None = None  # one per video
    text: Tensor | None = None  # [N, D], features of one text for all videos
    text_tokens: int = 0  # as many as the model was trained with: texts are padded with zeros, and no text is all zeros
    prefix: Tensor | None = None  # [1 or V, P, L, C], latents of the model
    seed: int = 0
    first_video: int = 0
    batch_size: int = 8
    cache: str = "exact"


def generate(
    network: nn.Module, config: Config, request: Request, on_row: Callable[[int, int], None] | None = None
) -> Tensor:
    """Latents of the model [V, F, L, C] on the host, from a network on any device.

    on_row(done, total) reports progress over all batches.
    """
    model = config.model
    device = next(network.parameters()).device
    shape = (request.num_frames, model.tokens_per_frame, model.in_channels)
    starts = range(0, request.num_videos, request.batch_size)
    videos = []
    for number, start in enumerate(starts):
        indices = range(start, min(start + request.batch_size, request.num_videos))
        noise = np.stack([normals(request.seed, Stream.SAMPLES, request.first_video + i, shape) for i in indices])
        label = None
        if request.labels is not None:
            label = torch.tensor([request.labels[i] for i in indices], device=device)
        prefix = None
        if request.prefix is not None:
            chosen = request.prefix if len(request.prefix) == 1 else request.prefix[indices.start : indices.stop]
            prefix = chosen.expand(len(indices), -1, -1, -1).to(device)

        context, no_text = _contexts(request, model, len(indices), device)

        def report(row: int, rows: int, done: int = number) -> None:
            if on_row is not None:
                on_row(done * rows + row, len(starts) * rows)

        latents = sample(
            network,
            torch.from_numpy(noise).to(device),
            request.num_steps,
            request.gap,
            Schedule.from_config(config.diffusion),
            guidance=request.guidance,
            label=label,
            context=context,
            null_context=no_text,
            prefix=prefix,
            cache=request.cache,
            block=model.block,
            on_row=report,
        )
        videos.append(latents.cpu())
    return torch.cat(videos)


def _contexts(
    request: Request, model: ModelConfig, count: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The text features [B, N, D] of a batch and those of no text; None for models without text."""
    if not model.context_dim:
        return None, None
    no_text = torch.zeros(count, request.text_tokens, model.context_dim, device=device)
    context = no_text.clone()
    if request.text is not None:
        context[:, : len(request.text)] = request.text.to(device)
    return context, no_text


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache_mode(model: ModelConfig) -> str:
    """`exact` where finished frames can be cached for this model, else `none`."""
    return "exact" if model.mask != "bidirectional" and model.context == "strict" else "none"


class Decoder:
    """An AR-VAE bound to the latent space that it decodes."""

    def __init__(self, space: LatentSpace, path: str | Path | None = None) -> None:
        from ardiff.training.weights import load_arvae

        source = Path(path or space.arvae_path)
        if not source.exists():
            raise UserError(f"{source}: the AR-VAE of these latents is not there; name it with --arvae or --data.arvae")
        self.space = space
        network, found = load_arvae(source)
        self.network, self.device = network.to(default_device()), default_device()
        if found != space.arvae_id:
            raise UserError(
                f"{source}: AR-VAE {found} cannot decode latents made by AR-VAE {space.arvae_id}; "
                "name that one with --arvae or --data.arvae"
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents of the model [V, F, L, C] -> pictures uint8 [V, F, H, W, 3]."""
        flat = self.space.to_arvae(latents).flatten(0, 1)[None].to(self.device)
        parts = [self.network.decode(flat[:, i : i + DECODED_FRAMES]) for i in range(0, flat.shape[1], DECODED_FRAMES)]
        pixels = torch.cat(parts, dim=1)[0].float().clamp(0, 1).mul(255).round().byte().cpu()
        return pixels.permute(0, 2, 3, 1).unflatten(0, latents.shape[:2]).numpy()

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Pictures uint8 [F, H, W, 3] -> latents of the model [1, F, L, C]."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].to(self.device).float() / 255
        return torch.from_numpy(self.space.to_model(self.network.encode(video).float().cpu().numpy()))
