"""launch/submit.py --slurm in a real SLURM of two nodes: submitted, stopped before its time, queued again, resumed."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, need
from cluster import why_not as no_cluster
from cluster.slurm import ENDED, Slurm
from cluster.slurm import why_not as no_slurm
from processes import exact, exit_record, metrics, train

from ardiff.launching.processes import environment

pytestmark = pytest.mark.launcher
STEPS = ("--train.max_steps", "60", "--train.save_every", "20")
OPTIONS = (
    *("--slurm", "--nodes", "2", "--ranks", "1", "--gpus_per_node", "0", "--time_limit", "00:20:00"),
    *("--max_restarts", "1"),
)


@pytest.fixture(scope="module")
def slurm():
    need(no_cluster() or no_slurm())
    with Cluster(nodes=2) as nodes, Slurm(nodes) as started:
        yield started


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, slurm, shards) -> Path:
    """The same training on both nodes, by ranks that srun starts without any launcher."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    words = [sys.executable, *training(run_dir, shards), *STEPS]
    done = slurm.run("srun", "--nodes=2", "--ntasks=2", "--mpi=none", *words, timeout=180)
    assert done.returncode == 0, done.stdout
    return run_dir


def training(run_dir: Path, shards: Path) -> list[str]:
    """The program and its options."""
    command = train(run_dir, shards)
    return command[command.index("launch/train.py") :]


def submit(slurm: Slurm, run_dir: Path, shards: Path, *words: str, options: tuple[str, ...] = ()) -> int:
    """Submit a training on both nodes; returns the job's id."""
    done = slurm.run(sys.executable, "launch/submit.py", *OPTIONS, *options, "--", *training(run_dir, shards), *words)
    found = re.match(r"job (\d+) ", done.stdout)
    assert done.returncode == 0 and found, done.stdout
    return int(found[1])


def output(run_dir: Path, job: int) -> str:
    return (run_dir / "logs" / f"slurm-{job}.log").read_text()


def wait_for(slurm: Slurm, run_dir: Path, job: int, ready: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        over = slurm.job(job)["JobState"] in ENDED or time.monotonic() > deadline
        assert not over, output(run_dir, job) if (run_dir / "logs").exists() else slurm.logs()
        time.sleep(0.1)


def wait_for_step(slurm: Slurm, run_dir: Path, job: int, step: int) -> None:
    file = run_dir / "metrics.jsonl"
    wait_for(slurm, run_dir, job, lambda: file.is_file() and file.read_bytes().count(b"\n") >= step)


def restarts(run_dir: Path) -> list[dict]:
    file = run_dir / "restarts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finishes_as(slurm: Slurm, run_dir: Path, job: int, undisturbed: Path) -> str:
    """Wait for the end of a job; returns its log."""
    state = slurm.wait(job)
    told = output(run_dir, job)
    assert state == "COMPLETED", told
    assert exit_record(run_dir) == {"reason": "finished", "code": 0, "step": 60}
    assert exact(run_dir) == exact(undisturbed)
    return told


def test_a_job_is_queued_again_ahead_of_its_time_limit_and_nothing_is_lost(slurm, tmp_path, shards, undisturbed):
    run_dir = tmp_path / "a 'run' of $HOME"
    secrets = tmp_path / "secrets"
    secrets.write_text("A_TOKEN=hidden\n")
    secrets.chmod(0o600)
    job = submit(slurm, run_dir, shards, *STEPS, options=("--env_file", str(secrets)))
    wait_for_step(slurm, run_dir, job, 5)
    (rank,) = [pid for pid in slurm.cluster.processes("node2", "A_TOKEN=hidden") if variable(pid, "RANK") == "1"]
    assert variable(rank, "A_TOKEN") == "hidden"
    slurm.ask("scancel", "--signal=USR1", "--batch", str(job))
    told = finishes_as(slurm, run_dir, job, undisturbed)
    (note,) = restarts(run_dir)
    assert (note["requeue"], note["job"]) == (1, str(job)) and note["reason"].startswith("SIGUSR1")
    assert f"job {job} is queued again, and goes on from {note['resumes_from']}" in told
    assert f"SLURM job {job}, start 2" in told and f"resumed from {run_dir}" in told
    assert slurm.job(job)["Restarts"] == "1"
    assert "hidden" not in told + slurm.ask("scontrol", "show", "job", str(job))
    for node in slurm.cluster.names:
        assert not slurm.cluster.processes(node, str(run_dir))


def variable(pid: int, name: str) -> str | None:
    return environment(pid).get(name)


def test_ranks_that_srun_starts_are_one_training(undisturbed):
    assert exit_record(undisturbed) == {"reason": "finished", "code": 0, "step": 60}
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, 61))
    assert len(list((undisturbed / "logs").glob("rank0000?.log"))) == 2


def test_what_slurm_refuses_is_one_line(slurm, tmp_path, shards):
    words = (*OPTIONS, "--partition", "nowhere", "--", *training(tmp_path / "run", shards))
    done = slurm.run(sys.executable, "launch/submit.py", *words)
    assert done.returncode == 2 and done.stdout.count("\n") == 1, done.stdout
    assert done.stdout.startswith("error: sbatch refused ") and "invalid partition" in done.stdout


@pytest.mark.slow
def test_sigterm_is_a_stop_for_good(slurm, tmp_path, shards):
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, shards, "--train.max_steps", "100000")
    wait_for_step(slurm, run_dir, job, 5)
    slurm.ask("scancel", "--signal=TERM", "--batch", str(job))
    assert slurm.wait(job) == "COMPLETED"
    record = exit_record(run_dir)
    assert record["reason"] == "SIGTERM" and record["code"] == 0, output(run_dir, job)
    assert (run_dir / "checkpoints" / f"step_{record['step']:08d}" / "MANIFEST.json").is_file()
    assert not restarts(run_dir) and slurm.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_preempted_job_comes_back(slurm, tmp_path, shards, undisturbed):
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, shards, *STEPS)
    wait_for_step(slurm, run_dir, job, 5)
    urgent = (
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        f"--output={tmp_path / 'urgent.log'}",
        "--wrap",
        "sleep 1",
    )
    slurm.ask("sbatch", *urgent)
    told = finishes_as(slurm, run_dir, job, undisturbed)
    assert [note["reason"] for note in restarts(run_dir)] == ["preempted"], told


@pytest.mark.slow
def test_a_lost_node_leads_to_another_turn_in_the_queue(slurm, tmp_path, shards, undisturbed):
    """The job notices before SLURM does, whose patience is minutes."""
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, shards, *STEPS, options=("--fail_minutes", "0.05", "--max_restarts", "0"))
    wait_for_step(slurm, run_dir, job, 25)
    slurm.cluster.kill("node2")
    wait_for(slurm, run_dir, job, lambda: bool(restarts(run_dir)))
    slurm.cluster.boot("node2")
    slurm.boot("node2")
    told = finishes_as(slurm, run_dir, job, undisturbed)
    assert "lost node2: job" in told and [note["reason"] for note in restarts(run_dir)] == ["lost node2"], told


@pytest.mark.slow
def test_the_real_time_limit(slurm, tmp_path, shards):
    """SLURM sends its signal within a minute of the moment that was asked for."""
    run_dir = tmp_path / "run"
    limit = ("--time_limit", "00:02:00", "--signal_minutes", "1", "--max_requeues", "1")
    job = submit(slurm, run_dir, shards, "--train.max_steps", "1000000", "--train.save_every", "1000000", options=limit)
    assert slurm.wait(job, timeout=400) == "FAILED"  # the training has not finished
    told = output(run_dir, job)
    assert [note["reason"][:7] for note in restarts(run_dir)] == ["SIGUSR1"], told
    assert "all 1 requeues are used up" in told and "DUE TO TIME LIMIT" not in told
    assert slurm.job(job)["Restarts"] == "1" and exit_record(run_dir)["reason"] == "SIGUSR1"
