"""Sampling any level matrix with DDIM, recomputing nothing that is finished and nothing that has not begun.

With `cache="exact"` the K/V of finished frames come from a cache, and a finished frame is presented once, with the
label t = 1, in the forward that follows its last update. The result equals full recomputation to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.sampling.cache import KVCache
from ardiff.sampling.levels import ad_levels

Model = Callable[..., Tensor]  # (x, t, label, context, cache) -> raw output, as DiT.forward


@dataclass
class Guidance:
    """Classifier-free guidance: both branches run as one batch, so they share one forward and one cache."""

    scale: float
    label: Tensor | None
    context: Tensor | None

    @classmethod
    def build(
        cls,
        scale: float,
        label: Tensor | None,
        null_label: int,
        context: Tensor | None,
        null_context: Tensor | None,
    ) -> Guidance:
        """Stack [unconditional, conditional] unless scale is 1."""
        if scale == 1.0:
            return cls(scale, label, context)
        if label is None and context is None:
            raise UserError(f"guidance = {scale} needs a label or a context to guide towards; use guidance = 1")
        if context is not None and null_context is None:
            raise UserError("guidance with a context needs null_context")
        both = None if label is None else torch.cat([torch.full_like(label, null_label), label])
        contexts = None
        if context is not None and null_context is not None:
            contexts = torch.cat([null_context.expand_as(context), context])
        return cls(scale, both, contexts)

    @property
    def branches(self) -> int:
        """Forwards per video."""
        return 1 if self.scale == 1.0 else 2

    def combine(self, x0: Tensor) -> Tensor:
        """Guide the stacked predictions [branches * B, F, L, C] -> [B, F, L, C]."""
        if self.branches == 1:
            return x0
        unconditional, conditional = x0.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    num_steps: int,
    gap: int,
    schedule: Schedule,
    *,
    guidance: float = 1.0,
    label: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    cache: str = "exact",
    block: int = 1,
    prefix: Tensor | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Turn noise [B, F, L, C] into videos of latents [B, F, L, C] along the AD level matrix.

    num_steps, gap, block: see `ad_levels`. label [B] and context [B, N, D] condition; guidance w gives
    u + w (c - u) on the predicted x0. prefix [B, P, L, C]: given frames that occupy the first P of the F.
    cache: `exact` or `none` (every row computes every frame). on_row(row, rows): progress callback.

    Raises UserError for settings that cannot be sampled exactly.
    """
    batch, num_frames, tokens, _ = noise.shape
    num_prefix = 0 if prefix is None else prefix.shape[1]
    levels = ad_levels(num_frames, num_steps, gap, block, num_prefix)
    _check_cache(model, cache, block, num_prefix)
    guide = Guidance.build(guidance, label, _null_label(model), context, null_context)
    x = noise.clone()
    if prefix is not None:
        x[:, :num_prefix] = prefix.to(x)
    grid = schedule.timesteps(num_steps)
    below = torch.cat([grid[1:], torch.zeros(1, dtype=grid.dtype)])  # the level after each update
    context_tokens = 0 if context is None else context.shape[1]
    kv = KVCache(num_frames, tokens, context_tokens) if cache == "exact" else None
    rows = len(levels) - 1
    for row in range(rows):
        progress = num_steps - levels[row + 1]
        active = levels[row + 1] != levels[row]
        first = kv.num_frames if kv is not None else 0
        last = int(active.nonzero().max()) + 1 if kv is not None else num_frames
        part = slice(first, last)
        t = grid[progress][part].to(x.device).expand(batch, -1)
        x0 = _predict_x0(model, x[:, part], t, schedule, guide, kv)
        if kv is not None:
            kv.keep(int((levels[row][part] == 0).sum()))
        t_next = below[progress][part].to(x.device).expand(batch, -1)
        moved = schedule.ddim_step(x[:, part], x0, t, t_next)
        update = active[part].to(x.device)[None, :, None, None]
        x[:, part] = torch.where(update, moved, x[:, part])
        if on_row is not None:
            on_row(row + 1, rows)
    return x


def _predict_x0(model: Model, x: Tensor, t: Tensor, schedule: Schedule, guide: Guidance, kv: KVCache | None) -> Tensor:
    stacked, t_stacked = x.repeat(guide.branches, 1, 1, 1), t.repeat(guide.branches, 1)
    arguments: dict[str, Any] = {"label": guide.label, "context": guide.context}
    if kv is not None:
        arguments["cache"] = kv
    output = model(stacked, t_stacked, **{key: value for key, value in arguments.items() if value is not None})
    return guide.combine(schedule.to_x0(output, stacked, t_stacked))


def _null_label(model: Model) -> int:
    config = getattr(model, "config", None)
    return getattr(config, "num_classes", 0)


def _check_cache(model: Model, cache: str, block: int, num_prefix: int) -> None:
    if cache not in ("exact", "none"):
        raise UserError(f"cache = '{cache}' must be 'exact' or 'none'")
    config = getattr(model, "config", None)
    if cache == "none" or config is None:
        return
    mask_block = {"frame_causal": 1, "block_causal": config.block}.get(config.mask)
    if config.context != "strict" or mask_block is None:
        raise UserError(
            f"cache = 'exact' needs strict context and a causal mask; this model has context = '{config.context}' and "
            f"mask = '{config.mask}': use cache = 'none'"
        )
    if block % mask_block or num_prefix % mask_block:
        raise UserError(
            f"cache = 'exact' needs blocks and prefix to be multiples of the mask's block of {mask_block} frames, "
            f"found block = {block}, prefix = {num_prefix}: use cache = 'none'"
        )
