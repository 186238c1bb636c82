"""Small sound data sets, whose every part is checked by other programs too (tests/mutations/sets.py)."""

from pathlib import Path

import pytest
from mutations.sets import write_frame_set, write_latent_set


@pytest.fixture
def latents(tmp_path) -> Path:
    write_latent_set(tmp_path / "latents")
    return tmp_path / "latents"


@pytest.fixture
def frames(tmp_path) -> Path:
    write_frame_set(tmp_path / "frames")
    return tmp_path / "frames"
