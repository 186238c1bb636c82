"""AdamW with groups of parameters that may be frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ardiff.models.temporal import is_temporal


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups in the order of `named_parameters`: matrices decay, vectors (biases, norms) do not; those that read other
    frames (a temporal decoder's) follow in groups of their own, which may be frozen apart from the rest.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if is_temporal(name) == temporal and (p.ndim >= 2) == decays],
            "decay": decays,
        }
        for temporal in (False, True)
        for decays in (True, False)
    ]
    return [
        {"params": group["params"], "weight_decay": weight_decay if group["decay"] else 0.0}
        for group in groups
        if group["params"]
    ]


class FreezingAdamW(torch.optim.AdamW):
    """AdamW that leaves groups with a learning rate of 0 alone: frozen parameters keep moments and step count."""

    def step(self, closure: Any = None) -> Any:
        """One step of the groups that learn."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if group["lr"] > 0]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    DeepSpeed compares the type of every optimizer with Muon, and a decorator in that module loads the whole compiler:
    2 s of every start, for an optimizer that ardiff never uses.
    """

    def leave(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    with patch.object(torch, "compile", leave):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
