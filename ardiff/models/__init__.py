"""Networks: the diffusion transformer and the frame auto-encoder."""

from ardiff.models.arvae import ARVAE
from ardiff.models.build import build_arvae, build_dit
from ardiff.models.dit import DiT

__all__ = ["ARVAE", "DiT", "build_arvae", "build_dit"]
