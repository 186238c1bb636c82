"""Text features that another program computed, as they are stored: float16 [tokens, D]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ardiff.errors import UserError


def half_features(name: str, found: Any) -> np.ndarray:
    """What np.load found under `name` as float16 [tokens, D]. Raises UserError unless it is text features."""
    if not isinstance(found, np.ndarray):  # an archive, or a member of one that is no array
        raise UserError(f"--text {name}: must be one float16 or float32 array [tokens, D], is {type(found).__name__}")
    if found.ndim != 2 or 0 in found.shape or found.dtype not in (np.float16, np.float32):
        raise UserError(f"--text {name}: must be float16 or float32 [tokens, D], is {found.dtype} {found.shape}")
    with np.errstate(over="ignore"):
        half = found.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"--text {name}: holds numbers that are not finite in float16")
    return half
