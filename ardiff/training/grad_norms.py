"""Gradient norms by layer, of the gradients that an optimizer is about to use."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ardiff.training.distributed import World
from ardiff.training.replicated import ReplicatedAdamW

_WRAPPERS = re.compile(r"^(network\.)?(dit\.)?")
_NUMBERED = re.compile(r"(\w+)\.(\d+)\.")  # blocks.3.mlp.0.weight
_NUMBERED_INSIDE = re.compile(r"(\w+\.\w+)\.(\d+)\.\w+\.\w")  # encoder.transformer.3.mlp.weight, not t_embed.mlp.0.bias


def layer_of(name: str) -> str:
    """The layer of a parameter: `blocks.03` in a stack, also `encoder.transformer.03`; the part it is in elsewhere.

    name: in the objective or in the network.
    """
    name = _WRAPPERS.sub("", name)
    numbered = _NUMBERED.match(name) or _NUMBERED_INSIDE.match(name)
    return f"{numbered[1]}.{int(numbered[2]):02d}" if numbered else name.partition(".")[0]


class LayerNorms:
    """Squared gradient norms by layer under one optimizer, ZeRO's or ours.

    names: id of a parameter -> its name. prefix: what names of layers begin with.
    """

    def __init__(self, optimizer: Any, names: dict[int, str], rank: int, prefix: str = "") -> None:
        self._optimizer, self._rank = optimizer, rank
        self._layer = {id(p): layer_of(names[id(p)]) for group in optimizer.round_robin_bit16_groups for p in group}
        found = list(dict.fromkeys(layer_of(name) for key, name in names.items() if key in self._layer))
        self.layers = [prefix + layer for layer in found]  # in the order of the network
        self._index = {layer: number for number, layer in enumerate(found)}
        self.squares: Tensor | None = None  # [layers], this rank's share; None where the last step was not measured

    def forget(self) -> None:
        """Of the last step; the next one need not be measured."""
        self.squares = None

    @torch.no_grad()
    def measure(self) -> None:
        """Between the last backward pass of an optimizer step and the update; waits for nothing, meets nobody."""
        gradients: list[list[Tensor]] = [[] for _ in self.layers]
        for layer, gradient in self._shares():
            gradients[self._index[layer]].append(gradient)
        norms = [torch.nn.utils.get_total_norm(of_layer) for of_layer in gradients]
        device = self._optimizer.single_partition_of_fp32_groups[0].device
        self.squares = torch.stack([norm.to(device, torch.float64) ** 2 for norm in norms])

    def _shares(self) -> list[tuple[str, Tensor]]:
        """(layer, gradient) of everything whose square this rank adds to the sum over ranks."""
        if isinstance(self._optimizer, ReplicatedAdamW):  # all ranks hold all gradients: the first one adds them
            groups = self._optimizer.round_robin_bit16_groups if self._rank == 0 else []
            return [(self._layer[id(p)], p.grad) for group in groups for p in group if p.grad is not None]
        shares = []
        for group, parameters in enumerate(self._optimizer.params_in_partition):
            # One piece of gradient for each parameter that this rank owns a part of, with padding between and after.
            pieces = self._optimizer.averaged_gradients[group]
            pieces = [piece for piece in pieces if not getattr(piece, "_zero_padding", False)]
            shares += [(self._layer[id(p)], piece) for p, piece in zip(parameters, pieces, strict=False)]
        return shares


def gather_layer_norms(measured: list[LayerNorms], world: World) -> dict[str, float]:
    """Layer -> gradient norm of the last step before clipping, over all ranks (collective).

    Empty where that step was not measured. Infinite where gradients were not finite.
    """
    taken = [(part, part.squares) for part in measured if part.squares is not None]
    if not taken:
        return {}
    sums = (
        world.sum(torch.cat([squares for _, squares in taken]).cpu()).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)
    )
    return dict(zip([layer for part, _ in taken for layer in part.layers], sums.tolist(), strict=True))
