"""torch's scaled_dot_product_attention with a boolean mask: the reference, and the CPU backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ardiff.models.attention.masks import FrameMask


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, shape: FrameMask) -> Tensor:
    """q [B, H, Nq, D], k and v [B, H, Nk, D] -> [B, H, Nq, D]."""
    mask = None if shape.is_full else shape.dense(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
