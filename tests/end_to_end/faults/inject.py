"""Runs a training program with faults patched into it, so that the program itself needs no hooks.

    torchrun ... inject.py '[["scale_sample", 100, 1e4], ["hang", 1, 12, "/tmp/marker"]]' launch/train.py ...

Faults are names of functions below with their arguments.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RANK = int(os.environ.get("RANK", "0"))


def scale_sample(position: int, factor: float) -> None:
    """The latents of the sample at this global position are multiplied, whenever it is read; "nan" is a factor."""
    from ardiff.data.clips import Clips, LatentClips
    from ardiff.data.plan import Visits

    original = LatentClips.__call__

    def patched(self: LatentClips, visits: Visits) -> Clips:
        positions = visits.position.copy()
        clips = original(self, visits)
        clips.tensors["latents"][positions == position] *= float(factor)
        return clips

    LatentClips.__call__ = patched  # type: ignore[method-assign]


def hang(rank: int, step: int, marker: str) -> None:
    """This rank sleeps for ever at the beginning of a step, unless the marker exists; then it makes it."""
    from ardiff.training.engine import Engine

    original = Engine.step

    def patched(self: Engine, batch: Any, number: int, *more: Any) -> Any:
        if rank == RANK and number == step and not Path(marker).exists():
            Path(marker).touch()
            while True:
                time.sleep(3600)
        return original(self, batch, number, *more)

    Engine.step = patched  # type: ignore[method-assign, assignment]


def slow_evaluation(seconds: float, slow: str, busy: str) -> None:
    """While the file `slow` exists, every call of the network in evaluation mode takes long and makes `busy`."""
    from ardiff.models import DiT

    original = DiT.forward

    def patched(self: DiT, *arguments: Any, **more: Any) -> Any:
        if not self.training and Path(slow).exists():
            Path(busy).touch()
            time.sleep(seconds)
        return original(self, *arguments, **more)

    DiT.forward = patched  # type: ignore[method-assign]


FAULTS = {function.__name__: function for function in (scale_sample, hang, slow_evaluation)}


def main() -> None:
    """Patch, then be the program."""
    faults, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    for name, *arguments in faults:
        FAULTS[name](*arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
