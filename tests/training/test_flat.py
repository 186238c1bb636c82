"""Padded ZeRO slices against the canonical vector."""

import pytest
import torch

from ardiff.training.flat import FlatState, Span, spans_of


class FakeZero:
    """The parts of DeepSpeed's ZeRO optimizer that FlatState reads, built by hand for one group."""

    def __init__(self, parameters: list[torch.Tensor], world: int, rank: int, align: int) -> None:
        offsets, end = [], 0
        for parameter in parameters:
            end += -end % align
            offsets.append(end)
            end += parameter.numel()
        size = -(-end // (2 * world)) * 2
        padded = torch.full((size * world,), -1.0)
        for parameter, offset in zip(parameters, offsets, strict=True):
            padded[offset : offset + parameter.numel()] = parameter.flatten()
        self.round_robin_bit16_groups = [parameters]
        self.round_robin_bit16_offsets = [offsets]
        self.partition_size = [size]
        self.single_partition_of_fp32_groups = [padded[rank * size : (rank + 1) * size].clone().requires_grad_()]
        self.optimizer = torch.optim.AdamW(self.single_partition_of_fp32_groups)
        self.gathered = 0

    def update_lp_params(self) -> None:
        self.gathered += 1


def parameters() -> list[torch.Tensor]:
    shapes = [(3, 5), (1,), (7,), (2, 2, 3)]
    start, result = 0, []
    for shape in shapes:
        numel = torch.Size(shape).numel()
        result.append(torch.arange(start, start + numel, dtype=torch.float32).reshape(shape))
        start += numel
    return result


def state(world: int, rank: int, align: int) -> tuple[FlatState, FakeZero]:
    tensors = parameters()
    zero = FakeZero(tensors, world, rank, align)
    return FlatState([zero], {id(tensor): f"p{i}" for i, tensor in enumerate(tensors)}, rank), zero


TOTAL = sum(tensor.numel() for tensor in parameters())


@pytest.mark.parametrize("world", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_slices_of_all_ranks_are_the_canonical_vector(world, align):
    states = [state(world, rank, align)[0] for rank in range(world)]
    parts = [part.strip(0, part.partitions[0]) for part in states]
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


def test_neighbouring_spans_are_merged_only_without_padding_between():
    assert spans_of([3, 4], [0, 3], 0, 8) == [Span(0, 0, 7)]
    assert spans_of([3, 4], [0, 4], 0, 8) == [Span(0, 0, 3), Span(4, 3, 4)]
    assert spans_of([3, 4], [0, 4], 8, 16) == []
