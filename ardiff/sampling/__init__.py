"""Sampling: level matrices, the cached sampler."""

from ardiff.sampling.cache import KVCache
from ardiff.sampling.levels import ad_levels
from ardiff.sampling.sampler import sample

__all__ = ["KVCache", "ad_levels", "sample"]
