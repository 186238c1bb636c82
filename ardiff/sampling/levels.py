"""Level matrices: how much noise every frame still has after each row of sampling.

Level S is pure noise, 0 is clean. Every sampling method of the family is such a matrix; the AD scheduler of
AR-Diffusion (Section 3.4) lets frame i start `gap` steps after frame i-1: gap 0 is synchronous diffusion, gap S is
frame-by-frame auto-regression. PA-VDM is gap = S/K with blocks and a clean prefix, rolling diffusion gap = S/W, FIFO
gap = 1 with S = n f; see `SlidingWindow` for what their networks see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ardiff.errors import UserError


@dataclass(frozen=True)
class ADRows:
    """The rows of the AD scheduler in closed form, for any number of frames (None: without end).

    num_steps: S, the updates every frame gets. gap: rows between the starts of neighbouring blocks, 0..S. block: frames
    that share a level (blocks are counted from frame 0). prefix: frames that are clean from the start.
    """

    num_frames: int | None
    num_steps: int
    gap: int
    block: int = 1
    prefix: int = 0

    def __post_init__(self) -> None:
        frames = 1 if self.num_frames is None else self.num_frames
        if frames < 1 or self.num_steps < 1 or self.block < 1:
            raise UserError(
                f"num_frames = {frames}, num_steps = {self.num_steps} and block = {self.block} must be at least 1"
            )
        if not 0 <= self.gap <= self.num_steps:
            raise UserError(
                f"gap = {self.gap} must lie between 0 (synchronous) and num_steps = {self.num_steps} (frame by frame)"
            )
        if self.prefix < 0 or (self.num_frames is not None and self.prefix >= self.num_frames):
            raise UserError(f"prefix = {self.prefix} frames must leave something to generate of num_frames = {frames}")
        if self.num_frames is None and self.gap == 0:
            raise UserError("gap = 0 starts all frames at once: a video without end needs a gap of at least 1")

    @property
    def num_rows(self) -> int | None:
        """Rows after the first: S + (generated blocks - 1) * gap; None for a video without end."""
        if self.num_frames is None:
            return None
        return self.num_steps + ((self.num_frames - 1) // self.block - self.prefix // self.block) * self.gap

    def levels(self, row: int, first: int, last: int) -> Tensor:
        """Levels [last - first] (int64) of frames first .. last - 1 in a row."""
        return self.levels_of(row, torch.arange(first, last))

    def levels_of(self, row: int, frame: Tensor) -> Tensor:
        """Levels [n] (int64) of any frames [n] in a row."""
        waiting = (frame // self.block - self.prefix // self.block) * self.gap
        return (self.num_steps - row + waiting).clamp(0, self.num_steps).masked_fill(frame < self.prefix, 0)

    def started(self, row: int) -> int:
        """How many frames, counted from the first, the step from `row` to the next one moves or finds begun."""
        if self.gap == 0:
            assert self.num_frames is not None
            return self.num_frames
        frames = (self.prefix // self.block + row // self.gap + 1) * self.block
        return frames if self.num_frames is None else min(frames, self.num_frames)

    def finished(self, row: int) -> int:
        """How many frames, counted from the first, are clean in a row."""
        if row < self.num_steps:
            return self.prefix
        if self.gap == 0:
            assert self.num_frames is not None
            return self.num_frames
        frames = (self.prefix // self.block + (row - self.num_steps) // self.gap + 1) * self.block
        return frames if self.num_frames is None else min(frames, self.num_frames)

    @property
    def most_unfinished(self) -> int:
        """Frames that are between noise and clean at the same time, at most."""
        blocks = -(-self.num_steps // self.gap) if self.gap else 10**9
        everything = 10**9 if self.num_frames is None else self.num_frames
        return min(blocks * self.block, everything)


@dataclass(frozen=True)
class MatrixRows:
    """A level matrix [rows + 1, F] that is given; frames that are 0 in the first row are given frames."""

    matrix: Tensor

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.ndim != 2 or matrix.dtype != torch.int64 or len(matrix) < 2:
            raise UserError(f"levels {tuple(matrix.shape)} of {matrix.dtype} must be int64 [rows + 1, F]")
        rises = matrix.diff(dim=0) > 0
        if rises.any() or matrix[-1].any() or (matrix < 0).any():
            raise UserError("levels must be 0 or more, never rise from row to row, and end at 0")

    @property
    def num_frames(self) -> int:
        """F."""
        return self.matrix.shape[1]

    @property
    def num_steps(self) -> int:
        """S."""
        return int(self.matrix.max())

    @property
    def num_rows(self) -> int:
        """Rows after the first."""
        return len(self.matrix) - 1

    @property
    def is_ordered(self) -> bool:
        """Whether no frame is noisier than a later one: what a cache of finished frames needs."""
        return bool((self.matrix.diff(dim=1) >= 0).all())

    def levels(self, row: int, first: int, last: int) -> Tensor:
        """Levels [last - first] of frames first .. last - 1 in a row."""
        return self.matrix[row, first:last]

    def levels_of(self, row: int, frame: Tensor) -> Tensor:
        """Levels [n] of any frames [n] in a row."""
        return self.matrix[row, frame]

    def started(self, row: int) -> int:
        """How many frames, counted from the first, the step from `row` to the next one moves or finds begun."""
        begun = (self.matrix[row + 1] < self.num_steps).nonzero()
        return int(begun.max()) + 1 if len(begun) else 0

    def finished(self, row: int) -> int:
        """How many frames, counted from the first, are clean in a row."""
        unfinished = self.matrix[row].nonzero()
        return int(unfinished.min()) if len(unfinished) else self.num_frames

    @property
    def most_unfinished(self) -> int:
        """Frames that are between noise and clean at the same time, at most."""
        return self.num_frames


Rows = ADRows | MatrixRows


def ad_levels(num_frames: int, num_steps: int, gap: int, block: int = 1, prefix: int = 0) -> Tensor:
    """Levels [rows + 1, F] (int64) of `ADRows`: row 0 is all S except the clean prefix, the last row all 0.

    `S - levels[1:]` is the progress index of the reference.
    """
    rows = ADRows(num_frames, num_steps, gap, block, prefix)
    assert rows.num_rows is not None
    return torch.stack([rows.levels(row, 0, num_frames) for row in range(rows.num_rows + 1)])


def pyramid_levels(num_frames: int, num_steps: int, scale: float) -> Tensor:
    """Diffusion Forcing's pyramid [rows + 1, F]: frame i starts floor(i * scale) rows after frame 0.

    For a whole number of at most S it is `ad_levels` with that gap; 0 < scale < 1 lets several frames start together.
    """
    if num_frames < 1 or num_steps < 1 or not 0 <= scale <= num_steps:
        raise UserError(f"scale = {scale} must lie between 0 and num_steps = {num_steps}, for at least one frame")
    waiting = (torch.arange(num_frames) * scale).floor().long()
    rows = num_steps + int(waiting[-1])
    return (num_steps - torch.arange(rows + 1)[:, None] + waiting).clamp(0, num_steps)


def pinned_levels(num_frames: int, num_steps: int, pinned: Sequence[int]) -> Tensor:
    """Synchronous sampling [S + 1, F] around given frames (FVDM, Pusa: image to video, interpolation, extension)."""
    wrong = [frame for frame in pinned if not 0 <= frame < num_frames]
    if wrong or len(set(pinned)) >= num_frames:
        raise UserError(
            f"given frames {sorted(pinned)} must lie in 0..{num_frames - 1} and leave something to generate"
        )
    levels = ad_levels(num_frames, num_steps, 0)
    levels[:, list(pinned)] = 0
    return levels


@dataclass(frozen=True)
class SlidingWindow:
    """What a network sees that takes a limited number of frames and has no cache: positions begin at 0 in it.

    The window begins `history` finished frames before the first unfinished one and holds `frames` frames, whether the
    last have begun or not (`variable`: only those that have). Without a history it stands still until a frame begins
    beyond its end, and then ends with that frame. AR-Diffusion's long videos are (16), PA-VDM is (n (K + 1), history
    n), with or without `variable`, rolling diffusion (W, history = clean frames).

    partition (FIFO): evaluate the window in pieces of so many frames; lookahead: pieces overlap by half, and each but
    the first counts for its noisier half.
    """

    frames: int
    history: int | None = None
    variable: bool = False
    partition: int = 0
    lookahead: bool = False

    def check(self, rows: Rows) -> None:
        """Refuse a window that frames would leave unfinished, with the arithmetic."""
        history = self.history or 0
        if self.frames < 1 or not 0 <= history < self.frames:
            raise UserError(f"a window of {self.frames} frames cannot hold a history of {history}")
        everything = rows.num_frames or 10**9
        if isinstance(rows, ADRows) and rows.prefix and self.history == 0:
            raise UserError(
                f"a window with history = 0 never shows the {rows.prefix} given frames: give it a history, or "
                "start from them with --warm_frames"
            )
        if isinstance(rows, MatrixRows):
            if self.frames < everything:
                raise UserError(f"a window of {self.frames} of {everything} frames needs the rows of the AD scheduler")
        elif self.frames < everything and self.frames < rows.most_unfinished + history:
            needed = rows.most_unfinished + history
            blocks = max(1, (self.frames - history) // rows.block)
            raise UserError(
                f"window of {self.frames} frames: with {rows.num_steps} steps, gap = {rows.gap} and block = "
                f"{rows.block}, ceil({rows.num_steps} / {rows.gap}) * {rows.block} + {history} = "
                f"{needed if rows.gap else 'all'} frames are unfinished or history at a time, and frames would leave "
                f"it unfinished; use gap >= {-(-rows.num_steps // blocks)} or a larger window"
            )
        if self.partition and (self.frames % self.partition or (self.lookahead and self.partition % 2)):
            raise UserError(
                f"window of {self.frames} frames: must be a multiple of partition = {self.partition}"
                + (", an even number" if self.lookahead else "")
            )

    def visible(self, rows: Rows, row: int, first_unfinished: int) -> tuple[int, int]:
        """First frame and the one after the last that the step from `row` evaluates."""
        base = 0 if self.history is None else max(0, first_unfinished - self.history)
        end = rows.started(row) if self.variable else max(base + self.frames, rows.started(row))
        if rows.num_frames is not None:
            end = min(end, rows.num_frames)
        return max(base, end - self.frames), end
