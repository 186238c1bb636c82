"""Every test starts from the same random state and computes on one thread, so that results and times repeat."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
# tests/ for helpers shared by several files, the repository for a plain `pytest` without installation
for folder in (TESTS.parent, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def small_networks(monkeypatch):
    """Published networks of a few thousand parameters under the name of the small ones."""
    from ardiff.compat.reference import pixels
    from ardiff.compat.reference.options import VIT_SIZES

    monkeypatch.setitem(VIT_SIZES, "small", (2, 32, 2))
    monkeypatch.setattr(pixels, "WIDTH", 32)
