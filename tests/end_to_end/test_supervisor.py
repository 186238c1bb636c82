"""launch/submit.py with real training: a killed rank, and signals under both launchers."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from processes import exact, exit_record, run, start, train, wait_for_step

from ardiff import cli
from ardiff.launching.processes import below, ranks, send

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


def submit(training: list[str], launcher: str, restarts: int = 0) -> list[str]:
    program = training[training.index("launch/train.py") :]
    options = ("--launcher", launcher, "--ranks", "2", "--max_restarts", str(restarts))
    return [sys.executable, "launch/submit.py", *options, "--", *program]


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=240)[0]
    finally:
        for who in below(process.pid):
            send(who, signal.SIGKILL)
        process.kill()


LIMITS = ("--train.max_steps", "30", "--train.save_every", "8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(train(run_dir, shards, *LIMITS))
    assert code == 0, output
    return run_dir


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGKILL, signal.SIGSTOP)],
    ids=["killed", "hanging"],
)
def test_a_lost_rank_is_started_again_and_nothing_is_lost(tmp_path, shards, undisturbed, number):
    run_dir = tmp_path / "run"
    hang = ("--train.hang_minutes", "0.1") if number == signal.SIGSTOP else ()
    process = start(submit(train(run_dir, shards, *LIMITS, *hang), "torchrun", restarts=3))
    wait_for_step(run_dir, 10, process)
    send(ranks(below(process.pid))[1], number)
    output = finish(process)
    assert process.returncode == 0, output
    (restart,) = [json.loads(line) for line in (run_dir / "restarts.jsonl").read_text().splitlines()]
    if number == signal.SIGSTOP:
        assert restart["code"] == cli.EXIT_HUNG and "likely cause: rank 1;" in restart["reason"], restart
    else:
        assert restart["code"] == cli.EXIT_FAILURE, restart
    assert f"restart 1 of 3 in 2 s, from {restart['resumes_from']}" in output
    assert "resumed from" in output
    assert exit_record(run_dir) == {"reason": "finished", "code": 0, "step": 30}
    assert exact(run_dir) == exact(undisturbed)
    for rank in range(2):
        assert (run_dir / "logs" / f"rank{rank:05d}.log").read_text().count("==== start: rank") == 2


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_sigterm_ends_with_0_and_a_checkpoint(tmp_path, shards, launcher):
    run_dir = tmp_path / "run"
    process = start(submit(train(run_dir, shards, "--train.max_steps", "100000"), launcher, restarts=3))
    wait_for_step(run_dir, 5, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0, output
    record = exit_record(run_dir)
    assert record["reason"] == "SIGTERM" and record["code"] == 0
    assert (run_dir / "checkpoints" / f"step_{record['step']:08d}" / "MANIFEST.json").is_file()
    assert not (run_dir / "restarts.jsonl").exists()


def test_a_mistake_is_not_tried_again(tmp_path, shards):
    command = submit(train(tmp_path / "run", shards, "--train.max_steps", "-1"), "torchrun", restarts=3)
    code, output = run(command)
    assert code == 2, output
    assert "train.max_steps" in output and "restart" not in output.partition("submit: 2 rank(s)")[2]
