import math

import pytest
import torch

from ardiff.errors import UserError
from ardiff.models.attention import available_backends, frame_attention
from ardiff.models.attention.masks import FrameMask

FRAMES = 5
MASKS = [("frame_causal", 1), ("block_causal", 1), ("block_causal", 2), ("block_causal", 3), ("bidirectional", 1)]
KINDS = [
    (mask, block, context, num_context, length)
    for mask, block in MASKS
    for context in ("strict", "leaky")
    for num_context in (0, 3)
    for length in (1, 4)
]


def may_read(query, key, mask, block, context, num_context, length):
    """The rule as DESIGN.md states it, token by token."""
    if query < num_context:
        return context == "leaky" or key < num_context
    if key < num_context or mask == "bidirectional":
        return True
    query_frame, key_frame = (query - num_context) // length, (key - num_context) // length
    if mask == "block_causal":
        return key_frame // block <= query_frame // block
    return key_frame <= query_frame


def explicit(q, k, v, *kind):
    """One softmax per query over the keys it may read."""
    first = k.shape[2] - q.shape[2]  # queries are the last tokens
    rows = []
    for query in range(q.shape[2]):
        keys = [key for key in range(k.shape[2]) if may_read(first + query, key, *kind)]
        scores = (k[:, :, keys] @ q[:, :, query, :, None])[..., 0] / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, keys]).sum(2))
    return torch.stack(rows, dim=2)


def tensors(num_tokens, **options):
    return [torch.randn(2, 2, num_tokens, 4, dtype=torch.float64, **options) for _ in range(3)]


def call(q, k, v, mask, block, context, num_context, length, **options):
    return frame_attention(q, k, v, length, num_context, mask=mask, block=block, context=context, **options)


def where(backend):
    """Device, dtype and tolerance for a backend: kernels for GPUs know neither CPU nor float64."""
    if backend == "sdpa":
        return torch.device("cpu"), torch.float64, 1e-13
    return torch.device("cuda"), torch.float32, 5e-3


def test_there_is_a_backend():
    assert "sdpa" in available_backends()


@pytest.mark.parametrize("backend", ["auto", *available_backends()])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_attention_equals_an_explicit_softmax(backend, kind):
    q, k, v = tensors(kind[3] + FRAMES * kind[4])
    device, dtype, tolerance = where("sdpa" if backend == "auto" else backend)
    out = call(*(part.to(device, dtype) for part in (q, k, v)), *kind, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), explicit(q, k, v, *kind), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_gradients_equal_those_of_an_explicit_softmax(backend, kind):
    inputs = tensors(kind[3] + FRAMES * kind[4], requires_grad=True)
    device, dtype, tolerance = where(backend)
    weight = torch.randn_like(inputs[0])
    expected = torch.autograd.grad((explicit(*inputs, *kind) * weight).sum(), inputs)
    out = call(*(part.to(device, dtype) for part in inputs), *kind, backend=backend)
    found = torch.autograd.grad((out.double().cpu() * weight).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("new_frames", [1, 2, FRAMES])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_the_last_frames_alone_give_the_tail_of_the_full_result(backend, new_frames, kind):
    device, dtype, tolerance = where(backend)
    q, k, v = (part.to(device, dtype) for part in tensors(kind[3] + FRAMES * kind[4]))
    new = new_frames * kind[4]
    full = call(q, k, v, *kind, backend=backend)
    tail = call(q[:, :, -new:], k, v, *kind, backend=backend)
    torch.testing.assert_close(tail, full[:, :, -new:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_context", [0, 3])
def test_the_weight_of_a_hidden_key_is_exactly_zero(num_context):
    # huge: a weight that is only nearly zero (a mask of -1e4, say) would show
    q, k, v = tensors(num_context + FRAMES * 2)
    before = frame_attention(q, k, v, 2, num_context)
    k[:, :, -2:] = 1e300
    after = frame_attention(q, k, v, 2, num_context)
    assert torch.equal(before[:, :, :-2], after[:, :, :-2])


def test_full_masks_are_recognised_exactly():
    # is_full lets a backend drop the mask: it must be true only where the dense mask is all True
    for mask, block, context, num_context, length in KINDS:
        for frames in (1, 2, FRAMES):
            keys = num_context + frames * length
            for queries in {length, min(2, frames) * length, frames * length, keys}:
                shape = FrameMask(queries, keys, length, num_context, mask, block, context)
                dense = shape.dense(torch.device("cpu"))
                assert dense.shape == (queries, keys)
                assert not shape.is_full or bool(dense.all()), shape


@pytest.mark.parametrize("num_context", [1, 4, 6])
def test_context_without_video_reads_itself(num_context):
    q, k, v = tensors(num_context)
    expected = explicit(q, k, v, "bidirectional", 1, "strict", num_context, 4)
    torch.testing.assert_close(frame_attention(q, k, v, 4, num_context), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "causal"}, "causal"),
        ({"context": "loose"}, "loose"),
        ({"backend": "magic"}, "magic"),
        ({"tokens_per_frame": 3}, "whole frames of 3"),
        ({"tokens_per_frame": 0}, "whole frames of 0"),
        ({"num_context": 1}, "1 context tokens"),
        ({"num_context": 12}, "12 context tokens"),
        ({"num_context": -4}, "-4"),
        ({"mask": "block_causal", "block": 0}, "block"),
    ],
)
def test_bad_names_and_sizes_are_refused(options, message):
    q, k, v = tensors(8)
    with pytest.raises(UserError, match=message):
        frame_attention(q, k, v, **{"tokens_per_frame": 4, **options})


@pytest.mark.parametrize(
    ("queries", "keys", "num_context"),
    [(12, 8, 0), (3, 8, 0), (10, 15, 3), (14, 15, 3)],
    ids=["more queries than keys", "half a frame", "ends in half a frame", "part of the context"],
)
def test_queries_that_are_not_the_last_whole_frames_are_refused(queries, keys, num_context):
    q = torch.randn(1, 1, queries, 4)
    k = torch.randn(1, 1, keys, 4)
    with pytest.raises(UserError):
        frame_attention(q, k, k, 4, num_context)
