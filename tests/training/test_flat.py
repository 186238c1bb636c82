"""Padded ZeRO slices against the canonical vector."""

import pytest
import torch
from training_helpers import FakeZero, counting_parameters

from ardiff.training.flat import FlatState, Span, spans_of


def state(world: int, rank: int, align: int) -> tuple[FlatState, FakeZero]:
    tensors = counting_parameters()
    zero = FakeZero(tensors, world, rank, align)
    return FlatState([zero], {id(tensor): f"p{i}" for i, tensor in enumerate(tensors)}, rank), zero


TOTAL = sum(tensor.numel() for tensor in counting_parameters())


@pytest.mark.parametrize("world", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_slices_of_all_ranks_are_the_canonical_vector(world, align):
    states = [state(world, rank, align)[0] for rank in range(world)]
    parts = [part.export()["group0.master"] for part in states]
    assert torch.equal(torch.cat(parts), torch.arange(TOTAL, dtype=torch.float32))
    for part, stripped in zip(states, parts, strict=True):
        start, end = part.ranges()[0]
        assert len(stripped) == end - start
    assert states[0].layout == [[("p0", [3, 5]), ("p1", [1]), ("p2", [7]), ("p3", [2, 2, 3])]]


def test_load_restores_weights_moments_and_steps_on_another_world():
    vectors = {name: torch.rand(TOTAL) for name in ("master", "exp_avg", "exp_avg_sq")}

    def read(name: str, start: int, end: int) -> torch.Tensor:
        return vectors[name.removeprefix("group0.")][start:end]

    for rank in range(3):
        flat, zero = state(3, rank, align=4)
        padding = torch.ones_like(flat.partitions[0], dtype=torch.bool)
        for span in flat.spans[0]:
            padding[span.local : span.local + span.length] = False
        before = flat.partitions[0].detach().clone()
        flat.load(read, adam_steps=[17])
        assert zero.gathered == 0
        flat.publish()
        start, end = flat.ranges()[0]
        exported = flat.export()
        for name, vector in vectors.items():
            assert torch.equal(exported[f"group0.{name}"], vector[start:end])
        assert torch.equal(flat.partitions[0][padding], before[padding])
        assert flat.adam_steps() == [17] and zero.gathered == 1


def test_before_the_first_step_moments_are_zero():
    flat, _ = state(2, 0, 1)
    assert flat.adam_steps() == [0]
    assert not flat.export()["group0.exp_avg"].any()


def test_slices_go_where_they_are_told():
    """Into the same memory every time, with further vectors beside the known ones."""
    flat, _ = state(2, 0, 4)
    kept: dict[str, torch.Tensor] = {}

    def room(name: str, length: int, like: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(name, torch.full((length,), 9.0, dtype=like.dtype))

    first = flat.export({"ema": [flat.partitions[0] * 2]}, room)
    assert list(first) == ["group0.master", "group0.exp_avg", "group0.exp_avg_sq", "group0.ema"]
    assert torch.equal(first["group0.ema"], 2 * first["group0.master"])
    with torch.no_grad():
        flat.partitions[0].add_(1)
    second = flat.export({"ema": [flat.partitions[0] * 2]}, room)
    assert all(second[name] is first[name] is kept[name] for name in kept)
    start, end = flat.ranges()[0]
    assert torch.equal(second["group0.master"], torch.arange(TOTAL, dtype=torch.float32)[start:end] + 1)


def test_neighbouring_spans_are_merged_only_without_padding_between():
    assert spans_of([3, 4], [0, 3], 0, 8) == [Span(0, 0, 7)]
    assert spans_of([3, 4], [0, 4], 0, 8) == [Span(0, 0, 3), Span(4, 3, 4)]
    assert spans_of([3, 4], [0, 4], 8, 16) == []
