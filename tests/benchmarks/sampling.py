"""Cached sampling against full recomputation: frame-forwards, time and memory.

    python -m tests.benchmarks.sampling [--config base] [--batch 8] [--frames 16 128] [--gaps 0 5 10 25 50] [--quick]

Random weights, S = 50 DDIM steps, the same noise for both. Of the recomputing side --rows evenly spaced rows are
timed (each costs the same: it computes every frame) and scaled up; the cached side is timed whole. The latents of both
are compared where the recomputing side is run whole.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ardiff.config import Config, load
from ardiff.diffusion.schedule import Schedule
from ardiff.models import DiT
from ardiff.sampling.guidance import Guidance
from ardiff.sampling.levels import ADRows
from ardiff.sampling.rollout import Rollout
from ardiff.sampling.sampler import build_rollout
from tests.benchmarks.common import machine, print_table

STEPS = 50


class Timing(NamedTuple):
    """Of one side: frames through the network per video, seconds, and the part of the rows that was run."""

    frame_forwards: int
    seconds: float
    share: float
    latents: Tensor | None


def build(config: Config) -> DiT:
    """The network with random weights everywhere (at initialisation the last layer is zero)."""
    torch.manual_seed(0)
    model = DiT(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def rollout_of(model: DiT, config: Config, noise: Tensor, gap: int, cache: str) -> Rollout:
    """One sampling run that has not begun."""
    rows = ADRows(noise.shape[1], STEPS, gap, model.config.block)
    schedule = Schedule.from_config(config.diffusion)
    plain = Guidance(1.0, None, None)
    return build_rollout(model, rows, lambda first, n: noise[:, first : first + n], schedule, plain, cache=cache)


def cached(model: DiT, config: Config, noise: Tensor, gap: int) -> Timing:
    """The whole run with the cache."""
    rollout = rollout_of(model, config, noise, gap, "exact")
    start = time.perf_counter()
    parts = [latents for _, latents in rollout]
    return Timing(rollout.denoiser.frame_forwards, time.perf_counter() - start, 1.0, torch.cat(parts, dim=1))


def recomputed(model: DiT, config: Config, noise: Tensor, gap: int, timed_rows: int) -> Timing:
    """Every row computes every frame; only `timed_rows` of them, evenly spaced, are run."""
    rollout = rollout_of(model, config, noise, gap, "none")
    total = rollout.rows.num_rows or 0
    whole = timed_rows >= total
    chosen = range(total) if whole else [round(i * (total - 1) / (timed_rows - 1)) for i in range(timed_rows)]
    parts, seconds = [], 0.0
    for row in chosen:
        rollout.row = row
        start = time.perf_counter()
        finished = rollout.step()
        seconds += time.perf_counter() - start
        if finished is not None:
            parts.append(finished.latents)
    share = len(chosen) / total
    latents = torch.cat(parts, dim=1) if whole else None
    return Timing(total * noise.shape[1], seconds / share, share, latents)


def peak_gigabytes(arguments: Sequence[str]) -> float:
    """Peak resident memory of one side in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.sampling", *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def resident_peak() -> float:
    """Peak resident memory of this process in GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row for every number of frames and gap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 5, 10, 25, 50])
    parser.add_argument("--rows", type=int, default=20, help="rows of the recomputing side that are timed")
    parser.add_argument("--memory", action="store_true", help="peak memory of both sides too, each in its own process")
    parser.add_argument("--side", choices=("exact", "none"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a small network and few frames: only to see that it runs")
    options = parser.parse_args(arguments)
    overrides = []
    if options.quick:
        options.frames, options.gaps, options.batch, options.rows = [4, 8], [0, 5, 50], 2, 4
        overrides = ["model.hidden_size=48", "model.depth=2", "model.num_heads=2"]
    config = load(options.config, overrides)
    model = build(config)
    if options.side:
        _run_one_side(model, config, options)
        return 0
    rows = []
    for frames in options.frames:
        for gap in options.gaps:
            rows.append(_compare(model, config, frames, gap, options))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = [
        "F",
        "s",
        "frame-forwards",
        "recomputed",
        "times",
        "cached, s",
        "recomputed, s",
        "times faster",
        "timed rows",
    ]
    header += ["cached, GB", "recomputed, GB"] if options.memory else []
    print(f"{options.config}, {options.batch} videos, S = {STEPS}, fp32; {machine()}")
    print_table("Sampling", tuple(header), [tuple(row) for row in rows])
    return 0


def _compare(model: DiT, config: Config, frames: int, gap: int, options: argparse.Namespace) -> list[str]:
    shape = (options.batch, frames, config.model.tokens_per_frame, config.model.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    recomputed(model, config, noise, gap, 2)  # warm
    fast, slow = cached(model, config, noise, gap), recomputed(model, config, noise, gap, options.rows)
    if fast.latents is not None and slow.latents is not None:
        difference = (fast.latents - slow.latents).abs().max() / slow.latents.abs().max()
        assert difference < 1e-3, f"cached and recomputed latents differ by {difference:.1e}"
    row = [
        str(frames),
        str(gap),
        f"{fast.frame_forwards:,}",
        f"{slow.frame_forwards:,}",
        f"{slow.frame_forwards / fast.frame_forwards:.1f}",
        f"{fast.seconds:.1f}",
        f"{slow.seconds:.1f}",
        f"{slow.seconds / fast.seconds:.2f}",
        f"{slow.share:.0%}",
    ]
    if options.memory:
        common = [
            "--config",
            options.config,
            "--batch",
            str(options.batch),
            "--frames",
            str(frames),
            "--gaps",
            str(gap),
        ]
        row += [f"{peak_gigabytes([*common, '--side', side]):.2f}" for side in ("exact", "none")]
    return row


def _run_one_side(model: DiT, config: Config, options: argparse.Namespace) -> None:
    shape = (options.batch, options.frames[0], config.model.tokens_per_frame, config.model.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if options.side == "exact":
        cached(model, config, noise, options.gaps[0])
    else:
        recomputed(model, config, noise, options.gaps[0], 3)
    print(resident_peak())


if __name__ == "__main__":
    sys.exit(main())
