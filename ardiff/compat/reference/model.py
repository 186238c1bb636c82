"""A published network as the rest of this project calls one: labels instead of embeddings, a context of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ardiff.diffusion.schedule import PREDICTIONS
from ardiff.errors import UserError
from ardiff.sampling.cache import KVCache

if TYPE_CHECKING:
    from ardiff.compat.reference.dit import ReferenceDiT

NULL_CLASS = 0  # what the reference drops labels to, although it is also the first class


class ReferenceModel(nn.Module):
    """(x [B, F, L, C], t [B, F], label [B], context, cache, window) -> raw output [B, F, L, C], as `ardiff.models.DiT`.

    Without `context` the network's stored embedding conditions it: `context_emb`, or the row of `class_emb` that
    `label` names (`num_classes`, the null label of guidance, and no label stand for the reference's null class 0).
    prediction: what the output means, to be given to the schedule. null_context [N, D] or [B, N, D]: the context of
    the unconditional branch of guidance, zeros unless given, as in the reference.
    """

    def __init__(self, dit: ReferenceDiT, prediction: str, null_context: Tensor | None = None) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction '{prediction}' must be one of {', '.join(PREDICTIONS)}")
        self.dit, self.config, self.prediction = dit, dit.config, prediction
        if null_context is None:
            null_context = torch.zeros(dit.config.reference.context_tokens, dit.config.reference.context_dim)
        self.null_context = null_context

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """cache and window: see `ReferenceDiT.forward`."""
        if context is None:
            context = self.stored_context(len(x), label).to(x.device)
        out = self.dit(x, t, context, cache, window)
        return out[..., : self.config.in_channels]

    def stored_context(self, batch_size: int, label: Tensor | None = None) -> Tensor:
        """The embedding [B, N, D] that the network was trained under. Raises UserError when it holds none."""
        classes = self.config.num_classes
        if label is not None and self.dit.class_emb is None:
            raise UserError("labels were given, but this network has no class_emb")
        if self.dit.class_emb is not None:
            if label is None:
                label = torch.full((batch_size,), NULL_CLASS)
            if label.shape != (batch_size,):
                raise UserError(f"labels {tuple(label.shape)} must be [B] = ({batch_size},)")
            label = label.to(self.dit.class_emb.device)
            return self.dit.class_emb[torch.where(label == classes, NULL_CLASS, label)]
        if self.dit.context_emb is None:
            raise UserError("the checkpoint holds no context_emb or class_emb: give the context [B, N, D] yourself")
        return self.dit.context_emb.expand(batch_size, -1, -1)

    def contexts(self, batch_size: int) -> tuple[Tensor, Tensor] | None:
        """The context [B, N, D] and null context for guidance of a network without classes; None for one with them."""
        if self.dit.class_emb is not None:
            return None
        context = self.stored_context(batch_size)
        return context, self.null_context.to(context).expand_as(context)
