"""ZeRO stage 0: every rank keeps and updates all master weights and moments, in fp32.

DeepSpeed runs forward, backward and the all-reduce of gradients; clipping, the check for non-finite gradients and the
update are here. The state lies in flat vectors that are cut into one slice per rank, as ZeRO-1/2 cuts them, so that
checkpoints and averages treat all stages alike.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ardiff.training.adamw import FreezingAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReplicatedAdamW:
    """AdamW over one flat fp32 vector per parameter group, of which the model's parameters become views.

    What it shows to DeepSpeed: `param_groups`, `step`, `overflow`, `_global_grad_norm`. What it shows to the training
    state, under ZeRO's names: this rank's slices of the vectors (`single_partition_of_fp32_groups`, views), their
    size, the parameters and their offsets in the vectors, `update_lp_params`, and in `optimizer` the settings of the
    groups and Adam's state of the slices.

    groups: as for torch.optim.AdamW; the parameters are on their device and equal on all ranks.
    clip: largest norm of the gradient of all groups together, 0 for no limit.
    settings: of torch.optim.AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], clip: float, rank: int, world_size: int, **settings: Any) -> None:
        self.clip, self.rank = clip, rank
        self.round_robin_bit16_groups: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self.round_robin_bit16_offsets: list[list[int]] = []
        self.partition_size: list[int] = []
        self._vectors = [self._flatten(parameters, world_size) for parameters in self.round_robin_bit16_groups]
        self._adam = FreezingAdamW(
            [{**group, "params": [vector]} for group, vector in zip(groups, self._vectors, strict=True)], **settings
        )
        for vector, group in zip(self._vectors, self._adam.param_groups, strict=True):
            self._adam.state[vector] = {
                "step": torch.zeros((), device=vector.device if group.get("fused") else "cpu"),
                **{name: torch.zeros_like(vector) for name in MOMENTS},
            }
        self.single_partition_of_fp32_groups = [self._slice(g, vector) for g, vector in enumerate(self._vectors)]
        self.optimizer = SimpleNamespace(param_groups=self.param_groups, state={})
        self._views = [self._show_state(group) for group in range(len(self._vectors))]
        self.overflow = False
        self._global_grad_norm: Tensor | float = 0.0

    def _flatten(self, parameters: list[nn.Parameter], world_size: int) -> Tensor:
        """Parameters end to end in one vector, padded with zeros to a multiple of the ranks."""
        first, offset, offsets = parameters[0], 0, []
        for parameter in parameters:
            offsets.append(offset)
            offset += parameter.numel()
        size = -(-offset // world_size)
        vector = torch.zeros(size * world_size, dtype=torch.float32, device=first.device)
        for parameter, start in zip(parameters, offsets, strict=True):
            view = vector[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
        self.round_robin_bit16_offsets.append(offsets)
        self.partition_size.append(size)
        return vector

    def _slice(self, group: int, vector: Tensor) -> Tensor:
        size = self.partition_size[group]
        return vector[self.rank * size : (self.rank + 1) * size]

    def _show_state(self, group: int) -> dict[str, Tensor]:
        """Adam's state of this rank's slice, as views of the whole."""
        whole = self._adam.state[self._vectors[group]]
        views = {"step": whole["step"], **{name: self._slice(group, whole[name]) for name in MOMENTS}}
        self.optimizer.state[self.single_partition_of_fp32_groups[group]] = views
        return views

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings by group, of which `lr` may be set."""
        return self._adam.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Update everything on every rank, or nothing where a gradient is not finite.

        Gradients are those of the parameters, equal on all ranks: so is all that follows from them.
        """
        gradients = [p.grad for parameters in self.round_robin_bit16_groups for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = not math.isfinite(norm.item())
        self._global_grad_norm = math.inf if self.overflow else norm
        del gradients
        if self.overflow:
            return
        shrink = torch.clamp((norm + 1e-6) / self.clip, min=1.0) if self.clip > 0 else None  # as ZeRO does
        for parameters, offsets, vector in zip(
            self.round_robin_bit16_groups, self.round_robin_bit16_offsets, self._vectors, strict=True
        ):
            vector.grad = torch.zeros_like(vector)
            for parameter, start in zip(parameters, offsets, strict=True):
                if parameter.grad is not None:
                    vector.grad[start : start + parameter.numel()].copy_(parameter.grad.flatten())
                    parameter.grad = None
            if shrink is not None:
                vector.grad.mul_(1.0 / shrink)
        self._adam.step()
        for vector in self._vectors:
            vector.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameters in self.round_robin_bit16_groups:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Gather what the ranks have written into their slices (collective): weights, and Adam's state if it was
        assigned anew on all of them.
        """
        for group, vector in enumerate(self._vectors):
            self._gather(vector, self.single_partition_of_fp32_groups[group])
            shown = self.optimizer.state[self.single_partition_of_fp32_groups[group]]
            if shown is not self._views[group]:
                whole = self._adam.state[vector]
                whole["step"].copy_(shown["step"])
                for name in MOMENTS:
                    self._gather(whole[name], shown[name])
                self._views[group] = self._show_state(group)

    @staticmethod
    def _gather(whole: Tensor, own: Tensor) -> None:
        dist.all_gather_into_tensor(whole, own.clone())
