"""Throughput: FLOPs of a clip (the DiT has a closed formula), peak rates of known devices, the clock of a step."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ardiff.config import ModelConfig, VAEConfig
from ardiff.models import build_arvae
from ardiff.models.attention.masks import FrameMask
from ardiff.models.embeddings import SINUSOIDS

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets (A100, A800: 312; H100, H200 and H800 SXM: 1,979 with
# sparsity; H100 and H800 PCIe: 1,513; H100 and H200 NVL: 1,671), by the names that the driver gives; the first that
# fits counts. Unknown devices, and parts of one (MIG), have no MFU rather than a flattering one.
PEAK_FLOPS = (
    (r"MIG", None),
    (r"\b(A100|A800)\b", 312e12),
    (r"\b(H100|H200|H800) NVL\b", 835.5e12),
    (r"\b(H100|H800) PCIe\b", 756.5e12),
    (r"\b(H100|H200|H800)\b", 989.5e12),
)
TRAINING = 3  # forward passes that a training step costs: the backward pass is two


def dit_flops(
    config: ModelConfig, num_frames: int | None = None, num_context: int | None = None, dense: bool = False
) -> float:
    """Forward FLOPs of one clip; training costs three times as much, and `dit_block_flops` more where blocks are
    computed again (activation checkpointing).

    A multiply-add counts 2; only matrix products count, as in torch's FlopCounterMode. Attention is counted as the mask
    needs it (frame-causal: frame i reads i + 1 frames), or with `dense` as if every token read every other, which is
    what a kernel with a dense mask computes.

    num_context: tokens in front of the frames (None: those of the published networks, otherwise none, since the length
    of a text is the data's).
    """
    frames = num_frames or config.num_frames
    width, tokens = config.hidden_size, frames * config.tokens_per_frame
    context = context_tokens(config, num_context)
    embed = 2 * tokens * width * config.in_channels + 2 * frames * width * (width + SINUSOIDS)
    if config.architecture == "reference":
        embed += 2 * context * width * config.reference.context_dim
        final = 2 * tokens * width * config.in_channels * (2 if config.reference.learn_sigma else 1)
    else:
        embed += 2 * context * width * config.context_dim
        final = 2 * tokens * width * config.in_channels + 2 * frames * width * 2 * width
    return embed + final + dit_block_flops(config, frames, context, dense)


def dit_block_flops(
    config: ModelConfig, num_frames: int | None = None, num_context: int | None = None, dense: bool = False
) -> float:
    """The part of `dit_flops` that lies in the blocks: what activation checkpointing computes twice."""
    frames, width = num_frames or config.num_frames, config.hidden_size
    context = context_tokens(config, num_context)
    tokens = context + frames * config.tokens_per_frame
    linear = 2 * tokens * width * width * (4 + 2 * config.mlp_ratio)
    first_only = config.architecture == "reference" and config.reference.merge_mode == "reproduce"
    modulation = 2 * (1 if first_only else frames) * width * 6 * width
    pairs = tokens**2 if dense else _pairs(config, frames, context)
    return config.depth * (linear + modulation + 2 * 2 * pairs * width)


def context_tokens(config: ModelConfig, num_context: int | None = None) -> int:
    """Tokens in front of the frames: so many, or (None) those of the published networks, otherwise none."""
    published = config.reference.context_tokens if config.architecture == "reference" else 0
    return published if num_context is None else num_context


def _pairs(config: ModelConfig, frames: int, context: int) -> int:
    """How many (query, key) pairs the mask allows."""
    one_token = FrameMask(
        frames, frames, 1, mask=config.mask, block=config.block, window=config.window, sink=config.sink
    )
    tokens = frames * config.tokens_per_frame
    of_context = context * (context + tokens if config.context == "leaky" else context)
    of_frames = int(one_token.dense(torch.device("cpu")).sum()) * config.tokens_per_frame**2
    return of_context + of_frames + tokens * context


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
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Peak of a device called so by its driver, or None."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, name)), None)


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
