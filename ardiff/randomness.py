"""Randomness as a function: every number of training follows from (seed, stream, index), never from a state.

So it does not matter which rank draws a number, how often a run was restarted or how many workers there are, and
nothing has to be saved. `uniforms` is vectorised over indices (timesteps, crops, label drop); `normals` gives the
noise of one sample.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """Independent uses of one seed."""

    ORDER = 1
    CROP = 2
    TIMESTEPS = 3
    NOISE = 4
    LABEL_DROP = 5
    SAMPLES = 6
    POSTERIOR = 7
    SUBSTITUTE = 8
    SHARDS = 9
    FLIP = 10
    SETS = 11
    SAMPLING_STEPS = 12
    FRAME_CROP = 13


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that scatters every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(seed: int, stream: int, indices: np.ndarray) -> np.ndarray:
    """One uint64 per index; indices are integers of any shape."""
    with np.errstate(over="ignore"):
        key = mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + _GAMMA)
        key = mix(key + np.uint64(stream) * _GAMMA)
        return mix(mix(np.asarray(indices).astype(np.uint64) * _GAMMA + key) + key)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each uint64 key [B] -> float64 [B, count] (53 random bits each)."""
    with np.errstate(over="ignore"):
        counters = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
        bits = mix(mix(np.asarray(keys).astype(np.uint64)[:, None] + counters[None]))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, stream: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers [shape] that belong to one index (Philox, counter-based)."""
    key = np.array([seed & (2**64 - 1), (int(stream) << 56) ^ int(index)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def synthetic(shape: tuple[int, ...]) -> torch.Tensor:
    """Fixed float32 numbers of mean 0 and variance 1 (uniform): the input whose output is compared between programs."""
    numbers = uniforms(np.zeros(1, dtype=np.uint64), math.prod(shape)).reshape(shape)
    return torch.from_numpy(((numbers - 0.5) * 12**0.5).astype(np.float32))
