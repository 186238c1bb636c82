"""Walking down the rows of a level matrix, recomputing nothing that is finished and nothing that has not begun.

With a cache the K/V of finished frames are kept, and a finished frame is presented once, with the label of a clean
frame (t = 1, or 0 under rectified flow), in the forward that follows its last update. The result equals full
recomputation to rounding. Frames are handed out as they finish, and what is held does not grow with the video where
the attention has a window, so a video may be longer than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed, normals
from ardiff.sampling.cache import KVCache
from ardiff.sampling.guidance import Denoiser
from ardiff.sampling.levels import ADRows, MatrixRows, Rows, SlidingWindow
from ardiff.sampling.solvers import History, Solver

Noise = Callable[[int, int], Tensor]  # (first frame, count) -> noise [B, count, L, C] of these frames


class Finished(NamedTuple):
    """Frames that are final: their number in the video and their latents [B, n, L, C]."""

    first: int
    latents: Tensor


class Rollout:
    """The state of sampling a batch of videos; every `step` is one row, one forward of the network.

    given [B, P, L, C]: the frames that are clean from the start (of a matrix: a whole video, of which they are read).
    warm [B, W, L, C]: a clip whose first frames are noised to the levels of the first row in which no later frame has
    begun, instead of starting from noise alone (PA-VDM, FIFO). step_seeds [B]: randomness of DDIM with eta above 0.
    length: end with so many frames, of rows without end (a sliding window then stays full to the last frame).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rows: Rows,
        noise: Noise,
        solver: Solver,
        *,
        cache: bool,
        given: Tensor | None = None,
        warm: Tensor | None = None,
        step_seeds: np.ndarray | None = None,
        block: int = 1,
        length: int | None = None,
    ) -> None:
        self.denoiser, self.rows, self.noise, self.solver = denoiser, rows, noise, solver
        self.given, self.step_seeds = given, step_seeds
        self.sliding = denoiser.sliding
        self.length = rows.num_frames if length is None else length
        self.row, self.first, self.num_finished = 0, 0, 0
        self.x = noise(0, 0)
        self.history = History.empty(self.x) if solver.name == "dpmpp" else None
        self.cache = self._build_cache(block, 0 if warm is None else warm.shape[1]) if cache else None
        self._unsent: Tensor | None = None  # frames that are clean from the start and not handed out yet
        if warm is not None:
            self._start_warm(warm)
        elif given is not None and isinstance(rows, ADRows):
            self._unsent, self.num_finished = given[:, : rows.prefix].to(self.x), rows.prefix

    def _build_cache(self, block: int, warm_frames: int) -> KVCache:
        window, sink = self.denoiser.window or (0, 0)
        rows, context = self.rows, self.denoiser.guidance.context_tokens
        prefix = rows.prefix if isinstance(rows, ADRows) else int((rows.levels(0, 0, rows.num_frames) == 0).sum())
        live = rows.most_unfinished + 2 * max(block, getattr(rows, "block", 1))  # and those that ride along
        frames = window + sink + max(prefix, warm_frames) + live
        if not window or (rows.num_frames is not None and frames > rows.num_frames):
            if rows.num_frames is None:
                raise UserError("a video without end needs a window: window = (frames, sink), else its cache grows")
            frames = rows.num_frames
        tokens = self.x.shape[2]
        return KVCache(frames, tokens, context, window=window, sink=sink, block=block)

    def _start_warm(self, warm: Tensor) -> None:
        rows, frames = self.rows, warm.shape[1]
        if not isinstance(rows, ADRows) or rows.gap == 0 or frames < rows.prefix:
            raise UserError(f"a start from {frames} given frames needs the AD scheduler with gap of at least 1")
        blocks = -(-frames // rows.block) - rows.prefix // rows.block
        self.row = max(0, (blocks - 1) * rows.gap)
        levels = rows.levels(self.row, 0, frames)
        noise = self.noise(0, frames)
        grid = self.solver.grid
        data, share = (column[levels].to(noise)[None, :, None, None] for column in (grid.data, grid.noise))
        clean = (levels == 0)[None, :, None, None].to(noise.device)
        self.x = torch.where(clean, warm.to(noise), data * warm.to(noise) + share * noise)
        if self.history is not None:
            self.history = History.empty(self.x)
        self.num_finished = int((levels == 0).sum())
        self._unsent = self.x[:, : self.num_finished]

    @property
    def done(self) -> bool:
        """Whether all frames are final."""
        return self.length is not None and self.num_finished >= self.length

    @property
    def num_rows(self) -> int | None:
        """Rows of all; None for a video without end."""
        if self.length is None or self.rows.num_frames is not None or isinstance(self.rows, MatrixRows):
            return self.rows.num_rows
        return replace(self.rows, num_frames=self.length).num_rows

    def __iter__(self) -> Iterator[Finished]:
        """All rows; frames are yielded, in order, as soon as they are final."""
        while not self.done:
            finished = self.step()
            if finished is not None:
                yield finished

    @torch.no_grad()
    def step(self) -> Finished | None:
        """One row; returns the frames that are final from now on."""
        begin, end = self._visible()
        self._hold(begin, end)
        before, after = (self.rows.levels(row, self.first, end) for row in (self.row, self.row + 1))
        active = before != after
        if len(before) and (active.any() or self.cache is not None):
            x0 = self.denoiser(self.x, before, active, self.cache)
            self._update(x0, before, after, active)
        self.row += 1
        clean = int((after > 0).nonzero().min()) if (after > 0).any() else len(after)
        finished = None
        if self.first + clean > self.num_finished:
            if self.length is not None:
                clean = min(clean, self.length - self.first)
            fresh = self.x[:, self.num_finished - self.first : clean].clone()
            finished, self.num_finished = Finished(self.num_finished, fresh), self.first + clean
        if self._unsent is not None and self._unsent.shape[1]:
            parts = [self._unsent] if finished is None else [self._unsent, finished.latents]
            finished = Finished(0, torch.cat(parts, dim=1))
        self._unsent = None
        if self.cache is not None:
            kept = int((before > 0).nonzero().min()) if (before > 0).any() else len(before)
            self.cache.keep(kept)
            self._drop(kept)
        return finished

    def _visible(self) -> tuple[int, int]:
        """The frames that the next forward evaluates."""
        if self.cache is not None:
            return self.cache.num_frames, self.rows.started(self.row)
        if self.sliding is not None:
            return self.sliding.visible(self.rows, self.row, self.num_finished)
        assert self.rows.num_frames is not None
        return 0, self.rows.num_frames

    def _hold(self, begin: int, end: int) -> None:
        """Forget the frames before `begin`, take in those up to `end`."""
        self._drop(begin - self.first)
        held = self.first + self.x.shape[1]
        if end <= held:
            return
        fresh = self.noise(held, end - held)
        if self.given is not None:
            clean = self.rows.levels(0, held, end) == 0
            if clean.any():
                fresh = fresh.clone()
                fresh[:, clean] = self.given[:, held : held + len(clean)][:, clean[: self.given.shape[1] - held]].to(
                    fresh
                )
        self.x = torch.cat([self.x, fresh], dim=1)
        if self.history is not None:
            self.history = self.history.append(History.empty(fresh))

    def _drop(self, count: int) -> None:
        if count <= 0:
            return
        assert self.first + count <= self.num_finished, "a frame would leave the window unfinished"
        self.x, self.first = self.x[:, count:], self.first + count
        if self.history is not None:
            self.history = self.history.drop(count)

    def _update(self, x0: Tensor, before: Tensor, after: Tensor, active: Tensor) -> None:
        moved = self.solver.step(self.x, x0, before, after, self.history, self._step_noise(after, active))
        update = active.to(self.x.device)[None, :, None, None]
        self.x = torch.where(update, moved, self.x)
        if self.history is not None:
            self.history = History(
                torch.where(update, x0, self.history.x0), torch.where(active, before, self.history.level)
            )

    def _step_noise(self, after: Tensor, active: Tensor) -> Tensor | None:
        """Noise [B, n, L, C] of the active frames: a function of the video's seed, the frame and the level."""
        if not self.solver.eta:
            return None
        assert self.step_seeds is not None
        noise = torch.zeros_like(self.x)
        for i in active.nonzero()[:, 0].tolist():
            index = (self.first + i) * (len(self.solver.grid.labels)) + int(after[i])
            for video, seed in enumerate(self.step_seeds.tolist()):
                key = int(hashed(seed, Stream.SAMPLING_STEPS, np.array([index]))[0] >> np.uint64(8))
                drawn = normals(seed, Stream.SAMPLING_STEPS, key, tuple(self.x.shape[2:]))
                noise[video, i] = torch.from_numpy(drawn).to(noise)
        return noise

    def state(self) -> dict[str, Tensor]:
        """Everything that is needed to go on, as tensors (see `restore`)."""
        numbers = [self.row, self.first, self.num_finished]
        found = {"x": self.x}
        if self.history is not None:
            found |= {"history.x0": self.history.x0, "history.level": self.history.level}
        if self.cache is not None:
            numbers += [self.cache.num_frames, self.cache.evicted, self.cache.num_context]
            held = self.cache.held_tokens
            for layer, (k, v) in enumerate(self.cache.buffers):
                found |= {f"cache.{layer}.k": k[:, :, :held], f"cache.{layer}.v": v[:, :, :held]}
        found["numbers"] = torch.tensor(numbers)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken, in a rollout that was built in the same way. Bit-exact on one machine."""
        like = self.x
        numbers = state["numbers"].tolist()
        self.row, self.first, self.num_finished = numbers[:3]
        self._unsent = None
        self.x = state["x"].to(like)
        if self.history is not None:
            self.history = History(state["history.x0"].to(like), state["history.level"])
        if self.cache is not None:
            cache = self.cache
            cache.num_frames, cache.evicted, cache.num_context = numbers[3:]
            cache.buffers.clear()
            for layer in range(sum(name.endswith(".k") for name in state)):
                k, v = (state[f"cache.{layer}.{part}"].to(like.device) for part in "kv")
                cache.buffers.append(
                    tuple(
                        torch.cat([t, t.new_empty(*t.shape[:2], cache.capacity - t.shape[2], t.shape[3])], 2)
                        for t in (k, v)
                    )  # type: ignore[arg-type]
                )


def check_cache(model: object, rows: Rows, sliding: SlidingWindow | None, window: tuple[int, int] | None) -> int:
    """Refuse what cannot be sampled exactly with a cache; returns the block of the model's mask."""
    config = getattr(model, "config", None)
    if sliding is not None:
        raise UserError("cache = 'exact' needs a mask with a window, not frames that leave it: use cache = 'none'")
    if isinstance(rows, MatrixRows) and not rows.is_ordered:
        raise UserError("cache = 'exact' needs levels that never decrease along the frames: use cache = 'none'")
    if config is None:
        return 1
    mask_block = {"frame_causal": 1, "block_causal": config.block}.get(config.mask)
    if config.context != "strict" or mask_block is None:
        raise UserError(
            f"cache = 'exact' needs strict context and a causal mask; this model has context = '{config.context}' and "
            f"mask = '{config.mask}': use cache = 'none'"
        )
    if isinstance(rows, ADRows):
        if rows.block % mask_block or rows.prefix % mask_block:
            raise UserError(
                f"cache = 'exact' needs blocks and prefix to be multiples of the mask's block of {mask_block} frames, "
                f"found block = {rows.block}, prefix = {rows.prefix}: use cache = 'none'"
            )
    else:
        matrix = rows.matrix
        grouped = all(torch.equal(matrix[:, i], matrix[:, i - i % mask_block]) for i in range(matrix.shape[1]))
        if not grouped:
            raise UserError(f"cache = 'exact' needs one level for each block of {mask_block} frames of the mask")
    if window is not None and (window[0] % mask_block or window[1] % mask_block):
        raise UserError(f"window = {window} must be multiples of the mask's block of {mask_block} frames")
    return mask_block
