"""The published AR-Diffusion checkpoints (CVPR 2025): networks that give the same numbers, import and export.

    state_dict = read_checkpoint(Path("model.safetensors"))
    network = load_dit(state_dict, {"in_channels": 4, "learn_sigma": False, "merge_mode": "share_norm", ...})
    latents = sample(network.as_model("x0"), noise, 50, 5, Schedule(**detect_schedule(state_dict)), cache="none")

`launch/convert.py` does the same for files.
"""

from ardiff.compat.reference.arvae import ReferenceARVAE
from ardiff.compat.reference.dit import ReferenceDiT
from ardiff.compat.reference.export import to_reference
from ardiff.compat.reference.loading import load_arvae, load_dit
from ardiff.compat.reference.model import ReferenceModel
from ardiff.compat.reference.state_dict import detect_schedule, read_checkpoint

__all__ = [
    "ReferenceARVAE",
    "ReferenceDiT",
    "ReferenceModel",
    "detect_schedule",
    "load_arvae",
    "load_dit",
    "read_checkpoint",
    "to_reference",
]
