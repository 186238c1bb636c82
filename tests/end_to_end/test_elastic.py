"""A run that goes on with other numbers of ranks and at other ZeRO stages is the run that never changed."""

import shutil
import sys
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from processes import metrics, run, train

pytestmark = pytest.mark.launcher

FIRST, STEPS = 10, 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


def advance(run_dir: Path, shards: Path, last: int, ranks: int, stage: str, *extra: str) -> str:
    """Train on to that step; stage: of ds_configs."""
    batches = ("--train.global_batch_size", "8", "--train.micro_batch_size", "2")
    limits = ("--train.max_steps", str(last), "--ds_config", f"ds_configs/{stage}.json")
    kind = "python" if ranks == 1 else "ranks"
    code, output = run(train(run_dir, shards, *batches, *limits, *extra, kind=kind, ranks=ranks))
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory, shards) -> Path:
    """50 steps on 2 ranks at stage 2, in one piece."""
    run_dir = tmp_path_factory.mktemp("unchanged") / "run"
    every = ("--train.save_every", str(FIRST), "--train.keep_checkpoints", "9")
    advance(run_dir, shards, STEPS, 2, "zero2_cpu", *every)
    return run_dir


CHAINS = {
    "2 -> 1 -> 4 ranks": [(30, 1, "zero2_cpu"), (STEPS, 4, "zero2_cpu")],
    "stage 2 -> 0 -> 2 -> 1": [(20, 2, "zero0"), (35, 2, "zero2_cpu"), (STEPS, 1, "zero1")],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_changed_run_gives_the_same_curve(tmp_path, shards, unchanged, chain):
    run_dir, step = tmp_path / "run", FIRST
    shutil.copytree(unchanged, run_dir)
    for checkpoint in (run_dir / "checkpoints").glob("step_*"):  # as if the run had been stopped at step 10
        if checkpoint.name != f"step_{FIRST:08d}":
            shutil.rmtree(checkpoint)
    for last, ranks, stage in CHAINS[chain]:
        assert f"(step {step}, " in advance(run_dir, shards, last, ranks, stage).split("resumed from")[1]
        step = last
    lines, expected = metrics(run_dir), metrics(unchanged)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], rel=1e-5), key
    assert expected[-1]["loss"] < expected[0]["loss"]
