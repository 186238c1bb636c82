"""Level matrices: how much noise every frame still has after each row of sampling.

Level S is pure noise, 0 is clean. Every sampling method of the family is such a matrix; the AD scheduler of
AR-Diffusion (Section 3.4) lets frame i start `gap` steps after frame i-1: gap 0 is synchronous diffusion, gap S is
frame-by-frame auto-regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ardiff.errors import UserError


def ad_levels(num_frames: int, num_steps: int, gap: int, block: int = 1, prefix: int = 0) -> Tensor:
    """Levels [rows + 1, F] (int64): row 0 is all S except the clean prefix, the last row all 0.

    num_steps: S, the updates every frame gets. gap: rows between the starts of neighbouring blocks, 0..S.
    block: frames that share a level (blocks are counted from frame 0). prefix: frames that are clean from the start.
    There are S + (generated blocks - 1) * gap rows. `S - levels[1:]` is the progress index of the reference.
    """
    if num_frames < 1 or num_steps < 1 or block < 1:
        raise UserError(f"num_frames = {num_frames}, num_steps = {num_steps} and block = {block} must be at least 1")
    if not 0 <= gap <= num_steps:
        raise UserError(f"gap = {gap} must lie between 0 (synchronous) and num_steps = {num_steps} (frame by frame)")
    if not 0 <= prefix < num_frames:
        raise UserError(f"prefix = {prefix} frames must leave something to generate of num_frames = {num_frames}")
    blocks = torch.arange(num_frames) // block
    waiting = (blocks - prefix // block) * gap  # rows before the block's first update
    rows = num_steps + int(waiting[-1])
    levels = (num_steps - torch.arange(rows + 1)[:, None] + waiting).clamp(0, num_steps)
    levels[:, :prefix] = 0
    return levels
