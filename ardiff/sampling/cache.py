"""Keys and values of finished frames.

A finished frame no longer changes and nothing it reads changes either, so its K/V are computed once: it rides along
in the forward that follows its last update and is kept from then on.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Per-layer K/V of the context and of the first `num_frames` frames, in buffers of fixed size.

    `extend` appends the tokens of one forward behind what is kept; `keep` then decides how many of the new frames
    stay. The rest is overwritten by the next forward.
    """

    def __init__(self, max_frames: int, tokens_per_frame: int, context_tokens: int = 0) -> None:
        self.capacity = context_tokens + max_frames * tokens_per_frame
        self.tokens_per_frame, self.context_tokens = tokens_per_frame, context_tokens
        self.num_frames = 0
        self.num_context = 0  # 0 until the first forward has written the context
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H, new, D] of one layer; returns all K and V [B, H, kept + new, D] (views)."""
        if layer == len(self._buffers):
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._buffers.append((k.new_empty(shape), v.new_empty(shape)))
        start = self.num_context + self.num_frames * self.tokens_per_frame
        end = start + k.shape[2]
        keys, values = self._buffers[layer]
        assert end <= keys.shape[2], f"{end} tokens in a cache of {keys.shape[2]}"
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, num_frames: int) -> None:
        """Keep the context and the first `num_frames` of the frames that the last forward appended."""
        self.num_context = self.context_tokens
        self.num_frames += num_frames

    @property
    def num_bytes(self) -> int:
        """Memory held by the buffers."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._buffers for tensor in pair)
