"""Cached sampling against full recomputation: frame-forwards, time and memory.

    python -m tests.benchmarks.sampling [--config base] [--batch 8] [--frames 16 128] [--gaps 0 5 10 25 50] [--quick]

Random weights, S = 50 DDIM steps, the same noise for both. Of the recomputing side --rows evenly spaced rows are
timed (each costs the same: it computes every frame) and scaled up; the cached side is timed whole, or likewise with
--cached_rows. That both give the same latents is tested in tests/sampling. The paper needs 8.6 GB on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
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
from ardiff.sampling.pictures import frame_forwards
from ardiff.sampling.rollout import Rollout
from ardiff.sampling.sampler import build_rollout
from tests.benchmarks.common import machine, print_table

STEPS = 50


class Timing(NamedTuple):
    """Of one side: frames through the network per video, seconds, and the part of the rows that was run."""

    frame_forwards: int
    seconds: float
    share: float
    gigabytes: float = 0.0  # peak resident memory of its process, with torch and the weights


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


def cached(model: DiT, config: Config, noise: Tensor, gap: int, timed_rows: int | None) -> Timing:
    """The whole run with the cache, or evenly spaced rows of it, each in the state that it finds in a run."""
    rollout = rollout_of(model, config, noise, gap, "exact")
    total = rollout.num_rows or 0
    if timed_rows is None:
        start = time.perf_counter()
        for _ in rollout:
            pass
        return Timing(rollout.denoiser.frame_forwards, time.perf_counter() - start, 1.0)
    rows = _spaced(total, timed_rows)
    seconds = 0.0
    for row in rows:
        _put_at(rollout, row)
        start = time.perf_counter()
        rollout.step()
        seconds += time.perf_counter() - start
    forwards = frame_forwards(rollout.rows, cache=True)
    return Timing(forwards, seconds * total / len(rows), len(rows) / total)


def recomputed(model: DiT, config: Config, noise: Tensor, gap: int, timed_rows: int) -> Timing:
    """Every row computes every frame; only `timed_rows` of them, evenly spaced, are run."""
    rollout = rollout_of(model, config, noise, gap, "none")
    total = rollout.num_rows or 0
    rows = _spaced(total, timed_rows)
    seconds = 0.0
    for row in rows:
        rollout.row = row
        start = time.perf_counter()
        rollout.step()
        seconds += time.perf_counter() - start
    return Timing(total * noise.shape[1], seconds * total / len(rows), len(rows) / total)


def _spaced(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def _put_at(rollout: Rollout, row: int) -> None:
    """As if the rows before had been run; what the numbers are does not matter for the time."""
    rows, cache = rollout.rows, rollout.cache
    assert rows.num_frames is not None
    rollout.row = row
    if cache is None:  # all frames at once
        return
    rollout.num_finished = int((rows.levels(row, 0, rows.num_frames) == 0).sum())
    rollout.first = cache.num_frames = int((rows.levels(max(0, row - 1), 0, rows.num_frames) == 0).sum())
    rollout.x = rollout.noise(rollout.first, rows.started(row) - rollout.first)


def in_own_process(side: str, frames: int, gap: int, options: argparse.Namespace) -> Timing:
    """One side in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "tests.benchmarks.sampling", "--side", side, "--config", options.config]
    command += ["--batch", str(options.batch), "--rows", str(options.rows), "--frames", str(frames), "--gaps", str(gap)]
    command += ["--quick"] if options.quick else []
    command += ["--cached_rows", str(options.cached_rows)] if options.cached_rows else []
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Timing(**json.loads(printed.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row for every number of frames and gap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 5, 10, 25, 50])
    parser.add_argument("--rows", type=int, default=20, help="rows of the recomputing side that are timed")
    parser.add_argument("--cached_rows", type=int, help="time so many rows of the cached side too (default: all)")
    parser.add_argument("--side", choices=("exact", "none"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a small network and few frames: only to see that it runs")
    options = parser.parse_args(arguments)
    overrides = []
    if options.quick:
        if not options.side:
            options.frames, options.gaps, options.batch, options.rows = [4], [0, 50], 2, 4
        overrides = ["model.hidden_size=48", "model.depth=2", "model.num_heads=2"]
    if options.side:
        _run_one_side(options, overrides)
        return 0
    rows = []
    for frames in options.frames:
        for gap in options.gaps:
            rows.append(_compare(frames, gap, options))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ("F", "s", "frame-forwards", "recomputed", "times fewer", "seconds", "recomputed", "times faster")
    header += ("timed rows", "GB", "recomputed")
    print(f"{options.config}, {options.batch} videos, S = {STEPS}, fp32; {machine()}")
    print_table("Sampling", header, [tuple(row) for row in rows])
    return 0


def _compare(frames: int, gap: int, options: argparse.Namespace) -> list[str]:
    fast, slow = (in_own_process(side, frames, gap, options) for side in ("exact", "none"))
    return [
        str(frames),
        str(gap),
        f"{fast.frame_forwards:,}",
        f"{slow.frame_forwards:,}",
        f"{slow.frame_forwards / fast.frame_forwards:.1f}",
        f"{fast.seconds:.1f}",
        f"{slow.seconds:.1f}",
        f"{slow.seconds / fast.seconds:.2f}",
        f"{slow.share:.0%}",
        f"{fast.gigabytes:.2f}",
        f"{slow.gigabytes:.2f}",
    ]


def _run_one_side(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    config = load(options.config, overrides)
    model = build(config)
    frames, gap = options.frames[0], options.gaps[0]
    shape = (options.batch, frames, config.model.tokens_per_frame, config.model.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    recomputed(model, config, noise[:, :2], 0, 2)  # warm
    timing = (
        cached(model, config, noise, gap, options.cached_rows)
        if options.side == "exact"
        else recomputed(model, config, noise, gap, options.rows)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(timing._replace(gigabytes=peak)._asdict()))


if __name__ == "__main__":
    sys.exit(main())
