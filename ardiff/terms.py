"""Loss terms: sums with their counts, so that means over micro-batches and ranks are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# name -> (sum, count), of any equal shape. "loss" is the one that is trained on.
Terms = dict[str, tuple[Tensor, Tensor]]


def mean_terms(parts: list[Terms], all_reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Means over micro-batches and ranks: name -> float, or list of floats (None where nothing was counted).

    One collective on the host, in float64; parts must have the same names in the same order on every rank.
    """
    names = list(parts[0])
    columns = [
        torch.cat([sum(part[name][side].double() for part in parts).flatten() for name in names])  # type: ignore[union-attr]
        for side in (0, 1)
    ]
    totals, counts = all_reduce(torch.stack(columns).cpu())
    result: dict[str, Any] = {}
    start = 0
    for name in names:
        shape = parts[0][name][0].shape
        end = start + shape.numel()
        pairs = zip(totals[start:end].tolist(), counts[start:end].tolist(), strict=True)
        means = [total / count if count else None for total, count in pairs]
        result[name] = means if shape else means[0]
        start = end
    return result
