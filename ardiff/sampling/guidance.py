"""One forward of the network for frames at different levels: labels, guidance branches, pieces; clean frames out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.sampling.cache import KVCache
from ardiff.sampling.levels import SlidingWindow

Model = Callable[..., Tensor]  # (x, t, label, context, cache, window) -> raw output, as DiT.forward


@dataclass
class Guidance:
    """Classifier-free guidance: both branches run as one batch, so they share one forward and each has a K/V cache
    of its own in one buffer.
    """

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

    @property
    def context_tokens(self) -> int:
        """N of the context."""
        return 0 if self.context is None else self.context.shape[1]

    def combine(self, x0: Tensor) -> Tensor:
        """Guide the stacked predictions [branches * B, F, L, C] -> [B, F, L, C]."""
        if self.branches == 1:
            return x0
        unconditional, conditional = x0.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


class Denoiser:
    """A network with its schedule and conditions: frames at given levels -> the clean frames it predicts."""

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        num_steps: int,
        guidance: Guidance,
        window: tuple[int, int] | None = None,
        sliding: SlidingWindow | None = None,
    ) -> None:
        prediction = getattr(model, "prediction", schedule.prediction)  # a published network knows what it predicts
        if prediction != schedule.prediction:
            schedule = schedule.predicting(prediction)
        self.model, self.schedule, self.guidance = model, schedule, guidance
        self.window, self.sliding = window, sliding
        self.grid = schedule.grid(num_steps)
        self.frame_forwards = 0  # frames of a video that went through the network, guidance branches not counted

    def __call__(self, x: Tensor, levels: Tensor, active: Tensor, cache: KVCache | None = None) -> Tensor:
        """x0 [B, n, L, C] of frames x at `levels` [n]; those that are `active` [n] are about to be updated."""
        self.frame_forwards += x.shape[1]
        last = len(self.grid.labels) - 1
        t = self.grid.labels[levels].masked_fill((levels == last) & ~active, self.grid.waiting)
        partition = self.sliding.partition if self.sliding else 0
        if not partition or x.shape[1] <= partition:
            return self._whole(x, levels, t, cache)
        return self._in_pieces(x, levels, t, partition)

    def _in_pieces(self, x: Tensor, levels: Tensor, t: Tensor, partition: int) -> Tensor:
        """The frames in pieces of `partition`, of which each fills in what the pieces before it left."""
        assert self.sliding is not None
        step = partition // 2 if self.sliding.lookahead else partition
        starts = list(range(0, x.shape[1] - partition + 1, step))
        if starts[-1] + partition < x.shape[1]:
            starts.append(x.shape[1] - partition)
        found, written = torch.empty_like(x), 0
        for start in starts:
            piece = slice(start, start + partition)
            x0 = self._whole(x[:, piece], levels[piece], t[piece], None)
            found[:, written : start + partition] = x0[:, written - start :]
            written = start + partition
        return found

    def _whole(self, x: Tensor, levels: Tensor, t: Tensor, cache: KVCache | None) -> Tensor:
        branches = self.guidance.branches
        times = t.to(x.device).expand(branches * x.shape[0], -1)
        stacked = x.repeat(branches, 1, 1, 1) if branches > 1 else x
        arguments: dict[str, Any] = {
            "label": self.guidance.label,
            "context": self.guidance.context,
            "cache": cache,
            "window": self.window,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        output = self.model(stacked, times, **given)
        dtype = torch.promote_types(x.dtype, torch.float32)
        data, noise = (
            column[levels].to(device=x.device, dtype=dtype)[None, :, None, None]
            for column in (self.grid.data, self.grid.noise)
        )
        return self.guidance.combine(self.schedule.clean(output, stacked, data, noise))
