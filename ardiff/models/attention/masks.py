"""What a query token may read, described by sizes and, for backends that need it, as a boolean matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ardiff.errors import UserError

MASKS = ("frame_causal", "block_causal", "bidirectional")
CONTEXTS = ("strict", "leaky")


@dataclass(frozen=True)
class FrameMask:
    """A mask over `num_context` context tokens and whole frames; the queries are the last `num_queries` tokens.

    window: frames that a frame reads at most, itself (its block) included, besides the first `sink` frames; 0: all.
    evicted: frames of the video that are missing among the keys, between the sink and the rest.
    """

    num_queries: int
    num_keys: int
    tokens_per_frame: int
    num_context: int = 0
    mask: str = "frame_causal"
    block: int = 1
    context: str = "strict"
    window: int = 0
    sink: int = 0
    evicted: int = 0

    def __post_init__(self) -> None:
        if self.num_context < 0 or self.block < 1:
            raise UserError(f"num_context = {self.num_context} must be at least 0 and block = {self.block} at least 1")
        if self.window < 0 or self.sink < 0 or self.window % self.block or self.sink % self.block:
            raise UserError(
                f"window = {self.window} and sink = {self.sink} frames must be multiples of block = {self.block}"
            )
        if self.window and self.mask == "bidirectional":
            raise UserError(f"window = {self.window} frames needs a causal mask; this one is bidirectional")
        video, length = self.num_keys - self.num_context, self.tokens_per_frame
        if length < 1 or video < 0 or video % length:
            raise UserError(
                f"{self.num_keys} tokens are not {self.num_context} context tokens plus whole frames of {length}"
            )
        cached = self.num_keys - self.num_queries
        if cached < 0 or (cached and (cached < self.num_context or (cached - self.num_context) % length)):
            raise UserError(
                f"{self.num_queries} query tokens of {self.num_keys}: with a cache the queries must be the last "
                f"whole frames of {length} tokens"
            )

    @property
    def is_full(self) -> bool:
        """True when every query may read every key."""
        if self.window and self.num_keys - self.num_context > self.window * self.tokens_per_frame:
            return False
        bidirectional = self.mask == "bidirectional"
        if bidirectional or self.num_keys - self.num_context == self.tokens_per_frame:
            no_context_queries = self.num_queries <= self.num_keys - self.num_context
            return no_context_queries or self.context == "leaky" or self.num_context == self.num_keys
        return self.num_queries == self.tokens_per_frame  # the last frame alone reads everything before it

    def dense(self, device: torch.device) -> Tensor:
        """The mask as booleans [num_queries, num_keys], True where reading is allowed."""
        return _dense(self, device)


@lru_cache(maxsize=64)
def _dense(shape: FrameMask, device: torch.device) -> Tensor:
    token = torch.arange(shape.num_keys, device=device)
    is_context = token < shape.num_context
    frame = (token - shape.num_context).div(shape.tokens_per_frame, rounding_mode="floor")
    frame = torch.where(frame < shape.sink, frame, frame + shape.evicted)
    block = frame if shape.mask == "frame_causal" else frame.div(shape.block, rounding_mode="floor")
    if shape.mask == "bidirectional":
        block = torch.zeros_like(block)
    size = 1 if shape.mask == "frame_causal" else shape.block
    sink, window = shape.sink // size, shape.window // size
    block = torch.where(is_context, torch.full_like(block, -1), block)  # every frame reads the context
    query = slice(shape.num_keys - shape.num_queries, None)
    rows, columns = block[query, None], block[None, :]
    allowed = columns <= rows
    if shape.window:
        allowed &= (rows - columns < window) | (columns < sink)
    if shape.context == "leaky":
        allowed |= is_context[query, None]
    return allowed
