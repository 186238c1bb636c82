"""FLOPs against torch's own counter; the clock."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ardiff.config import load
from ardiff.models import ARVAE, DiT
from ardiff.monitor.throughput import Clock, arvae_flops, dit_flops


def test_dit_flops_against_torch():
    config = load("tiny").model
    config.mask = "bidirectional"  # torch counts a masked product as a whole one
    network = DiT(config)
    x = torch.randn(1, config.num_frames, config.tokens_per_frame, config.in_channels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # its matmuls are counted
        network(x, torch.zeros(1, config.num_frames, dtype=torch.long))
    assert dit_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_causal_attention_counts_what_the_mask_needs():
    config = load("ardiff_xl").model
    causal = dit_flops(config)
    config.mask = "bidirectional"
    pairs = 32**2 * (16 * 16 - 16 * 17 / 2)
    assert dit_flops(config) - causal == pytest.approx(28 * 4 * pairs * 1152)
    assert 3 * causal == pytest.approx(1.446e12, rel=0.02)  # TFLOP per training clip of the paper's model


def test_arvae_flops_against_torch():
    config = load("arvae_tiny").vae
    network = ARVAE(config)
    video = torch.rand(1, 1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.decode(network.encode(video))
    assert arvae_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_clock_separates_waiting_and_pauses():
    clock = Clock()
    for _ in range(2):
        with clock.waiting_for_data():
            time.sleep(0.02)
        time.sleep(0.02)
        clock.step()
    with clock.paused():
        time.sleep(0.3)
    report = clock.report()
    assert 0.035 < report["seconds_per_step"] < 0.15
    assert 0.2 < report["data_wait_frac"] < 0.8
