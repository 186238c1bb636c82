"""Saved states of long generations: a killed program goes on where it was, to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ardiff.errors import UserError
from ardiff.files import replacing
from ardiff.sampling.generate import Request
from ardiff.sampling.rollout import Rollout

FINISHED = "finished"  # latents of the frames that were final


def fingerprint(request: Request, numbers: Sequence[int], network: nn.Module) -> str:
    """Changes when the videos would: settings, seeds, conditions and weights."""
    digest = hashlib.sha256()
    settings = {"sampling": asdict(request.sampling), "num_frames": request.num_frames, "warm": request.warm_frames}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for number in numbers:
        video = request.videos[number]
        digest.update(json.dumps([video.seed, video.label]).encode())
        for part in (video.text, video.prefix, video.ending):
            digest.update(b"-" if part is None else part.float().cpu().contiguous().numpy().tobytes())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.double().sum().item()!r}".encode())
    return digest.hexdigest()


def save(path: Path, rollout: Rollout, finished: Tensor, mark: str) -> None:
    """Write the state of a rollout and the latents [B, n, L, C] that are final, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"state.{name}": tensor for name, tensor in rollout.state().items()}
    tensors[FINISHED] = finished.cpu().contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"fingerprint": mark})


def load(path: Path, rollout: Rollout, mark: str) -> Tensor | None:
    """Restore a rollout; returns the latents [B, n, L, C] that are final, None where nothing was saved.

    Raises UserError for a state of other settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("fingerprint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: a damaged state ({error}); remove it to begin anew") from error
    if found != mark:
        raise UserError(
            f"{path}: the state of another generation (settings, seeds or weights differ); remove it or choose another "
            "--out"
        )
    rollout.restore({name.removeprefix("state."): value for name, value in tensors.items() if name != FINISHED})
    return tensors[FINISHED]


def total_frames(parts: Sequence[Tensor]) -> int:
    """Frames of pieces [B, n, L, C]."""
    return sum(part.shape[1] for part in parts)


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The pieces as one [B, n, L, C]; none of them gives n = 0."""
    return torch.cat(list(parts), dim=1) if parts else like.new_empty(like.shape[0], 0, *like.shape[2:])
