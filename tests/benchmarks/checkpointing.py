"""How much training time checkpoints cost: launch/train.py on CPU, stretches with and without one taking turns.

    python -m tests.benchmarks.checkpointing [--preset base] [--every 100] [--stretches 6] [--work DIR] [--quick]

Synthetic latents and a global batch of one clip. The first stretch warms up. Every other stretch of EVERY steps begins
with a checkpoint, in the order with, without, without, with; so the two kinds meet equal conditions within one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.common import machine, milliseconds, print_table, work_folder
from tests.benchmarks.latent_sets import write_shards, written_once

ROOT = Path(__file__).resolve().parents[2]
AIM = 0.02  # of the training time, at most
LONGEST_STEP = 2.0  # seconds: with longer ones, checkpoints would seem to cost less


class Measured:
    """What the program noted, by stretches of steps. Stretch k begins with the k-th checkpoint that was due."""

    def __init__(self, notes: dict[str, Any], every: int) -> None:
        self.every, self.bytes = every, notes["bytes"]
        due = notes["saves"]
        self.saves = [save for save in due[:-1] if save["made"]]
        lengths = [(save["made"], after["start"] - save["start"]) for save, after in itertools.pairwise(due)]
        self.stretches = {kind: [seconds for made, seconds in lengths if made == kind] for kind in (True, False)}
        waited = {save["step"]: save["seconds"] for save in due}
        self.steps: dict[bool, list[float]] = {True: [], False: []}  # by whether a checkpoint was being written
        for step, after in itertools.pairwise(notes["steps"]):
            if step["step"] > every:  # the first stretch warms up
                seconds = after["start"] - step["start"] - waited.get(step["step"], 0.0)
                self.steps[step["writing"]].append(seconds)
        # Stretches of --quick are shorter than the writing, on a busy machine all of them.
        self.alone = self.steps[False] or self.steps[True]

    @property
    def step(self) -> float:
        """Seconds of a step beside which nothing is written."""
        return statistics.median(self.alone)

    @property
    def lost(self) -> float:
        """What a checkpoint costs, as a share of `every` steps: training stands still, steps beside it are slower."""
        slower = sum(self.steps[True]) - len(self.steps[True]) * statistics.mean(self.alone)
        return (sum(save["seconds"] for save in self.saves) + slower) / len(self.saves) / (self.every * self.step)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measuring every step, and print what checkpoints have cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stretches", type=int, default=6, help="of so many steps; half of them with a checkpoint")
    parser.add_argument("--work", help="folder for data and run, which is kept (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="preset tiny, 12 steps: only to see that it runs")
    options = parser.parse_args(arguments)
    preset, every, stretches = ("tiny", 4, 2) if options.quick else (options.preset, options.every, options.stretches)
    with work_folder(options.work) as work:
        written_once(work / "latents", lambda path: write_shards(path, 40, 20, frames=32))
        print(machine())
        measured = _train(work, preset, every, stretches)
        checkpoints = sorted((work / "run" / "checkpoints").glob("step_*"))
        measured["bytes"] = sum(path.stat().st_size for path in checkpoints[-1].iterdir())
    lost = _print(Measured(measured, every), preset)
    print(machine())
    return 0 if options.quick or lost < AIM else 1


def _train(work: Path, preset: str, every: int, stretches: int) -> dict[str, Any]:
    """Run the program in a process of its own; what it noted."""
    run_dir, notes = work / "run", work / "notes.json"
    if run_dir.exists():
        sys.exit(f"{run_dir} exists: remove it or choose another --work")
    settings = {
        "data.shards": work / "latents",
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.max_steps": every * (stretches + 1),
        "train.save_every": every,
        "train.sample_every": 0,
    }
    command = [sys.executable, "-m", "tests.benchmarks.checkpointing_run", str(notes), "--config", preset]
    command += ["--run_dir", str(run_dir)]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"training failed:\n{result.stdout}\n{result.stderr}")
    return json.loads(notes.read_text(encoding="utf-8"))


def _print(found: Measured, preset: str) -> float:
    """Print the tables; returns the share of the training time that is lost."""
    rows = [
        (name, str(len(found.steps[kind])), *(milliseconds(of(found.steps[kind])) for of in (statistics.median, max)))
        for name, kind in (("alone", False), ("while a checkpoint is written", True))
        if found.steps[kind]
    ]
    print_table(f"Steps of {preset}, global batch 1", ("step", "steps", "median, ms", "longest, ms"), rows)
    parts = {"training stands still": "seconds", "of it for begin: space, copy": "waited", "written in": "written"}
    rows = [
        (name, *(milliseconds(of([save[key] for save in found.saves])) for of in (statistics.median, max)))
        for name, key in parts.items()
    ]
    print_table(f"A checkpoint of {found.bytes / 2**20:,.0f} MiB", ("part", "median, ms", "longest, ms"), rows)
    whole = [statistics.median(found.stretches[kind]) for kind in (True, False)]
    rows = [
        ("standing still, and steps slowed down, by step", f"{100 * found.lost:.2f} %"),
        (
            f"stretches of {found.every} steps with one, against those without",
            f"{100 * (whole[0] / whole[1] - 1):.2f} %",
        ),
    ]
    print_table(f"Time lost to a checkpoint every {found.every} steps", ("measured by", "lost"), rows)
    print(f"\naim: under {100 * AIM:g} %, with steps under {LONGEST_STEP:g} s (median here {found.step:.2f} s)\n")
    return found.lost if found.step < LONGEST_STEP else float("inf")


if __name__ == "__main__":
    sys.exit(main())
