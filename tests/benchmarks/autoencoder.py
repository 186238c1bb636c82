"""Parameters, memory and frames per second of the auto-encoder presets.

    python -m tests.benchmarks.autoencoder [--presets arvae_tiny arvae_small ...] [--frames 16] [--quick]

Random weights, on the GPU in bf16 if there is one, else on the CPU in fp32. Each preset runs in a process of its own.
`per frame` leaves out what reads other frames; `streaming` is the temporal decoder, frame by frame with its bounded
state, and `clip` the same on all frames at once. Training memory is counted, not measured: 4 bytes each for master
weights, gradients, two moments and the average of a parameter, and 2 for its bf16 copy, before ZeRO divides them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ardiff.config import load
from ardiff.models.build import build_arvae
from ardiff.models.perceptual import build_perceptual
from ardiff.models.reconstruction import ReconstructionObjective
from ardiff.models.temporal import TemporalCache, is_temporal
from ardiff.monitor.throughput import arvae_flops
from tests.benchmarks.common import machine, print_table

PRESETS = ("arvae_tiny", "arvae_tiny_stages", "arvae_small", "arvae_base", "arvae_large")
BYTES_PER_PARAMETER = 5 * 4 + 2


def rate(call: Callable[[], object], frames: int, device: torch.device, seconds: float) -> float:
    """Frames per second of a call that takes `frames`, after one call that is not timed."""
    call()
    calls = 0
    begin = time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < seconds:
        call()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return frames * calls / (time.perf_counter() - begin)


def measure(preset: str, frames: int, seconds: float) -> dict[str, Any]:
    """All figures of one preset, in this process."""
    config = load(preset).vae
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    network = build_arvae(config).to(device, dtype).eval()
    video = torch.rand(1, frames, 3, config.image_size, config.image_size, device=device)
    counts = {
        temporal: sum(p.numel() for name, p in network.named_parameters() if is_temporal(name) == temporal)
        for temporal in (False, True)
    }
    found: dict[str, Any] = {"preset": preset, "parameters": counts[False], "temporal": counts[True]}
    found["flops"] = arvae_flops(config)
    with torch.no_grad():
        latents = network.encode(video)
        found["encode"] = rate(lambda: network.encode(video), frames, device, seconds)
        found["decode"] = rate(lambda: network.decode(latents, temporal=False), frames, device, seconds)
        if network.temporal:
            found["clip"] = rate(lambda: network.decode(latents), frames, device, seconds)
            found["streaming"] = rate(lambda: stream(network, latents), frames, device, seconds)
    found["peak"] = peak_memory(device)
    found["training"] = rate(training_step(config, video[:, :1], device, dtype), 1, device, seconds)
    return found


def stream(network: Any, latents: torch.Tensor) -> None:
    """Decode frame by frame."""
    cache = TemporalCache()
    for frame in latents.split(1, dim=1):
        network.decode(frame, cache=cache)


def training_step(config: Any, video: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of the reconstruction loss, without an optimizer."""
    objective = ReconstructionObjective(config, build_perceptual(config)).to(device, dtype)
    noise = torch.randn(*video.shape[:2], config.num_tokens, config.channels, device=device)
    batch = {"video": video, "noise": noise, "mask": torch.ones(video.shape[:2], dtype=torch.bool, device=device)}

    def step() -> None:
        objective.zero_grad(set_to_none=True)
        total, count = objective(batch)["loss"]
        (total / count).backward()

    return step


def peak_memory(device: torch.device) -> float:
    """Gigabytes that this process has used at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def row(found: dict[str, Any]) -> list[str]:
    """One preset in the table."""
    both = found["parameters"] + found["temporal"]
    return [
        found["preset"],
        f"{found['parameters'] / 1e6:.1f} M",
        f"{found['temporal'] / 1e6:.1f} M",
        f"{found['flops'] / 1e9:.1f}",
        f"{both * BYTES_PER_PARAMETER / 1e9:.2f}",
        f"{found['peak']:.2f}",
        *(f"{found[name]:.2f}" if name in found else "-" for name in ("encode", "decode", "clip", "streaming")),
        f"{found['training']:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the presets one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--frames", type=int, default=16, help="of the clip (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="per measurement, at least one call")
    parser.add_argument("--quick", action="store_true", help="one call of arvae_tiny_stages")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.presets[0], options.frames, options.seconds)))
        return 0
    presets, seconds = (["arvae_tiny_stages"], 0.0) if options.quick else (options.presets, options.seconds)
    rows = []
    for preset in presets:
        own = ["--one", "--presets", preset, "--frames", str(options.frames), "--seconds", str(seconds)]
        result = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.autoencoder", *own], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(row(json.loads(result.stdout.splitlines()[-1])))
    print(machine())
    header = ["preset", "parameters", "temporal", "GFLOP a frame", "training state GB", "peak GB"]
    header += ["encode", "decode per frame", "decode clip", "decode streaming", "forward+backward"]
    print_table(f"Auto-encoders: frames per second, clips of {options.frames} frames", header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
