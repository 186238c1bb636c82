"""Moments at which a run is hardest to stop, to go back or to keep: one program each, with a fault patched in."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from processes import ROOT, environment, exact, exit_record, kill_group, metrics, run, start, train, wait_for_step

pytestmark = pytest.mark.launcher
BATCH = 8

# Nothing behind the first batches is read, on any rank, while a file exists.
NO_DATA = """
import pathlib, time
from ardiff.data.stream import BatchStream
original = BatchStream.read
def read(self, position, batches=1):
    while position > 0 and pathlib.Path({file!r}).exists():
        time.sleep(0.1)
    return original(self, position, batches)
BatchStream.read = read
"""

# Two samples whose loss explodes, whenever they are read.
SPIKES = """
from ardiff.data.clips import LatentClips
original = LatentClips.__call__
def call(self, visits):
    clips = original(self, visits)
    for position in (150, 390):
        clips.tensors["latents"][visits.position == position] *= 1000.0
    return clips
LatentClips.__call__ = call
"""

# The disk is full at the report of step 20, once.
NO_ROOM = """
import errno, pathlib
from ardiff.monitor.writers import MetricsWriter
original = MetricsWriter._chart
def chart(self, metrics, others):
    file = pathlib.Path({file!r})
    if metrics["step"] == 20 and file.exists():
        file.unlink()
        raise OSError(errno.ENOSPC, "No space left on device")
    return original(self, metrics, others)
MetricsWriter._chart = chart
"""

# Sample videos take longer than collectives may, with forwards all the time.
SLOW_PREVIEW = """
import os, time
import launch.train, torch
original = launch.train.build_job
def build_job(config):
    job = original(config)
    def preview(network):
        for _ in range(36):
            time.sleep(0.25)
            torch.nn.Identity()(torch.zeros(1))
        return {}
    job.preview = preview if os.environ["RANK"] == "0" else None
    return job
launch.train.build_job = build_job
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


def patched(command: list[str], program: Path, code: str) -> list[str]:
    """The command with a program in place of launch/train.py that is changed by `code` before it runs."""
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", code, "import launch.train", "from ardiff import cli"]
    program.write_text("\n".join([*lines, "sys.argv[0] = 'launch/train.py'", "cli.run(launch.train.main)"]) + "\n")
    return [str(program) if word == "launch/train.py" else word for word in command]


def test_a_stop_is_heard_while_every_step_is_saved(tmp_path, shards):
    run_dir = tmp_path / "run"
    process = start(train(run_dir, shards, "--train.max_steps", "100000", "--train.save_every", "1"))
    wait_for_step(run_dir, 5, process)
    asked = len(metrics(run_dir))
    kill_group(process, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    record = exit_record(run_dir)
    assert record["reason"] == "SIGTERM" and record["code"] == 0, output
    assert asked <= record["step"] <= asked + 20  # of a few milliseconds each


@pytest.mark.slow
def test_a_stop_is_heard_while_all_ranks_wait_for_data(tmp_path, shards):
    run_dir, away = tmp_path / "run", tmp_path / "away"
    away.touch()
    command = patched(
        train(run_dir, shards, "--train.max_steps", "15"), tmp_path / "p.py", NO_DATA.format(file=str(away))
    )
    process = start(command)
    wait_for_step(run_dir, 1, process)
    time.sleep(2)
    done = len(metrics(run_dir))
    begin = time.monotonic()
    kill_group(process, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert exit_record(run_dir) == {"reason": "SIGTERM", "code": 0, "step": done}, output
    assert done < 15
    away.unlink()
    code, output = run(command)
    assert code == 0 and f"(step {done}, " in output, output
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 16))


def test_spikes_before_and_after_the_first_checkpoint_are_told_by_their_own_samples(tmp_path, shards):
    run_dir = tmp_path / "run"
    limits = ("--train.max_steps", "60", "--train.save_every", "30", "--train.log_every", "10")
    spikes = ("--train.spike_window", "10", "--train.spike_action", "rollback")
    command = train(run_dir, shards, *limits, *spikes, kind="python", ranks=1)
    code, output = run(patched(command, tmp_path / "p.py", SPIKES))
    assert code == 0, output
    told = [line for line in output.splitlines() if "LOSS SPIKE" in line]
    assert len(told) == 2 and "at step 19:" in told[0] and "at step 49:" in told[1], told
    assert "no checkpoint to roll back to yet" in output
    assert "left out from now on: samples 384 to 391" in output and output.count("ROLLED BACK") == 1
    assert metrics(run_dir)[-1]["samples"] == 61 * BATCH


def test_no_checkpoint_hides_metrics_that_could_not_be_written(tmp_path, shards):
    run_dir, full = tmp_path / "run", tmp_path / "full"
    full.touch()
    command = train(run_dir, shards, "--train.max_steps", "25", "--train.save_every", "10", kind="python", ranks=1)
    broken = patched(command, tmp_path / "p.py", NO_ROOM.format(file=str(full)))
    code, output = run(broken)
    assert code == 2 and "metrics.jsonl: cannot be written (No space left on device)" in output, output
    assert "Traceback" not in output
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step_*")) == ["step_00000010"]
    code, output = run(broken)
    assert code == 0, output
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 26))
    assert exact(run_dir)[9] != exact(run_dir)[19]


def test_a_closed_terminal_does_not_end_a_run(tmp_path, shards):
    run_dir = tmp_path / "run"
    command = train(run_dir, shards, "--train.max_steps", "12", kind="python", ranks=1)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert exit_record(run_dir) == {"reason": "finished", "code": 0, "step": 12}


@pytest.mark.slow
def test_sampling_may_take_longer_than_collectives(tmp_path, shards):
    run_dir = tmp_path / "run"
    limits = ("--train.max_steps", "6", "--train.sample_every", "5", "--train.collective_timeout_minutes", "0.1")
    code, output = run(patched(train(run_dir, shards, *limits), tmp_path / "p.py", SLOW_PREVIEW))
    assert code == 0, output
    assert exit_record(run_dir) == {"reason": "finished", "code": 0, "step": 6}
