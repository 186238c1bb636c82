"""Networks: the diffusion transformer and the frame auto-encoder."""

from ardiff.models.arvae import ARVAE
from ardiff.models.dit import DiT

__all__ = ["ARVAE", "DiT"]
