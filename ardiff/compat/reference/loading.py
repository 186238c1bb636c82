"""From a published state dict and its constructor arguments to a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ardiff.compat.reference.arvae import ReferenceARVAE
from ardiff.compat.reference.dit import ReferenceDiT, fixed_tables
from ardiff.compat.reference.options import model_config, vae_config
from ardiff.compat.reference.state_dict import fill, split_arvae, split_dit
from ardiff.errors import UserError


def load_dit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReferenceDiT:
    """The network of a published checkpoint, fp32, in evaluation mode; called as (x, t, context).

    state_dict: with or without the prefixes `module.` and `diffusion_model.model.`; the buffers of the diffusion
    process and `vae.*` are understood and left out, `context_emb` or `class_emb` is kept with the network. config: the
    reference's constructor arguments. The fixed tables (`pos_embed`, rotary `freqs`) may be absent.

    Raises UserError for unknown arguments, and one that lists all missing, unexpected and wrongly shaped names.
    """
    parts = split_dit(state_dict)
    embeddings = parts.embeddings
    if len(embeddings) > 1:
        raise UserError("the checkpoint holds both context_emb and class_emb; keep the one it was trained with")
    num_classes = len(embeddings["class_emb"]) - 1 if "class_emb" in embeddings else 0
    settings = model_config(config, num_classes)
    options = settings.reference
    with torch.device("meta"):  # no numbers yet: those of the checkpoint are all it needs
        network = ReferenceDiT(settings)
    for name, value in embeddings.items():
        if tuple(value.shape[-2:]) != (options.context_tokens, options.context_dim):
            raise UserError(
                f"{name} {tuple(value.shape)} does not end in context_token x context_dim = "
                f"{options.context_tokens} x {options.context_dim}"
            )
        setattr(network, name, value.float())
    fill(network, {**fixed_tables(settings), **parts.network, **embeddings})
    return network.eval()


def load_arvae(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReferenceARVAE:
    """The auto-encoder of a published checkpoint, fp32, in evaluation mode; `encode` and `decode` as `ARVAE`.

    state_dict: with or without `module.`, or a DiT's that was stored with its `vae.`. config: the reference's
    constructor arguments; `num_frame` makes the decoder temporal.

    Raises UserError for unknown arguments, and one that lists all missing, unexpected and wrongly shaped names.
    """
    with torch.device("meta"):
        network = ReferenceARVAE(vae_config(config))
    fill(network, split_arvae(state_dict))
    return network.eval()
