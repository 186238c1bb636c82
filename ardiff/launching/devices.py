"""How many GPUs this machine has, without a deep-learning framework."""

from __future__ import annotations

import os
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for every GPU


def gpus() -> int:
    """GPUs that CUDA programs started from here see; 0 without NVIDIA's driver."""
    try:
        found = len(list(_DRIVER.iterdir()))
    except OSError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    named = [word for word in visible.split(",") if word.strip() and word.strip() != "-1"]
    return len(named) if any(not word.strip().isdigit() for word in named) else min(found, len(named))
