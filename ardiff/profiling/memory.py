"""Memory of a training run as it is, beside what `ardiff.monitor.estimates` says it would be."""

from __future__ import annotations

import resource

import torch
from torch import Tensor

from ardiff.monitor.memory import GB, host_memory
from ardiff.training.trainer import Trainer


def held(trainer: Trainer) -> dict[str, float]:
    """GiB of the tensors that live through a step, by the kinds of `estimates.memory`: weights, optimizer, ema."""
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.engine.objective.parameters()
    }
    stages = trainer.flat.vectors()
    replicated = trainer.engine.deepspeed.zero_optimization_stage() == 0
    ranks = trainer.world.size if replicated else 1  # whose slices are views of whole vectors
    states = [vector for name, vectors in stages.items() for vector in vectors if not (replicated and name == "master")]
    return {
        "weights": sum(weights.values()) / GB,
        "optimizer": ranks * _bytes(states) / GB,
        "ema": _bytes([part for vector in trainer.ema.vectors().values() for part in vector]) / GB,
    }


def _bytes(tensors: list[Tensor | None] | list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def reset_peak(device: torch.device) -> None:
    """Peaks count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """GiB: on a GPU the most that was allocated since `reset_peak`, elsewhere the most this process ever held (program
    and libraries included).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def room_gb(device: torch.device, ranks_here: int) -> float | None:
    """GiB that a rank may use in all: of its GPU, or its share of the host's; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GB
    found = host_memory()
    return None if found is None else found.rss_gb + found.available_gb / ranks_here
