"""What is told and drawn of a schedule: the same as by walking over all of it, without doing so."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ardiff.sampling.levels import ADRows, MatrixRows, SlidingWindow, pinned_levels
from ardiff.sampling.pictures import MOST_CELLS, frame_forwards, schedule_picture

WINDOWS = [None, SlidingWindow(8), SlidingWindow(8, 2), SlidingWindow(8, 1, True), SlidingWindow(8, 2, False, 4, True)]


def finished(rows, row, num_frames):
    levels = rows.levels(row, 0, num_frames)
    return int(levels.nonzero().min()) if levels.any() else num_frames


def pieces(num_frames, size, lookahead):
    """Frames of the pieces of a window, one by one."""
    if not size or num_frames <= size:
        return num_frames
    starts = list(range(0, num_frames - size + 1, size // 2 if lookahead else size))
    return size * (len(starts) + (starts[-1] + size < num_frames))


def counted(rows, window, num_rows, num_frames):
    """Frame-forwards row by row, from the levels alone."""
    found = before = 0
    for row in range(num_rows):
        clean = finished(rows, row, num_frames)
        if window is not None:
            first, end = window.visible(rows, row, clean)
            found += pieces(end - first, window.partition, window.lookahead)
        else:
            started = int((rows.levels(row + 1, 0, num_frames) < rows.num_steps).nonzero().max()) + 1
            found, before = found + started - before, clean
    return found


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("block", "prefix"), [(1, 0), (1, 5), (2, 0), (2, 4), (3, 0), (4, 40)])
def test_frame_forwards_are_those_of_all_rows(window, block, prefix):
    for num_frames, gap in itertools.product((41, 90, 203), (1, 3, 5, 6)):
        rows = ADRows(num_frames, 6, gap, block, prefix)
        expected = counted(rows, window, rows.num_rows, num_frames)
        assert frame_forwards(rows, window is None, window) == expected, (num_frames, gap)
        endless = ADRows(None, 6, gap, block, prefix)
        expected = counted(endless, window, rows.num_rows, 10 * num_frames)
        assert frame_forwards(endless, window is None, window, rows.num_rows) == expected, (num_frames, gap)


@pytest.mark.parametrize("rows", [ADRows(9, 5, 0), ADRows(9, 5, 0, 1, 4), MatrixRows(pinned_levels(9, 5, [0, 1]))])
def test_frame_forwards_of_synchronous_sampling(rows):
    assert frame_forwards(rows, True) == counted(rows, None, rows.num_rows, 9)


@pytest.mark.parametrize("rows", [ADRows(23, 6, 2, 3, 4), MatrixRows(pinned_levels(23, 6, [0, 1, 22]))])
def test_finished_frames_and_levels_of_some_are_those_of_the_rows(rows):
    some = torch.tensor([0, 3, 4, 5, 22])
    for row in range(rows.num_rows + 1):
        assert rows.finished(row) == finished(rows, row, 23)
        assert torch.equal(rows.levels_of(row, some), rows.levels(row, 0, 23)[some])


@pytest.mark.parametrize("window", [None, SlidingWindow(64)])
def test_a_schedule_of_any_length_costs_no_more_than_its_picture(window, tmp_path, monkeypatch):
    cells, steps = [], []
    levels_of, started = ADRows.levels_of, ADRows.started
    monkeypatch.setattr(ADRows, "levels_of", lambda self, row, at: cells.append(len(at)) or levels_of(self, row, at))
    monkeypatch.setattr(ADRows, "started", lambda self, row: steps.append(row) or started(self, row))
    rows = ADRows(20_000_000, 50, 5)
    schedule_picture(tmp_path / "long.png", rows, window)
    everything = frame_forwards(rows, window is None, window)
    # one forward more than there are steps for all frames but the last, which have no row after their last one
    assert window is not None or everything == 51 * 20_000_000 - 1
    assert sum(cells) <= (MOST_CELLS + 1) * MOST_CELLS and len(steps) < 5_000
    with Image.open(tmp_path / "long.png") as picture:
        shown = np.asarray(picture).astype(int)
    assert shown[60, 60].sum() < shown[-60, 60].sum()  # noise above, clean below
