"""Back to the names of the published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from ardiff.compat.reference.arvae import ReferenceARVAE
from ardiff.compat.reference.dit import ReferenceDiT
from ardiff.compat.reference.model import ReferenceModel
from ardiff.compat.reference.state_dict import BUFFERS, EMBEDDINGS, NETWORK
from ardiff.diffusion.schedule import Schedule


def to_reference(
    network: ReferenceDiT | ReferenceModel | ReferenceARVAE, prefix: str = "", schedule: Schedule | None = None
) -> dict[str, Tensor]:
    """A state dict with the reference's names; `load_dit` and `load_arvae` read it back, bit for bit.

    prefix: before the names of the network, as `diffusion_model.model.` in published files; what stands before that
    part (`module.`) goes before the embeddings and buffers as well. schedule: adds the buffers of its process.
    """
    plain = network.dit if isinstance(network, ReferenceModel) else network
    outer = prefix.removesuffix(NETWORK)
    named: dict[str, Tensor] = {}
    for name, value in plain.state_dict().items():
        named[f"{outer if name in EMBEDDINGS else prefix}{name}"] = value.detach().clone().contiguous()
    if schedule is not None:
        for name, value in process_buffers(schedule).items():
            named[f"{outer}diffusion_model.{name}"] = value
    return named


def process_buffers(schedule: Schedule) -> dict[str, Tensor]:
    """The 13 buffers [T] that the reference stores with a network, float32 (latent diffusion, Rombach et al. 2022)."""
    betas, product = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=product.dtype), product[:-1]])
    variance = betas * (1 - before) / (1 - product)
    values = (
        betas,
        product,
        before,
        product.sqrt(),
        (1 - product).sqrt(),
        (1 - product).log(),
        (1 / product).sqrt(),
        (1 / product - 1).sqrt(),
        variance,
        variance.clamp(min=1e-20).log(),
        betas * before.sqrt() / (1 - product),
        (1 - before) * (1 - betas).sqrt() / (1 - product),
        torch.zeros_like(betas),
    )
    return {name: value.float() for name, value in zip(BUFFERS, values, strict=True)}
