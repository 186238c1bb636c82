"""`sample`: noise in, videos of latents out, along any level matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.sampling.guidance import Denoiser, Guidance, Model
from ardiff.sampling.levels import ADRows, MatrixRows, Rows, SlidingWindow
from ardiff.sampling.rollout import Finished, Noise, Rollout, check_cache
from ardiff.sampling.solvers import Solver

if TYPE_CHECKING:
    from typing_extensions import Unpack

Window = tuple[int, int] | SlidingWindow


class Options(TypedDict, total=False):
    """What `sample`, `sample_levels` and `stream` take alike; `sample` explains it."""

    guidance: float
    label: Tensor | None
    context: Tensor | None
    null_context: Tensor | None
    window: Window | None
    generator: torch.Generator | None
    solver: str
    eta: float


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
    window: Window | None = None,
    block: int = 1,
    prefix: Tensor | None = None,
    generator: torch.Generator | None = None,
    solver: str = "ddim",
    eta: float = 0.0,
    on_row: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Turn noise [B, F, L, C] into videos of latents [B, F, L, C] along the AD level matrix.

    num_steps, gap, block: see `ad_levels`. label [B] and context [B, N, D] condition; guidance w gives
    u + w (c - u) on the predicted x0. prefix [B, P, L, C]: given frames that occupy the first P of the F.
    cache: `exact` or `none` (every row computes every frame). window: (frames, sink), attention limited to the last
    `frames` frames and the first `sink` ones at absolute positions, cached or not; or a `SlidingWindow`, of which the
    network sees nothing but its frames (cache = 'none'). solver, eta: see `Solver`; generator: randomness of eta above
    0. on_row(row, rows): progress callback.

    Raises UserError for settings that cannot be sampled exactly.
    """
    rows = ADRows(noise.shape[1], num_steps, gap, block, 0 if prefix is None else prefix.shape[1])
    rollout = _rollout(
        model,
        rows,
        _frames_of(noise),
        schedule,
        cache,
        prefix,
        guidance=guidance,
        label=label,
        context=context,
        null_context=null_context,
        window=window,
        generator=generator,
        solver=solver,
        eta=eta,
    )
    return collect(rollout, noise, on_row)


@torch.no_grad()
def sample_levels(
    model: Model,
    noise: Tensor,
    levels: Tensor,
    schedule: Schedule,
    *,
    given: Tensor | None = None,
    cache: str = "none",
    on_row: Callable[[int, int], None] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """As `sample`, along any level matrix [rows + 1, F]: interpolation, image to video, pyramids.

    given [B, F, L, C]: its frames that are 0 in the first row of `levels` are kept as they are. Given frames after
    generated ones reach these only under a bidirectional mask.
    """
    rows = MatrixRows(levels)
    if rows.num_frames != noise.shape[1]:
        raise UserError(f"levels of {rows.num_frames} frames do not fit noise of {noise.shape[1]} frames")
    pinned = (levels[0] == 0).nonzero()[:, 0].tolist()
    if pinned and (given is None or given.shape[1] != noise.shape[1]):
        raise UserError(f"levels keep the frames {pinned}: give them as a video of {noise.shape[1]} frames")
    rollout = _rollout(model, rows, _frames_of(noise), schedule, cache, given, **options)
    return collect(rollout, noise, on_row)


def stream(
    model: Model,
    noise: Noise,
    num_steps: int,
    gap: int,
    schedule: Schedule,
    *,
    num_frames: int | None = None,
    cache: str = "exact",
    block: int = 1,
    prefix: Tensor | None = None,
    **options: Unpack[Options],
) -> Iterator[Finished]:
    """As `sample`, but yields frames (first, latents [B, n, L, C]) in order, as soon as they are final.

    noise(first, count) gives the noise [B, count, L, C] of these frames. num_frames None: without end, which takes a
    window; what is held does not grow then.
    """
    rows = ADRows(num_frames, num_steps, gap, block, 0 if prefix is None else prefix.shape[1])
    return iter(_rollout(model, rows, noise, schedule, cache, prefix, **options))


def _frames_of(noise: Tensor) -> Noise:
    """All noise [B, F, L, C] of the videos, to be asked for frames."""
    return lambda first, count: noise[:, first : first + count]


def _rollout(
    model: Model,
    rows: Rows,
    noise: Noise,
    schedule: Schedule,
    cache: str,
    given: Tensor | None,
    *,
    guidance: float = 1.0,
    label: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    window: Window | None = None,
    generator: torch.Generator | None = None,
    solver: str = "ddim",
    eta: float = 0.0,
) -> Rollout:
    batch = noise(0, 0).shape[0]
    return build_rollout(
        model,
        rows,
        noise,
        schedule,
        conditions_of(model, batch, guidance, label, context, null_context),
        cache=cache,
        window=window,
        given=given,
        solver=solver,
        eta=eta,
        step_seeds=_seeds(batch, generator) if eta else None,
    )


def build_rollout(
    model: Model,
    rows: Rows,
    noise: Noise,
    schedule: Schedule,
    guidance: Guidance,
    *,
    cache: str = "exact",
    window: Window | None = None,
    given: Tensor | None = None,
    warm: Tensor | None = None,
    solver: str = "ddim",
    eta: float = 0.0,
    step_seeds: np.ndarray | None = None,
    length: int | None = None,
) -> Rollout:
    """A `Rollout` with everything checked that can be; iterate over it for frames as they finish, or save its state."""
    if cache not in ("exact", "none"):
        raise UserError(f"cache = '{cache}' must be 'exact' or 'none'")
    config = getattr(model, "config", None)
    sliding = window if isinstance(window, SlidingWindow) else None
    band = None if window is None or isinstance(window, SlidingWindow) else window
    if band is None and config is not None and getattr(config, "window", 0) > 0:
        band = (config.window, config.sink)
    if band is not None and (band[0] < 1 or band[1] < 0):
        raise UserError(f"window = {band} must be (frames, sink) with frames >= 1 and sink >= 0")
    if band is not None and config is not None and config.mask == "bidirectional":
        raise UserError(f"window = {band} needs a causal mask; use a SlidingWindow for this bidirectional model")
    if isinstance(rows, MatrixRows):
        _check_reach(rows, config)
    if sliding is not None:
        sliding.check(rows)
    elif cache == "none" and rows.num_frames is None:
        raise UserError("a video without end needs cache = 'exact' or a SlidingWindow")
    block = check_cache(model, rows, sliding, band) if cache == "exact" else 1
    all_at_once = isinstance(rows, ADRows) and rows.gap == 0 and rows.prefix == 0  # nothing is finished before the end
    denoiser = Denoiser(model, schedule, rows.num_steps, guidance, band, sliding)
    return Rollout(
        denoiser,
        rows,
        noise,
        Solver(denoiser.grid, solver, eta),
        cache=cache == "exact" and not all_at_once,
        given=given,
        warm=warm,
        step_seeds=step_seeds,
        block=block,
        length=length,
    )


def _check_reach(rows: MatrixRows, config: object) -> None:
    """Refuse given frames that the others cannot see."""
    pinned = (rows.matrix[0] == 0).nonzero()[:, 0].tolist()
    mask = getattr(config, "mask", "bidirectional")
    if mask != "bidirectional" and pinned != list(range(len(pinned))):
        raise UserError(
            f"frames {pinned} are given, but under a {mask} mask later frames do not reach earlier ones: use a "
            "bidirectional model, or give the first frames only"
        )


def collect(rollout: Rollout, like: Tensor, on_row: Callable[[int, int], None] | None = None) -> Tensor:
    """Run to the end: the whole videos, shaped as `like`."""
    out = torch.empty_like(like)
    while not rollout.done:
        finished = rollout.step()
        if finished is not None:
            out[:, finished.first : finished.first + finished.latents.shape[1]] = finished.latents
        if on_row is not None and rollout.num_rows is not None:
            on_row(rollout.row, rollout.num_rows)
    return out


def _seeds(batch: int, generator: torch.Generator | None) -> np.ndarray:
    return torch.randint(2**62, (batch,), generator=generator).numpy()


def conditions_of(
    model: Model,
    batch_size: int,
    guidance: float,
    label: Tensor | None,
    context: Tensor | None,
    null_context: Tensor | None,
) -> Guidance:
    """The branches of guidance; what is not given comes from the model, where it has a context of its own."""
    if guidance != 1.0 and label is None and context is None and hasattr(model, "contexts"):
        context, null_context = model.contexts(batch_size) or (None, None)
    if context is not None and null_context is None and getattr(model, "null_context", None) is not None:
        null_context = model.null_context.to(context)  # type: ignore[attr-defined]
    null_label = getattr(getattr(model, "config", None), "num_classes", 0)
    return Guidance.build(guidance, label, null_label, context, null_context)
