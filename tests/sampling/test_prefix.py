from fractions import Fraction

import numpy as np
import pytest

from ardiff.data.corpus import CorpusEntry
from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.sampling.conditions import prefix_positions
from ardiff.video import write_mp4
from data_tools.sharding.sampling import Rate


def space(**values):
    return LatentSpace("none", [0.0], [1.0], "id", "path", None, values.pop("stride", 1), [], **values)


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, np.zeros((60, 16, 16, 3), np.uint8), 30)
    return path


@pytest.mark.parametrize("rate", ["8/1", "30/1", "25/2", "30000/1001"])
def test_a_prefix_takes_the_frames_that_extraction_would_take(clip, rate):
    entry = CorpusEntry("0", str(clip), "ok", fps="30/1", num_frames=60)
    found = prefix_positions(clip, 12, space(sampled_fps=rate), 1)
    assert found == Rate(fps=Fraction(rate)).positions(entry)[:12]


def test_a_prefix_keeps_the_strides_of_extraction_and_training(clip):
    assert prefix_positions(clip, 4, space(stride=3), 2) == [0, 6, 12, 18]
    assert prefix_positions(clip, 3, space(sampled_fps="10/1"), 2) == [0, 6, 12]


def test_a_prefix_slower_than_the_training_clips_is_refused(clip):
    with pytest.raises(UserError, match=r"fewer frames per second than the training clips \(60/1 / 1\)"):
        prefix_positions(clip, 4, space(sampled_fps="60/1"), 1)
