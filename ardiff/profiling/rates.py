"""What a measured time of a step means: clips/s, tokens/s, TFLOP/s, MFU and HFU.

MFU is the model's FLOP/s (forward and backward pass, nothing computed twice) over the device's peak; HFU counts blocks
that activation checkpointing computes again as well. Attention counts as the mask needs it; beside it stand the figures
of the dense convention, in which every token reads every other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ardiff.config import Config, ModelConfig
from ardiff.monitor.throughput import TRAINING, dit_block_flops, dit_flops


@dataclass(frozen=True)
class Rates:
    """Speeds of a run on all its devices together, and per device where the name says so.

    mfu, hfu and their dense twins: shares of the peak; None where no peak is known.
    """

    clips_per_s: float
    tokens_per_s: float
    tflops_per_device: float  # of the model, attention as the mask needs it
    hardware_tflops_per_device: float  # with what is computed again
    tflops_per_device_dense: float
    hardware_tflops_per_device_dense: float
    mfu: float | None
    hfu: float | None
    mfu_dense: float | None
    hfu_dense: float | None

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)


def training_flops(config: ModelConfig, num_context: int | None = None, dense: bool = False) -> float:
    """FLOPs of the forward and backward pass of one clip."""
    return TRAINING * dit_flops(config, num_context=num_context, dense=dense)


def hardware_flops(config: ModelConfig, num_context: int | None = None, dense: bool = False) -> float:
    """The same with the blocks that activation checkpointing computes again."""
    again = dit_block_flops(config, num_context=num_context, dense=dense) if config.activation_checkpointing else 0.0
    return training_flops(config, num_context, dense) + again


def rates(
    config: Config, step_seconds: float, devices: int, peak: float | None, num_context: int | None = None
) -> Rates:
    """Of optimizer steps of the global batch. peak: FLOP/s of one device, None where it is not known."""
    clips = config.train.global_batch_size / step_seconds
    per_device = clips / devices

    def share(flops: float) -> float | None:
        return per_device * flops / peak if peak else None

    model = config.model
    counted = {
        dense: (training_flops(model, num_context, dense), hardware_flops(model, num_context, dense))
        for dense in (False, True)
    }
    return Rates(
        clips_per_s=clips,
        tokens_per_s=clips * model.num_frames * model.tokens_per_frame,
        tflops_per_device=per_device * counted[False][0] / 1e12,
        hardware_tflops_per_device=per_device * counted[False][1] / 1e12,
        tflops_per_device_dense=per_device * counted[True][0] / 1e12,
        hardware_tflops_per_device_dense=per_device * counted[True][1] / 1e12,
        mfu=share(counted[False][0]),
        hfu=share(counted[False][1]),
        mfu_dense=share(counted[True][0]),
        hfu_dense=share(counted[True][1]),
    )
