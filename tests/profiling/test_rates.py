"""From a step's time to MFU and HFU."""

import pytest

from ardiff.config import load
from ardiff.monitor.throughput import dit_block_flops, dit_flops
from ardiff.profiling.rates import hardware_flops, rates, training_flops


def test_rates_of_the_large_model():
    config = load("ardiff_xl")
    found = rates(config, 1.25, 8, 312e12)
    assert found.clips_per_s == pytest.approx(1024 / 1.25)
    assert found.tokens_per_s == pytest.approx(1024 / 1.25 * 512)
    per_device = 1024 / 1.25 / 8
    assert found.mfu == pytest.approx(per_device * 3 * dit_flops(config.model) / 312e12)
    assert found.mfu_dense == pytest.approx(per_device * 3 * dit_flops(config.model, dense=True) / 312e12)
    assert found.mfu < found.mfu_dense and found.hfu == found.mfu


def test_hardware_counts_what_is_computed_again():
    config = load("ardiff_xl", ["model.activation_checkpointing=true"])
    found = rates(config, 1.0, 8, 312e12)
    again = dit_block_flops(config.model) / (3 * dit_flops(config.model))
    assert found.hfu / found.mfu == pytest.approx(1 + again)
    assert 0.33 < again < 1 / 3  # all but the ends, of three forward passes
    assert hardware_flops(config.model) - training_flops(config.model) == dit_block_flops(config.model)


def test_no_share_of_an_unknown_peak():
    found = rates(load("tiny"), 0.5, 1, None)
    assert (found.mfu, found.hfu, found.mfu_dense, found.hfu_dense) == (None,) * 4
    assert found.tflops_per_device > 0
