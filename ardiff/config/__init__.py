"""Configuration: dataclasses, YAML presets, dotted overrides.

`load("tiny", ["--train.max_steps", "100"])` gives a validated `Config`. OmegaConf does the typing; what is added
here is that every problem is reported at once, each with the nearest key that exists.
"""

from ardiff.config.loading import differences, load, presets, to_yaml
from ardiff.config.sections import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Phase,
    SamplingConfig,
    Source,
    TrainConfig,
    VAEConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "ModelConfig",
    "Phase",
    "SamplingConfig",
    "Source",
    "TrainConfig",
    "VAEConfig",
    "differences",
    "load",
    "presets",
    "to_yaml",
]
