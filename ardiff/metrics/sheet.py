"""A contact sheet of originals beside their reconstructions, with titles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ardiff.files import replacing
from ardiff.models.arvae import as_pictures
from ardiff.video import contact_sheet

ORIGINAL = "original"
SHEET_ROWS = 16
SHEET_FRAMES = 2  # of a video, the first and the last
TITLES = 18  # pixels above the pictures
LONGEST = 24  # characters of a label; of longer ones the end is shown


class SheetRow:
    """The pictures of a video for the contact sheet: all columns of its first frame, then those of its last."""

    def __init__(self, length: int, columns: Sequence[str]) -> None:
        self.places = np.linspace(0, length - 1, SHEET_FRAMES).round().astype(int).tolist()
        self.columns = columns
        self._found: dict[int, list[np.ndarray]] = {}

    def add(self, first: int, pictures: dict[str, Tensor]) -> None:
        """Take what is wanted of the frames from `first` on."""
        for place in set(self.places):
            if first <= place < first + len(pictures[ORIGINAL]):
                chosen = torch.stack([pictures[name][place - first] for name in self.columns])
                self._found[place] = list(as_pictures(chosen))

    def pictures(self) -> np.ndarray:
        """uint8 [SHEET_FRAMES * columns, H, W, 3]."""
        return np.stack([picture for place in self.places for picture in self._found[place]])


def write_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], titles: Sequence[str]) -> None:
    """Write a PNG: a row for each video (label, uint8 [columns, H, W, 3]) under the titles of the columns.

    The titles are repeated until every column has one.
    """
    with replacing(path) as temporary:
        contact_sheet(temporary, [pictures for _, pictures in rows], max_columns=len(rows[0][1]))
        with Image.open(temporary, formats=["PNG"]) as opened:
            grid = opened.copy()
        labels = ["\n".join(line[-LONGEST:] for line in label.splitlines()) for label, _ in rows]
        ruler = ImageDraw.Draw(grid)
        left = 8 + math.ceil(max(ruler.multiline_textbbox((0, 0), label)[2] for label in labels))
        sheet = Image.new("RGB", (left + grid.width, TITLES + grid.height), (255, 255, 255))
        sheet.paste(grid, (left, TITLES))
        draw = ImageDraw.Draw(sheet)
        columns = len(rows[0][1])
        for column in range(columns):
            place = (left + 4 + column * grid.width // columns, 3)
            draw.text(place, titles[column % len(titles)], fill=(0, 0, 0))
        for number, label in enumerate(labels):
            draw.text((4, TITLES + 4 + number * grid.height // len(rows)), label, fill=(0, 0, 0))
        sheet.save(temporary, format="PNG")
