"""The sharded moving average."""

import pytest
import torch

from ardiff.training.ema import ShardedEMA


class FakeZero:
    def __init__(self) -> None:
        self.single_partition_of_fp32_groups = [torch.zeros(3), torch.zeros(2)]
        self.model: list[torch.Tensor] = []
        self.update_lp_params()

    def update_lp_params(self) -> None:
        self.model = [part.clone() for part in self.single_partition_of_fp32_groups]


def test_follows_the_definition_with_warm_up():
    zero = FakeZero()
    ema = ShardedEMA(zero, decay=0.5)
    expected = 0.0
    for n in range(20):
        zero.single_partition_of_fp32_groups[0].fill_(n + 1.0)
        ema.update([True] * len(ema.partitions))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1.0)
    assert ema.partitions[0].tolist() == pytest.approx([expected] * 3)
    assert ema.partitions[1].tolist() == [0.0, 0.0]


def test_swap_is_undone_bitwise_even_after_an_error():
    zero = FakeZero()
    ema = ShardedEMA(zero, decay=0.9)
    zero.single_partition_of_fp32_groups[0].copy_(torch.tensor([0.1, 0.2, 0.3]))
    zero.update_lp_params()
    before = [part.clone() for part in zero.single_partition_of_fp32_groups]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        assert torch.equal(zero.model[0], ema.partitions[0])
        raise RuntimeError("inside")
    for part, model, expected in zip(zero.single_partition_of_fp32_groups, zero.model, before, strict=True):
        assert torch.equal(part, expected) and torch.equal(model, expected)


def test_frozen_groups_keep_their_average_and_warm_up_when_they_begin_to_learn():
    zero = FakeZero()
    ema = ShardedEMA(zero, decay=0.9)
    for part in zero.single_partition_of_fp32_groups:
        part.fill_(1.0)
    for _ in range(200):
        ema.update([True, False])
    assert ema.partitions[1].tolist() == [0.0, 0.0]
    ema.update([True, True])
    assert ema.partitions[1].tolist() == pytest.approx([0.9] * 2)  # decay 1 / 10, as at the start of a run
    assert ema.num_updates == [201, 1]


def test_groups_settle_at_their_average():
    zero = FakeZero()
    ema = ShardedEMA(zero, decay=0.9)
    for part in zero.single_partition_of_fp32_groups:
        part.fill_(1.0)
    ema.update([True, True])
    average = ema.partitions[0].clone()
    ema.settle([False, True])
    assert torch.equal(zero.single_partition_of_fp32_groups[0], average) and torch.equal(zero.model[0], average)
    assert zero.single_partition_of_fp32_groups[1].tolist() == [1.0, 1.0]
