"""Training as a user runs it: launchers, world sizes, kills, signals, mistakes."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
import processes
from processes import (
    exact,
    exit_record,
    kill_group,
    metrics,
    run,
    run_each,
    start,
    train,
    wait_for_step,
    with_other_shards,
)

pytestmark = pytest.mark.launcher

STEPS = 50
NOTES = {"exit.json", ".lock", "logs"}  # what a refused start may leave


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Path:
    """50 steps on 2 ranks under the deepspeed launcher: what the others are compared with."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    limits = ("--train.max_steps", str(STEPS), "--train.save_every", "20", "--train.keep_checkpoints", "9")
    code, output = run(train(run_dir, shards, *limits, kind="deepspeed"))
    assert code == 0, output
    return run_dir


def test_run_dir_holds_what_the_contract_lists(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "tensorboard", "exit.json"} <= names
    checkpoints = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step_00000020", "step_00000040", "step_00000050"]
    assert (undisturbed / "checkpoints" / "latest").read_text().strip() == "step_00000050"
    assert exit_record(undisturbed) == {"reason": "finished", "code": 0, "step": STEPS}
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("clips_per_s", "tokens_per_s", "tflops_per_gpu", "mfu", "data_wait_frac", "step_ms", "peak_memory_gb"):
        assert key in lines[-1]
    assert lines[-1]["samples"] == STEPS * 8
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert list((undisturbed / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_one_rank_gives_the_curve_of_two(tmp_path, shards, undisturbed, micro_batch):
    """Same global batch; with micro batch 1 there are 8 accumulation steps as well."""
    limits = ("--train.max_steps", str(STEPS), "--train.micro_batch_size", str(micro_batch))
    code, output = run(train(tmp_path / "run", shards, *limits, kind="python", ranks=1))
    assert code == 0, output
    two = [line["loss"] for line in metrics(undisturbed)]
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(two, rel=1e-5)


def test_killed_run_continues_bit_for_bit(tmp_path, shards, undisturbed):
    run_dir = tmp_path / "run"
    command = train(run_dir, shards, "--train.max_steps", str(STEPS), "--train.save_every", "20")
    process = start(command)
    wait_for_step(run_dir, 27, process)
    kill_group(process, signal.SIGKILL)
    process.communicate()
    with (run_dir / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 999, "lo')  # as if the kill had come in the middle of a line
    elastic = tmp_path / "elastic"
    shutil.copytree(run_dir, elastic)

    code, output = run(command)
    assert code == 0, output
    assert "resumed from" in output and "finished at step 50" in output
    assert exact(run_dir) == exact(undisturbed)
    ranks = [json.loads(line) for line in (run_dir / "logs" / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ranks] == list(range(1, STEPS + 1))  # cut to the checkpoint like the metrics
    assert {len(line["forward_ms"]) for line in ranks} == {2}

    # The same checkpoint also continues on another number of ranks, equal to rounding.
    code, output = run(train(elastic, shards, "--train.max_steps", str(STEPS), kind="python", ranks=1))
    assert code == 0, output
    expected = [line["loss"] for line in metrics(undisturbed)]
    assert [line["loss"] for line in metrics(elastic)] == pytest.approx(expected, rel=1e-5)


def test_damaged_newest_checkpoint_is_passed_over(tmp_path, shards, undisturbed):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    state = run_dir / "checkpoints" / "step_00000050" / "state_rank1.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    code, output = run(train(run_dir, shards, "--train.max_steps", str(STEPS), "--train.save_every", "20"))
    assert code == 0, output
    assert "DAMAGED CHECKPOINT" in output and "step_00000040" in output
    assert exact(run_dir) == exact(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_ends_with_a_checkpoint_and_resumes_exactly(tmp_path, shards, undisturbed, number):
    run_dir = tmp_path / "run"
    command = train(run_dir, shards, "--train.max_steps", str(STEPS), kind="python", ranks=1)
    process = start(command)
    wait_for_step(run_dir, 12, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    record = exit_record(run_dir)
    assert record["reason"] == signal.Signals(number).name and record["code"] == 0
    assert 12 <= record["step"] < STEPS
    latest = (run_dir / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step_{record['step']:08d}"
    assert metrics(run_dir)[-1]["step"] == record["step"]


@pytest.mark.slow
def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(tmp_path, shards):
    run_dir = tmp_path / "run"
    process = start(train(run_dir, shards, "--train.max_steps", "100000", kind="deepspeed"))
    wait_for_step(run_dir, 5, process)
    kill_group(process, signal.SIGINT)
    process.communicate(timeout=60)
    record = exit_record(run_dir)
    assert record["reason"] in ("SIGINT", "SIGTERM") and record["code"] == 0
    assert (run_dir / "checkpoints" / f"step_{record['step']:08d}" / "MANIFEST.json").is_file()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, shards, undisturbed):
    truncated = tmp_path / "truncated"
    shutil.copytree(shards, truncated)
    tar = truncated / "latents-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    missing = tmp_path / "missing"
    shutil.copytree(shards, missing)
    (missing / "latents-000000.tar").unlink()
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if not NOTES & set(path.parts)}
    cases = [
        (tmp_path / "a", tmp_path / "nowhere", (), "nowhere: no such folder"),
        (tmp_path / "b", missing, (), "latents-000000.tar: missing"),
        (tmp_path / "c", truncated, (), "latents-000001.tar: damaged or truncated"),
        (tmp_path / "d", shards, ("--model.dept", "3"), "did you mean 'model.depth'?"),
        (undisturbed, shards, ("--model.depth", "3"), "run of another model (model.depth: 2 -> 3)"),
        (undisturbed, shards, ("--train.seed", "3"), "another train.seed (0 -> 3)"),
        (undisturbed, shards, ("--diffusion.prediction", "eps"), "another model (diffusion.prediction: x0 -> eps)"),
        (undisturbed, shards, ("--data.normalize", "none"), "another model (data.normalize: unit -> none)"),
        (undisturbed, shards, ("--resume", "none"), "not empty and --resume none"),
        (undisturbed, shards, ("--resum", "none"), "did you mean '--resume'?"),
        (tmp_path / "e", shards, ("--train.global_batch_size", "15"), "15 is no multiple of"),
    ]
    commands = [train(run_dir, data, *extra, kind="python", ranks=1) for run_dir, data, extra, _ in cases]
    for (_, _, extra, message), (code, output) in zip(cases, run_each(commands, tmp_path), strict=True):
        assert code == 2, (extra, output)
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and message in errors[0], output
        assert "Traceback" not in output
    assert all(exit_record(run_dir)["code"] == 2 for run_dir, *_ in cases)
    assert "is no multiple of" in exit_record(tmp_path / "e")["reason"]
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if not NOTES & set(path.parts)}


def test_mistake_under_the_launcher_is_told_once(tmp_path, shards):
    code, output = run(train(tmp_path / "run", shards, "--train.micro_batch_size", "8", kind="deepspeed"))
    assert code != 0
    assert output.count("error: train.global_batch_size = 8 is no multiple of") == 1
    assert "Traceback" not in output
    assert exit_record(tmp_path / "run")["code"] == 2


def test_metrics_do_not_depend_on_how_often_one_logs_and_saves(tmp_path, shards, undisturbed):
    """They are a function of the step."""
    limits = ("--train.max_steps", "20", "--train.log_every", "5", "--train.save_every", "7")
    code, output = run(train(tmp_path / "run", shards, *limits))
    assert code == 0, output
    expected = [line for line in exact(undisturbed) if line[0] % 5 == 0 and line[0] <= 20]
    assert exact(tmp_path / "run") == expected


def test_a_mistake_of_one_rank_ends_all_of_them(tmp_path, shards):
    """As when shards are missing on one node: rank 1 sees a folder without its shard."""
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    (broken / "latents-000000.tar").unlink()
    command = with_other_shards(train(tmp_path / "run", shards, "--train.max_steps", "3"), broken)
    code, output = run(command, timeout=120)
    assert code != 0
    assert output.count("error: rank 1: ") == 1 and "latents-000000.tar: missing" in output
    record = exit_record(tmp_path / "run")
    assert record["code"] == 2 and "rank 1" in record["reason"]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, shards):
    run_dir = tmp_path / "run"
    process = start(train(run_dir, shards, "--train.max_steps", "100000", kind="python", ranks=1))
    try:
        wait_for_step(run_dir, 2, process)
        code, output = run(train(run_dir, shards, "--train.max_steps", "100000", kind="python", ranks=1))
        assert code == 2 and "another run is writing there" in output
        code, output = run(train(run_dir, shards, "--model.depth", "3", kind="python", ranks=1))
        assert code == 2 and "run of another model" in output
        assert exit_record(run_dir)["reason"] == "running"  # the live run's record is left alone
    finally:
        kill_group(process)
        process.communicate()


def test_helpers_see_every_exact_field(undisturbed):
    assert set(processes.EXACT) <= metrics(undisturbed)[0].keys()
