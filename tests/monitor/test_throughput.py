"""FLOPs against torch's own counter; peaks by device name; the clock."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ardiff.compat.reference.dit import ReferenceDiT
from ardiff.config import load
from ardiff.models import ARVAE, DiT
from ardiff.monitor.throughput import Clock, arvae_flops, dit_block_flops, dit_flops, peak_of

# Every shape and mask there is; models that differ in their data and schedule only are left out.
PRESETS = ["tiny", "base", "ardiff_xl", "pavdm", "pavdm_causal", "ucf101", "reference_sky", "reference_rope"]


def counted(config, backward=False, num_context=0):
    """FLOPs of a clip by torch's counter, of the same network on the device that computes nothing."""
    shape = (1, config.num_frames, config.tokens_per_frame, config.in_channels)
    x, t = torch.empty(shape, device="meta"), torch.zeros(shape[:2], dtype=torch.long, device="meta")
    context = None
    if config.architecture == "reference":
        network = ReferenceDiT(config).to("meta")
        context = torch.empty(1, config.reference.context_tokens, config.reference.context_dim, device="meta")
    else:
        with torch.device("meta"):
            network = DiT(config)
        if num_context:
            context = torch.empty(1, num_context, config.context_dim, device="meta")
    # The kernel that is made of matrix products, which the counter knows; it computes a masked product whole.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = network(x, t, context=context)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", PRESETS)
def test_dit_flops_against_torch(preset):
    config = load(preset).model
    config.depth = min(config.depth, 2)
    forward = counted(config)
    assert dit_flops(config, dense=True) == pytest.approx(forward, rel=1e-9)
    assert 3 * dit_flops(config, dense=True) == pytest.approx(counted(config, backward=True), rel=0.005)


def test_tiny_as_it_is():
    config = load("tiny").model
    assert dit_flops(config, dense=True) == pytest.approx(counted(config), rel=1e-9)
    assert 3 * dit_flops(config, dense=True) == pytest.approx(counted(config, backward=True), rel=0.01)
    config.activation_checkpointing = True
    again = dit_block_flops(config, dense=True)
    assert 3 * dit_flops(config, dense=True) + again == pytest.approx(counted(config, backward=True), rel=0.01)


def test_context_tokens_count():
    config = load("tiny", ["model.context_dim=24"]).model
    assert dit_flops(config, num_context=7, dense=True) == pytest.approx(counted(config, num_context=7), rel=1e-9)
    more = dit_flops(config, num_context=7) - dit_flops(config)
    width, tokens = config.hidden_size, config.num_frames * config.tokens_per_frame
    pairs = 7 * 7 + 7 * tokens  # strict: the context reads itself alone
    assert more == pytest.approx(
        2 * 7 * width * 24 + config.depth * (2 * 7 * width**2 * (4 + 2 * 4) + 4 * pairs * width), rel=1e-9
    )


def test_causal_attention_counts_what_the_mask_needs():
    config = load("ardiff_xl").model
    causal = dit_flops(config)
    config.mask = "bidirectional"
    pairs = 32**2 * (16 * 16 - 16 * 17 / 2)
    assert dit_flops(config) - causal == pytest.approx(28 * 4 * pairs * 1152)
    assert dit_flops(config) == dit_flops(config, dense=True)
    assert 3 * causal == pytest.approx(1.446e12, rel=0.02)  # TFLOP per training clip of the paper's model


def test_blocks_and_windows_count_what_they_read():
    config = load("tiny").model
    per_pair = 4 * config.depth * config.hidden_size * config.tokens_per_frame**2
    none = dit_flops(config) - per_pair * 36  # 8 frames, frame-causal
    config.window, config.sink = 2, 1
    assert dit_flops(config) - none == pytest.approx(per_pair * (1 + 2 + 6 * 3))
    config.window, config.sink, config.mask, config.block = 0, 0, "block_causal", 4
    assert dit_flops(config) - none == pytest.approx(per_pair * (4 * 4 + 4 * 8))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(name, peak):
    assert peak_of(name) == (None if peak is None else peak * 1e12)


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
