import numpy as np
import pytest
import torch
from data_helpers import GOLDEN

from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.sampling import ad_levels


def recursion(num_frames, num_steps, gap):
    """The reference's row-by-row rule for the progress index [rows, F]."""
    previous, rows = [0] * num_frames, []
    while min(previous) < num_steps:
        row = []
        for frame in range(num_frames):
            if frame == 0 or previous[frame - 1] == num_steps:
                index = previous[frame] + 1
            else:
                index = row[frame - 1] - gap
            row.append(min(max(index, 0), num_steps))
        rows.append(row)
        previous = row
    return rows


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_levels_equal_the_references_recursion(num_frames, num_steps):
    for gap in range(num_steps + 1):
        levels = ad_levels(num_frames, num_steps, gap)
        assert levels.dtype == torch.int64
        assert (levels[0] == num_steps).all()
        assert (num_steps - levels[1:]).tolist() == recursion(num_frames, num_steps, gap), f"gap {gap}"


@pytest.mark.parametrize(
    ("num_frames", "num_steps", "gap"), [(16, 50, 0), (16, 50, 5), (16, 50, 25), (16, 50, 50), (5, 10, 3)]
)
def test_levels_equal_the_references_output(num_frames, num_steps, gap):
    golden = np.load(GOLDEN / "ad_schedules.npz")
    index, mask, timesteps = (
        golden[f"F{num_frames}_S{num_steps}_s{gap}_{name}"] for name in ("index", "mask", "timesteps")
    )
    levels = ad_levels(num_frames, num_steps, gap).numpy()
    assert np.array_equal(num_steps - levels[1:], index)
    assert np.array_equal(levels[1:] != levels[:-1], mask)
    assert np.array_equal(Schedule().timesteps(num_steps)[num_steps - levels[1:]], timesteps)


@pytest.mark.parametrize(
    ("num_frames", "num_steps", "gap", "rows"),
    # the fact sheet's table of the published settings
    [(16, 50, 0, 50), (16, 50, 5, 125), (16, 50, 50, 800), (128, 50, 5, 685), (128, 50, 10, 1320), (128, 50, 25, 3225)],
)
def test_rows_of_the_published_settings(num_frames, num_steps, gap, rows):
    assert ad_levels(num_frames, num_steps, gap).shape == (rows + 1, num_frames)


@pytest.mark.parametrize("gap", [0, 1, 4, 6])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("block", [1, 2, 3, 10])
def test_every_frame_is_updated_in_every_step_once_and_in_order(block, prefix, gap):
    num_frames, num_steps = 7, 6
    levels = ad_levels(num_frames, num_steps, gap, block, prefix)
    generated_blocks = len({frame // block for frame in range(prefix, num_frames)})
    assert levels.shape == (num_steps + (generated_blocks - 1) * gap + 1, num_frames)
    assert (levels[:, :prefix] == 0).all()
    assert (levels[0, prefix:] == num_steps).all()
    assert (levels[-1] == 0).all()
    steps = levels[:-1] - levels[1:]
    assert ((steps == 0) | (steps == 1)).all()
    assert (steps[:, prefix:].sum(0) == num_steps).all()
    assert (steps.sum(1) > 0).all(), "a row that updates nothing"
    assert (levels.diff(dim=1) >= 0).all(), "a later frame is cleaner than an earlier one"


@pytest.mark.parametrize("prefix", [0, 2, 3])
def test_frames_of_a_block_share_their_level_and_blocks_follow_at_the_gap(prefix):
    levels = ad_levels(8, 6, 4, block=2, prefix=prefix)
    for row in range(len(levels)):
        for frame in range(prefix, 8):
            started = row - (frame // 2 - prefix // 2) * 4
            assert levels[row, frame] == 6 - min(max(started, 0), 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 1), "num_frames = 0"),
        ((4, 0, 0), "num_steps = 0"),
        ((4, 5, 1, 0), "block = 0"),
        ((4, 5, -1), "gap = -1"),
        ((4, 5, 6), "gap = 6"),  # it would idle: the reference clips silently
        ((4, 5, 1, 1, 4), "prefix = 4"),
        ((4, 5, 1, 1, -1), "prefix = -1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ad_levels(*arguments)
