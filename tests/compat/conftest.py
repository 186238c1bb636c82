"""What the tests of the published networks share."""

import pytest

from ardiff.compat.reference import pixels
from ardiff.compat.reference.options import VIT_SIZES


@pytest.fixture
def small_networks(monkeypatch):
    """Networks of a few thousand parameters under the name of the small ones."""
    monkeypatch.setitem(VIT_SIZES, "small", (2, 32, 2))
    monkeypatch.setattr(pixels, "WIDTH", 32)
