"""Keys and values of finished frames.

A finished frame no longer changes and nothing it reads changes either, so its K/V are computed once: it rides along
in the forward that follows its last update and is kept from then on, or until no later frame can read it.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Per-layer K/V of the context and of the first `num_frames` frames, in buffers of fixed size.

    `extend` appends the tokens of one forward behind what is kept; `keep` then decides how many of the new frames
    stay. The rest is overwritten by the next forward. With a window of `window` frames (whole blocks of `block`) only
    the first `sink` frames and those that the next frame can read are held; `evicted` counts the others.

    max_frames: frames that are held and appended at most.
    """

    def __init__(
        self,
        max_frames: int,
        tokens_per_frame: int,
        context_tokens: int = 0,
        *,
        window: int = 0,
        sink: int = 0,
        block: int = 1,
    ) -> None:
        self.capacity = context_tokens + max_frames * tokens_per_frame
        self.tokens_per_frame, self.context_tokens = tokens_per_frame, context_tokens
        self.window, self.sink, self.block = window, sink, block
        self.num_frames = 0  # that are finished, held or not
        self.evicted = 0  # of them, the frames after the sink that are no longer held
        self.num_context = 0  # 0 until the first forward has written the context
        self.buffers: list[tuple[Tensor, Tensor]] = []  # one pair [B, H, capacity, D] per layer

    @property
    def held_tokens(self) -> int:
        """Tokens that are kept at present."""
        return self.num_context + (self.num_frames - self.evicted) * self.tokens_per_frame

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H, new, D] of one layer; returns all K and V [B, H, kept + new, D] (views)."""
        if layer == len(self.buffers):
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.buffers.append((k.new_empty(shape), v.new_empty(shape)))
        start = self.held_tokens
        end = start + k.shape[2]
        keys, values = self.buffers[layer]
        assert end <= keys.shape[2], f"{end} tokens in a cache of {keys.shape[2]}"
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, num_frames: int) -> None:
        """Keep the context and the first `num_frames` of the frames that the last forward appended."""
        self.num_context = self.context_tokens
        self.num_frames += num_frames
        # The next frame begins a block and reads `window - block` frames before it.
        surplus = self.num_frames - self.evicted - self.sink - (self.window - self.block) if self.window else 0
        if surplus > 0:
            self._evict(surplus)

    def _evict(self, num_frames: int) -> None:
        end = self.held_tokens
        start = self.num_context + self.sink * self.tokens_per_frame
        gone = num_frames * self.tokens_per_frame
        for pair in self.buffers:
            for buffer in pair:
                buffer[:, :, start : end - gone] = buffer[:, :, start + gone : end].clone()  # the two overlap
        self.evicted += num_frames

    @property
    def num_bytes(self) -> int:
        """Memory held by the buffers."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.buffers for tensor in pair)
