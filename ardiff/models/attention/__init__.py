"""Attention over frames: one function, several backends.

A sequence is `N` context tokens followed by `F` frames of `L` tokens. Which tokens a query may read depends only on
its frame, so a mask is described by a few numbers and a backend is free to never build it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ardiff.errors import UserError
from ardiff.models.attention.masks import CONTEXTS, MASKS, FrameMask
from ardiff.models.attention.sdpa import sdpa_attention

log = logging.getLogger("ardiff")

Backend = Callable[[Tensor, Tensor, Tensor, FrameMask], Tensor]
_BACKENDS: dict[str, Backend] = {"sdpa": sdpa_attention}


def available_backends() -> list[str]:
    """Names that `frame_attention` accepts on this machine, best first."""
    return list(_BACKENDS)


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    num_context: int = 0,
    mask: str = "frame_causal",
    block: int = 1,
    context: str = "strict",
    backend: str = "auto",
    window: int = 0,
    sink: int = 0,
    evicted: int = 0,
) -> Tensor:
    """Softmax attention in which a frame reads itself, earlier frames and the context.

    q, k, v: [B, H, N + F*L, D] -> [B, H, N + F*L, D]. With a K/V cache q is shorter than k: its tokens are then
    whole frames and the last of the sequence.
    mask: `frame_causal`; `block_causal` (blocks of `block` frames, counted from frame 0, see themselves whole);
    `bidirectional`.
    context: `strict` (context tokens read context tokens only, so no frame can leak through them into an earlier
    one) or `leaky` (they read everything, as in the published AR-Diffusion weights).
    window, sink: a frame reads the last `window` frames, itself included, and the first `sink` ones (0: all earlier
    frames; whole blocks under `block_causal`). evicted: frames after the sink that are missing from k and v.
    backend: one of `available_backends()`, or `auto`.

    Raises UserError for an unknown name or a sequence that is not whole frames.
    """
    if mask not in MASKS or context not in CONTEXTS:
        raise UserError(f"mask '{mask}' must be one of {MASKS} and context '{context}' one of {CONTEXTS}")
    if backend == "auto":
        backend = available_backends()[0]
    if backend not in _BACKENDS:
        raise UserError(f"attention backend '{backend}' is not available here; choose from {available_backends()}")
    shape = FrameMask(
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        tokens_per_frame=tokens_per_frame,
        num_context=num_context,
        mask=mask,
        block=block,
        context=context,
        window=window,
        sink=sink,
        evicted=evicted,
    )
    _announce(backend, q.device.type)
    return _BACKENDS[backend](q, k, v, shape)


@cache
def _announce(backend: str, device: str) -> None:
    log.info("attention kernel: %s on %s (torch %s)", backend, device, torch.__version__)
