"""Networks by configuration: ours, or those of the published weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ardiff.config import ModelConfig, VAEConfig
from ardiff.models.arvae import ARVAE
from ardiff.models.dit import DiT

if TYPE_CHECKING:  # it builds on this package
    from ardiff.compat.reference import ReferenceARVAE, ReferenceModel


def build_dit(config: ModelConfig, prediction: str = "x0") -> DiT | ReferenceModel:
    """The untrained diffusion transformer of `model.architecture`, called as `DiT`.

    prediction: what its output will mean (the schedule's affair; the network only carries it).
    """
    if config.architecture == "reference":
        from ardiff.compat.reference.dit import ReferenceDiT

        return ReferenceDiT.untrained(config).as_model(prediction)
    return DiT(config)


def build_arvae(config: VAEConfig) -> ARVAE | ReferenceARVAE:
    """The untrained auto-encoder of `vae.architecture`, with `encode` and `decode` as `ARVAE`."""
    if config.architecture == "reference":
        from ardiff.compat.reference.arvae import ReferenceARVAE

        return ReferenceARVAE(config)
    return ARVAE(config)
