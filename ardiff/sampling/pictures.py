"""A picture of a level matrix: frames to the right, rows downwards, from noise (dark) to clean (light)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ardiff.files import replacing
from ardiff.sampling.levels import MatrixRows, Rows, SlidingWindow

MOST_CELLS = 900  # rows or frames that are drawn one by one; beyond, every n-th
NOISE, CLEAN = np.array([38.0, 32.0, 92.0]), np.array([250.0, 231.0, 150.0])
GIVEN, MARGIN = (120, 190, 130), 46


def schedule_picture(path: Path, rows: Rows, window: SlidingWindow | None = None) -> None:
    """Write a PNG of the levels of a schedule, see `schedule_image`."""
    with replacing(path) as temporary:
        schedule_image(rows, window).save(temporary, format="PNG")


def schedule_image(rows: Rows, window: SlidingWindow | None = None) -> Image.Image:
    """The levels [rows + 1, F] of a schedule; given frames green, what a window hides grey."""
    num_rows, num_frames = rows.num_rows, rows.num_frames
    assert num_rows is not None and num_frames is not None
    shown_rows = np.unique(np.linspace(0, num_rows, min(num_rows + 1, MOST_CELLS)).round().astype(int))
    shown_frames = np.unique(np.linspace(0, num_frames - 1, min(num_frames, MOST_CELLS)).round().astype(int))
    width, height = max(1, 640 // len(shown_frames)), max(1, 640 // len(shown_rows))
    cells = np.empty((len(shown_rows), len(shown_frames), 3))
    frames = torch.from_numpy(shown_frames)
    prefix = (rows.levels_of(0, frames) == 0).numpy()
    hidden = np.zeros(cells.shape[:2], dtype=bool)
    for i, row in enumerate(shown_rows.tolist()):
        share = (rows.levels_of(row, frames).double() / rows.num_steps).numpy()[:, None]
        cells[i] = share * NOISE + (1 - share) * CLEAN
        cells[i, prefix] = GIVEN
        if window is not None and row < num_rows:
            first, end = window.visible(rows, row, rows.finished(row))
            hidden[i] = (shown_frames < first) | (shown_frames >= end)
    cells[hidden] = 0.35 * cells[hidden] + 0.65 * 128
    picture = cells.round().astype(np.uint8).repeat(height, axis=0).repeat(width, axis=1)
    canvas = np.full((picture.shape[0] + 2 * MARGIN, picture.shape[1] + 2 * MARGIN, 3), 255, dtype=np.uint8)
    canvas[MARGIN:-MARGIN, MARGIN:-MARGIN] = picture
    image = Image.fromarray(canvas)
    _write_text(image, rows, window)
    return image


def _write_text(image: Image.Image, rows: Rows, window: SlidingWindow | None) -> None:
    draw = ImageDraw.Draw(image)
    what = (
        "level matrix" if isinstance(rows, MatrixRows) else f"gap {rows.gap}, block {rows.block}, prefix {rows.prefix}"
    )
    seen = "" if window is None else f", window {window.frames} (grey: not seen)"
    draw.text((MARGIN, 6), f"{rows.num_steps} steps, {what}{seen}", fill=(0, 0, 0))
    draw.text((MARGIN, 24), f"frames 0 .. {(rows.num_frames or 0) - 1}, dark: noise, light: clean", fill=(0, 0, 0))
    draw.text((4, MARGIN), "row 0", fill=(0, 0, 0))
    draw.text((4, image.height - MARGIN), f"row {rows.num_rows}", fill=(0, 0, 0))


def frame_forwards(rows: Rows, cache: bool, window: SlidingWindow | None = None, num_rows: int | None = None) -> int:
    """Frames that go through the network in all rows (or in so many, of rows without end) together, per video and
    guidance branch.
    """
    total = rows.num_rows if num_rows is None else num_rows
    assert total is not None
    if window is None and not cache:
        assert rows.num_frames is not None
        return total * rows.num_frames

    def in_row(row: int) -> int:
        if window is not None:
            first, end = window.visible(rows, row, rows.finished(row))
            return _evaluated(end - first, window)
        # a finished frame goes through once more, in the row after its last
        return rows.started(row) - (rows.finished(row - 1) if row else 0)

    if isinstance(rows, MatrixRows) or rows.gap == 0:
        return sum(map(in_row, range(total)))
    # Between its beginning and its end a video repeats itself every `gap` rows, a block further on.
    edge = rows.num_steps + rows.gap * (2 + (window.frames // rows.block if window is not None else 0))
    periods = max(0, total - 2 * edge) // rows.gap
    ends = (*range(min(edge, total)), *range(edge + periods * rows.gap, total))
    return sum(map(in_row, ends)) + periods * sum(map(in_row, range(edge, edge + rows.gap)))


def _evaluated(num_frames: int, window: SlidingWindow) -> int:
    """Frames that go through the network for a window of so many, pieces that overlap counted as often as they do."""
    size = window.partition
    if not size or num_frames <= size:
        return num_frames
    step = size // 2 if window.lookahead else size
    pieces = (num_frames - size) // step + 1
    return size * (pieces + (1 if (pieces - 1) * step + size < num_frames else 0))
