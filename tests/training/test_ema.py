"""The sharded moving averages."""

import math

import pytest
import torch

from ardiff.training.ema import ShardedEMA, ema_name

ALL = [True, True]


class FakeZero:
    """Two groups; `failing` is raised instead of telling the model."""

    def __init__(self) -> None:
        self.single_partition_of_fp32_groups = [torch.zeros(3), torch.zeros(2)]
        self.model: list[torch.Tensor] = []
        self.failing: BaseException | None = None
        self.update_lp_params()

    def update_lp_params(self) -> None:
        if self.failing is not None:
            raise self.failing
        self.model = [part.clone() for part in self.single_partition_of_fp32_groups]

    def fill(self, value: float) -> None:
        for part in self.single_partition_of_fp32_groups:
            part.fill_(value)

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for part in self.single_partition_of_fp32_groups:
            part.copy_(torch.randn(part.shape, generator=generator))


def trained(decays: list[float], steps: int = 200) -> tuple[FakeZero, ShardedEMA]:
    """Weights and averages after some random steps."""
    zero = FakeZero()
    ema = ShardedEMA(zero, decays)
    for step in range(steps):
        zero.randomise(step)
        ema.update(ALL)
    zero.update_lp_params()
    return zero, ema


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_average_follows_its_definition_with_warm_up():
    decays = [0.5, 0.99, 0.0]
    zero = FakeZero()
    ema = ShardedEMA(zero, decays)
    expected = dict.fromkeys(decays, 0.0)
    for n in range(20):
        zero.fill(n + 1.0)
        ema.update([True, False])
        for decay in decays:
            now = min(decay, (1 + n) / (10 + n))
            expected[decay] = now * expected[decay] + (1 - now) * (n + 1.0)
    vectors = ema.vectors()
    assert list(vectors) == ["ema", "ema_0.99", "ema_0.0"] and ema.decays == decays
    for decay, (learning, frozen) in zip(decays, vectors.values(), strict=True):
        assert learning.tolist() == pytest.approx([expected[decay]] * 3)
        assert frozen.tolist() == [0.0, 0.0]
    assert expected[0.0] == 20 > expected[0.5] > expected[0.99] + 0.5


def test_the_main_average_is_that_of_a_run_without_others_to_the_last_bit():
    zero, alone = trained([0.9])
    _, ema = trained([0.9, 0.999, 0.5])
    expected = [torch.zeros(3), torch.zeros(2)]
    for step in range(200):
        zero.randomise(step)
        for average, master in zip(expected, zero.single_partition_of_fp32_groups, strict=True):
            average.lerp_(master, 1 - min(0.9, (1 + step) / (10 + step)))
    assert same(alone.vectors()["ema"], expected) and same(ema.vectors()["ema"], expected)
    assert ema.num_updates == [200, 200]


def test_names_are_those_of_the_decays():
    assert [ema_name(decay) for decay in (0.999, 0.9999, 0, 1e-5)] == [
        "ema_0.999",
        "ema_0.9999",
        "ema_0.0",
        "ema_1e-05",
    ]
    assert list(ShardedEMA(FakeZero(), [0.9999]).vectors()) == ["ema"]


def test_averages_are_written_in_place_through_vectors():
    """As a checkpoint restores them."""
    zero, ema = trained([0.9, 0.99])
    for name, parts in ema.vectors().items():
        for part in parts:
            part.fill_(2.0 if name == "ema" else 3.0)
    with ema.swapped_in("ema_0.99"):
        assert zero.model[0].tolist() == [3.0] * 3
    with ema.swapped_in():
        assert zero.model[1].tolist() == [2.0] * 2


@pytest.mark.parametrize("vector", ["ema", "ema_0.99"])
@pytest.mark.parametrize("error", [None, RuntimeError("inside"), KeyboardInterrupt("inside")])
def test_swap_is_undone_bitwise_even_after_an_error(vector, error):
    zero, ema = trained([0.9, 0.99])
    zero.single_partition_of_fp32_groups[0].copy_(torch.tensor([0.1, -0.0, math.nan]))
    zero.update_lp_params()
    before = [part.clone().view(torch.int32) for part in zero.single_partition_of_fp32_groups]
    averages = [[part.clone() for part in parts] for parts in ema.vectors().values()]

    def swap():
        with ema.swapped_in(vector):
            assert same(zero.model, ema.vectors()[vector])
            if error is not None:
                raise error

    if error is None:
        swap()
    else:
        with pytest.raises(type(error), match="inside"):
            swap()
    assert same([part.view(torch.int32) for part in zero.single_partition_of_fp32_groups], before)
    assert same([part.view(torch.int32) for part in zero.model], before)
    assert all(map(same, averages, ema.vectors().values()))  # and the averages were not touched


@pytest.mark.parametrize("failing", [ValueError("lost a rank"), KeyboardInterrupt("lost a rank")])
def test_a_failing_exchange_leaves_no_averaged_master_weights(failing):
    zero, ema = trained([0.9])
    before = [part.clone() for part in zero.single_partition_of_fp32_groups]
    zero.failing = failing
    told = RuntimeError if isinstance(failing, Exception) else KeyboardInterrupt
    with pytest.raises(told, match="lost a rank") as caught, ema.swapped_in():
        pytest.fail("the block must not be entered")
    assert same(zero.single_partition_of_fp32_groups, before)
    if told is RuntimeError:
        assert "start again" in str(caught.value) and caught.value.__cause__ is failing


def test_an_exchange_that_fails_on_the_way_back_is_told_with_what_happened_inside():
    zero, ema = trained([0.9])
    before = [part.clone() for part in zero.single_partition_of_fp32_groups]
    with pytest.raises(RuntimeError, match="could not be exchanged") as caught, ema.swapped_in():
        zero.failing = ValueError("lost a rank")
        raise ArithmeticError("inside")
    assert same(zero.single_partition_of_fp32_groups, before)
    assert isinstance(caught.value.__cause__, ValueError)
    assert isinstance(caught.value.__cause__.__context__, ArithmeticError)


def test_frozen_groups_keep_their_average_and_warm_up_when_they_begin_to_learn():
    zero = FakeZero()
    ema = ShardedEMA(zero, [0.9, 0.999])
    zero.fill(1.0)
    for _ in range(200):
        ema.update([True, False])
    assert all(parts[1].tolist() == [0.0, 0.0] for parts in ema.vectors().values())
    ema.update(ALL)
    for parts in ema.vectors().values():
        assert parts[1].tolist() == pytest.approx([0.9] * 2)  # decay 1 / 10, as at the start of a run
    assert ema.num_updates == [201, 1]


def test_groups_settle_at_their_main_average_under_every_decay():
    zero, ema = trained([0.9, 0.999, 0.1])
    main = [part.clone() for part in ema.vectors()["ema"]]
    others = [[part.clone() for part in parts] for parts in ema.vectors().values()][1:]
    last = [part.clone() for part in zero.single_partition_of_fp32_groups]
    assert all(not same(parts, main) for parts in others)
    ema.settle([False, True])
    assert same(zero.single_partition_of_fp32_groups, [main[0], last[1]]) and same(zero.model, [main[0], last[1]])
    assert same(ema.vectors()["ema"], main)
    for parts, before in zip(list(ema.vectors().values())[1:], others, strict=True):
        assert same(parts, [main[0], before[1]])
    ema.update([False, True])
    for vector in ema.vectors():  # the part that stands still is the same whichever average is chosen
        with ema.swapped_in(vector):
            assert torch.equal(zero.model[0], main[0])


def test_decays_must_differ():
    for decays in ([], [0.9, 0.9]):
        with pytest.raises(AssertionError):
            ShardedEMA(FakeZero(), decays)
