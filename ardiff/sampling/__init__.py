"""Sampling: level matrices, the cached sampler."""

from ardiff.sampling.cache import KVCache
from ardiff.sampling.levels import SlidingWindow, ad_levels, pinned_levels, pyramid_levels
from ardiff.sampling.sampler import sample, sample_levels, stream

__all__ = [
    "KVCache",
    "SlidingWindow",
    "ad_levels",
    "pinned_levels",
    "pyramid_levels",
    "sample",
    "sample_levels",
    "stream",
]
