"""Checkpoints that are not as they were written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.faults.bench import Bench, Setting, Tally, require

STEPS, SAVE_EVERY, LEFT = 40, 10, 30  # the run has been cut back to the checkpoint of step LEFT
DAMAGED = Setting(
    (
        *("--train.max_steps", str(STEPS), "--train.save_every", str(SAVE_EVERY)),
        *("--train.keep_checkpoints", "9"),
    )
)


def _truncate(newest: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(newest.iterdir()))
    with file.open("r+b") as stream:
        stream.truncate(rng.randrange(file.stat().st_size))
    return file.name


def _flip(newest: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file.name


def _without_manifest(newest: Path, _: random.Random) -> str:
    (newest / "MANIFEST.json").unlink()
    return ""


def _latest_nowhere(newest: Path, _: random.Random) -> str:
    (newest.parent / "latest").write_text("step_00000999\n")
    return ""


def _left_over(newest: Path, rng: random.Random) -> str:
    """As a kill leaves it: a checkpoint of a later step, with half of its files."""
    unfinished = newest.parent / f".step_{LEFT + SAVE_EVERY:08d}.tmp"
    unfinished.mkdir()
    for file in sorted(newest.glob("*.safetensors")):
        (unfinished / file.name).write_bytes(file.read_bytes()[: rng.randrange(1000)])
    return ""


def damage(bench: Bench, tally: Tally, rounds: int, name: str) -> None:
    """Damage what the newest checkpoint of a run left behind; the command must go on from the newest that is whole."""
    harm, falls_back = HARMS[name]
    rng = bench.random(name)
    for number in range(rounds):
        run = bench.new_run(name, f"{number:02d}", DAMAGED)
        bench.cut_back(run, LEFT)
        newest = run.checkpoints / f"step_{LEFT:08d}"
        file = harm(newest, rng)
        tally.notes += [file] if file else []
        run.finish()
        begins = LEFT - SAVE_EVERY if falls_back else LEFT
        require(f"(step {begins}," in run.output, f"it did not resume at step {begins} ({file}): {run.log}")
        require(("DAMAGED CHECKPOINT" in run.output) == falls_back, f"the warning ({file}): {run.log}")
        for left in run.checkpoints.glob("damaged_*"):  # set aside for its owner to look at
            shutil.rmtree(left)
        bench.compare(run)
        tally.rounds += 1


HARMS: dict[str, tuple[Callable[[Path, random.Random], str], bool]] = {
    "truncated": (_truncate, True),
    "bit_flipped": (_flip, True),
    "manifest_missing": (_without_manifest, True),
    "latest_nowhere": (_latest_nowhere, False),
    "left_over_tmp": (_left_over, False),
}
