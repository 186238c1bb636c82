"""Pictures of what a run trains on and how it samples."""

import numpy as np
import pytest

from ardiff.config import load
from ardiff.monitor.heatmaps import BINS, LIGHT, schedule_heat_maps, timesteps_histogram, timesteps_image
from ardiff.sampling.pictures import MARGIN


def test_synchronous_timesteps_are_uniform():
    share = timesteps_histogram(load("tiny", ["diffusion.timesteps=synchronous"]), draws=50_000)
    assert share.shape == (BINS, 8)
    assert share.sum(axis=0) == pytest.approx(np.ones(8))
    assert np.abs(share * BINS - 1).max() < 0.2


def test_asynchronous_timesteps_rise_along_the_frames():
    share = timesteps_histogram(load("tiny"))  # FoPP
    means = (share * np.arange(BINS)[:, None]).sum(axis=0)
    assert (np.diff(means) > 0).all()


def test_given_frames_do_not_count():
    share = timesteps_histogram(load("tiny", ["diffusion.conditioning.probability=1"]))  # always the first frame
    assert share.sum(axis=0) == pytest.approx([0, 1, 1, 1, 1, 1, 1, 1])


def test_light_is_where_frames_are_trained():
    picture = np.asarray(timesteps_image(load("tiny")))
    inside = picture[MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert (inside[-1, 0] == LIGHT).all() and (inside[0, -1] == LIGHT).all()  # first frame clean, last one noise
    assert inside[0, 0].sum() < inside[-1, 0].sum()


def test_pictures_of_presets():
    for preset in ("tiny", "pavdm", "rolling"):
        found = schedule_heat_maps(load(preset))
        assert list(found) == ["schedule/training_timesteps", "schedule/sampling_levels"]
        assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in found.values())


def test_settings_that_cannot_be_sampled_leave_out_that_picture():
    config = load("tiny")
    config.sampling.gap = 999
    assert list(schedule_heat_maps(config)) == ["schedule/training_timesteps"]
