"""Configuration: dataclasses, YAML presets, dotted overrides.

`load("tiny", ["--train.max_steps", "100"])` gives a validated `Config`. OmegaConf does the typing; what is added
here is that every problem is reported at once, each with the nearest key that exists.
"""

from ardiff.config.loading import differences, load, presets, to_yaml, with_overrides
from ardiff.config.sections import (
    ConditioningConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Phase,
    ReferenceModelConfig,
    ReferenceVAEConfig,
    SamplingConfig,
    Source,
    StaircaseConfig,
    TimestepsShare,
    TrainConfig,
    VAEConfig,
)
from ardiff.config.timestep_checks import timestep_problems

__all__ = [
    "ConditioningConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "ModelConfig",
    "Phase",
    "ReferenceModelConfig",
    "ReferenceVAEConfig",
    "SamplingConfig",
    "Source",
    "StaircaseConfig",
    "TimestepsShare",
    "TrainConfig",
    "VAEConfig",
    "differences",
    "load",
    "presets",
    "timestep_problems",
    "to_yaml",
    "with_overrides",
]
