"""Validation of the DiT in a run: at which steps, that it changes nothing else, and that failures do not end a run."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from processes import exact, exit_record, metrics, run, train

pytestmark = [pytest.mark.launcher, pytest.mark.slow]

FIGURES = ("validation_loss", "validation_loss_by_decile", "validation_loss_by_frame")
LIMITS = ("--train.max_steps", "14", "--train.save_every", "7")
VALIDATED = ("--train.validate_every", "5", "--train.validation_frames", "48")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    write_latents(folder / "validation", lengths=((11, 6), (3, 21)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(train(run_dir, shards, *LIMITS, *VALIDATED))
    assert code == 0, output
    assert f"validation: {shards}/validation, 12 clips of 4 videos, every 5 steps" in output
    return run_dir


def figures(run_dir: Path) -> dict[int, list]:
    """The figures on held-out videos by step."""
    lines = metrics(run_dir)
    assert all(all(name in line for name in FIGURES) or not any("validation" in key for key in line) for line in lines)
    return {line["step"]: [line[name] for name in FIGURES] for line in lines if FIGURES[0] in line}


def test_held_out_losses_are_written_at_their_steps_and_nothing_else_changes(tmp_path, shards, undisturbed):
    found = figures(undisturbed)
    assert list(found) == [5, 10, 14]  # and after the last
    for loss, by_decile, by_frame in found.values():
        assert loss > 0 and len(by_decile) == 10 and len(by_frame) == 4 and None not in by_frame
    assert found[14][0] < found[5][0]
    without = tmp_path / "without"
    code, output = run(train(without, shards, *LIMITS, "--train.validate_every", "0"))
    assert code == 0 and "validation: never" in output, output
    assert not figures(without) and exact(without) == exact(undisturbed)


def test_one_rank_measures_what_two_do_and_resuming_changes_no_bit(tmp_path, shards, undisturbed):
    resumed = tmp_path / "resumed"
    for steps in ("9", "14"):  # the first part ends with a validation of its own
        code, output = run(train(resumed, shards, *LIMITS, *VALIDATED, "--train.max_steps", steps))
        assert code == 0, output
    found, expected = figures(resumed), figures(undisturbed)
    assert list(found) == [5, 9, 10, 14]
    assert {step: found[step] for step in expected} == expected
    alone = tmp_path / "alone"
    code, output = run(train(alone, shards, *LIMITS, *VALIDATED, kind="python", ranks=1))
    assert code == 0, output
    for step, (loss, _, by_frame) in figures(alone).items():
        assert loss == pytest.approx(expected[step][0], rel=1e-5)
        assert by_frame == pytest.approx(expected[step][2], rel=1e-5)


def test_a_rank_that_cannot_measure_ends_no_run(tmp_path, shards, undisturbed):
    program = tmp_path / "rank1.py"
    program.write_text(
        "import os, runpy, sys\n"
        "sys.path.insert(0, '.')\n"
        "from ardiff.training.validation import HeldOutLoss\n"
        "def broken(self, objective, rank, world_size):\n"
        "    raise RuntimeError('no memory')\n"
        "if os.environ['RANK'] == '1':\n"
        "    HeldOutLoss.measure = broken\n"
        "sys.argv[0] = 'launch/train.py'\n"
        "runpy.run_path('launch/train.py', run_name='__main__')\n"
    )
    command = train(tmp_path / "run", shards, *LIMITS, *VALIDATED)
    code, output = run([str(program) if word == "launch/train.py" else word for word in command])
    assert code == 0, output
    assert exit_record(tmp_path / "run") == {"reason": "finished", "code": 0, "step": 14}
    assert len(re.findall(r"no validation at step \d+: rank 1: RuntimeError: no memory", output)) == 3
    assert not figures(tmp_path / "run") and exact(tmp_path / "run") == exact(undisturbed)


def test_mistakes_are_told_in_one_line(tmp_path, shards):
    other = tmp_path / "other"
    shutil.copytree(shards / "validation", other)
    (other / "latents-000001.tar").write_bytes(b"")
    for source, message in (
        ("/nope", r"--data\.validation: /nope: no such folder"),
        (str(shards), r"data\.validation = .* is what is trained on"),
        (str(other), r"--data\.validation: .*latents-000001\.tar: damaged or truncated"),
    ):
        command = train(tmp_path / "run", shards, *VALIDATED, "--data.validation", source, kind="python", ranks=1)
        code, output = run(command)
        assert code == 2 and "Traceback" not in output, output
        lines = [line for line in output.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and re.search(message, lines[0]), output
