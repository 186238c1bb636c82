"""launch/train.py with a stop-watch: `python -m tests.benchmarks.checkpointing_run NOTES OPTIONS...`.

Notes the start of every step and what every checkpoint took. Checkpoints that are due are made and left out in turn
(made, left out, left out, made); the last one is always made.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from ardiff.data.stream import GlobalBatch
from ardiff.training.trainer import Trainer

PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "train.py"
steps: list[dict[str, Any]] = []
saves: list[dict[str, Any]] = []
next_batch, save_if_good = Trainer.next_batch, Trainer.save_if_good


def measured_next_batch(trainer: Trainer) -> GlobalBatch | None:
    """Note that a step begins."""
    steps.append({"step": trainer.step + 1, "start": time.perf_counter(), "writing": trainer.saver.writing})
    return next_batch(trainer)


def measured_save(trainer: Trainer) -> bool:
    """Save where it is this stretch's turn, and note how long training waited for it."""
    made = trainer.step == trainer.config.max_steps or len(saves) % 4 in (0, 3)
    start = time.perf_counter()
    good = save_if_good(trainer) if made else True
    if saves and saves[-1]["made"]:
        saves[-1]["written"] = trainer.saver.written_seconds
    saves.append({"step": trainer.step, "made": made, "start": start, "seconds": time.perf_counter() - start})
    if made:
        saves[-1]["waited"] = trainer.saver.stalled_seconds
    return good


def main() -> None:
    """Run the program as if it had been started with the remaining arguments."""
    notes = Path(sys.argv[1])
    sys.argv = [str(PROGRAM), *sys.argv[2:]]
    Trainer.next_batch, Trainer.save_if_good = measured_next_batch, measured_save  # type: ignore[method-assign]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        notes.write_text(json.dumps({"steps": steps, "saves": saves}), encoding="utf-8")


if __name__ == "__main__":
    main()
