"""Throughput: FLOPs of a clip (the DiT has a closed formula), peak rates of known devices, the clock of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ardiff.config import ModelConfig, VAEConfig
from ardiff.models import build_arvae

# Dense bf16 FLOP/s without sparsity, from the data sheets. Unknown devices have no MFU rather than a flattering one.
PEAK_FLOPS = {"A800": 312e12, "A100": 312e12, "H800": 989e12, "H100": 989e12, "H200": 989e12}


def dit_flops(config: ModelConfig, num_frames: int | None = None) -> float:
    """Forward FLOPs of one clip; training costs three times as much.

    A multiply-add counts 2. Attention is counted as the mask needs it: frame i reads i + 1 frames.
    """
    frames = num_frames or config.num_frames
    width, tokens = config.hidden_size, frames * config.tokens_per_frame
    linear = 2 * tokens * width * width * (4 + 2 * config.mlp_ratio)
    modulation = 2 * frames * width * 6 * width
    pairs = config.tokens_per_frame**2 * (frames * (frames + 1) / 2 if config.mask == "frame_causal" else frames**2)
    attention = 2 * 2 * pairs * width
    ends = 2 * tokens * width * 2 * config.in_channels + 2 * frames * width * (2 * width + width + 256)
    return config.depth * (linear + modulation + attention) + ends


def arvae_flops(config: VAEConfig, num_frames: int = 1) -> float:
    """Forward FLOPs of encoding and decoding a clip, as torch counts them (a masked product as a whole one).

    num_frames: above 1 with the parts of a temporal decoder that read other frames. What training adds besides three
    times this (a discriminator, a perceptual loss) or saves (frozen parameters) is not in it.
    """
    with torch.device("meta"):
        network = build_arvae(config)
        video = torch.empty(1, num_frames, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            network.decode(network.encode(video), temporal=num_frames > 1)
    return float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device by its name, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Clock:
    """Wall time of the steps since the last report, and the part of it spent waiting for data or in pauses."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._begin, self._waited, self._paused, self._steps = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (checkpoints, samples) does not count as training."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def step(self) -> None:
        """One optimizer step is done."""
        self._steps += 1

    def report(self) -> dict[str, float]:
        """Seconds per step, and of them those spent waiting for data, also as a share; begins a new interval."""
        elapsed = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        steps, waited = max(self._steps, 1), self._waited
        self.reset()
        return {
            "steps": steps,
            "seconds_per_step": elapsed / steps,
            "data_wait_seconds": waited,
            "data_wait_frac": waited / elapsed,
        }
