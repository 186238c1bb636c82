"""Inside a SLURM job, with commands that answer as SLURM's do: nodes, srun's words, and when it is queued again."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ardiff.errors import UserError
from ardiff.launching import processes
from ardiff.launching.allocation import SAME_CHECKPOINT, Allocation, Srun, why_again
from ardiff.launching.records import Record

SCONTROL = """#!/bin/sh
cd "$(dirname "$0")"
case "$*" in
  "show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
  "show config") echo "TaskPlugin              = task/cgroup,task/affinity" ;;
  "--oneliner show job 41") cat job ;;
  "requeue 41") echo "$@" >> requeued
    if test -f refuse; then echo "Requested operation is disabled" >&2; exit 1; fi ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""
# A node answers unless there is a file of its name.
SRUN = """#!/bin/sh
cd "$(dirname "$0")"
for word in "$@"; do case "$word" in --nodelist=*) test -f "${word#--nodelist=}" && exit 1 ;; esac; done
exit 0
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "job").write_text("JobId=41 JobName=sky JobState=RUNNING Requeue=1 BatchFlag=1 PreemptTime=None\n")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(processes, "adopt_orphans", lambda: None)  # this process has others below it
    monkeypatch.setattr(processes, "below", lambda process: [])
    for name, value in {"JOB_ID": "41", "JOB_NODELIST": "node[1-2]", "PROCID": "0", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000040").mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


class Told(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def end(run_dir: Path, code=0, heard=None, reason=None, limit=None) -> tuple[int, str]:
    """What the script ends with, and what is told."""
    told = Told()
    record = Record(reason, code, 7) if reason else None
    code = Allocation.here().conclude(code, heard, record, run_dir, limit, told)
    return code, "\n".join(told)


def test_the_nodes_of_a_job(slurm, monkeypatch):
    here = Allocation.here()
    assert here == Allocation("41", ("node1", "node2"), 2, True)
    assert [(host.name, host.slots) for host in here.with_ranks((8,))] == [("node1", 8), ("node2", 8)]
    assert [host.slots for host in here.with_ranks((8, 4))] == [8, 4]
    with pytest.raises(UserError, match="3 numbers for 2 node"):
        here.with_ranks((1, 2, 3))
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not Allocation.here().is_batch


def test_the_words_of_srun(slurm, monkeypatch):
    assert Srun().command("node1", "cd / && x 'y z'") == [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node1", "--export=ALL", "--mpi=none"),
        *("sh", "-c", "cd / && x 'y z'"),
    ]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    here = Allocation.here().carrier(570.0)
    assert {"--cpus-per-task=16", "--cpu-bind=none"} <= set(here.command("node1", "x"))
    assert here.environment() == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "570"}
    assert [code for code in (0, 1, 2, 3, 130, 137, 143, -9) if here.lost(code)] == [137, 143, -9]


@pytest.mark.parametrize(
    ("code", "heard", "reason", "preempted", "silent", "why"),
    [
        (0, signal.SIGUSR1, "SIGUSR1", False, [], "SIGUSR1"),
        (0, None, "SIGUSR1", False, [], "SIGUSR1"),  # scancel without --batch: only the ranks heard it
        (0, signal.SIGUSR1, None, False, [], "SIGUSR1"),  # before training began
        (1, signal.SIGUSR1, "running", False, [], "SIGUSR1"),  # too slow: killed
        (0, signal.SIGUSR1, "finished", False, [], None),
        (130, signal.SIGUSR1, None, False, [], "SIGUSR1"),  # during the preflight
        (130, signal.SIGINT, None, True, [], None),
        (2, signal.SIGUSR1, "user error: x", False, [], None),
        (0, signal.SIGTERM, "SIGTERM", False, [], None),
        (0, None, "SIGTERM", True, [], "preempted"),
        (1, signal.SIGTERM, None, False, ["node2"], None),  # stopped for good, and badly
        (0, signal.SIGINT, "SIGINT", True, ["node2"], None),
        (1, None, "RuntimeError: x", False, [], None),
        (1, None, "rank 0 lost another rank", False, ["node2", "node3"], "lost node2, node3"),
        (3, None, "hang: rank 1", False, ["node2"], "lost node2"),
        (0, None, "finished", True, ["node2"], None),
    ],
)
def test_what_leads_to_another_turn_in_the_queue(code, heard, reason, preempted, silent, why):
    record = Record(reason, code, 7) if reason else None
    found = why_again(code, heard, record, lambda: preempted, lambda: silent)
    assert found is None if why is None else found is not None and found.startswith(why)


def test_a_job_is_queued_again_and_says_so(slurm, run):
    code, told = end(run, heard=signal.SIGUSR1, reason="SIGUSR1")
    assert code == 0 and (slurm / "requeued").read_text() == "requeue 41\n"
    assert told == "SIGUSR1, as ahead of the time limit: job 41 is queued again, and goes on from step_00000040"
    (note,) = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert (note["requeue"], note["job"], note["resumes_from"]) == (3, "41", "step_00000040")


def test_no_srun_outlives_this_stay(slurm, run, monkeypatch):
    """It would end a step of the next one, where numbers begin anew."""
    with subprocess.Popen(["sleep", "60"]) as left:
        monkeypatch.setattr(processes, "below", lambda process: [processes.identity(left.pid)])
        assert end(run, code=1, reason="RuntimeError: x") == (1, "") and left.poll() is None
        assert end(run, heard=signal.SIGUSR1)[0] == 0
        assert left.wait(10) == -signal.SIGKILL


def test_a_lost_node_is_replaced_and_a_failure_on_good_ones_is_not(slurm, run):
    assert end(run, code=1, reason="RuntimeError: x") == (1, "")
    (slurm / "node2").touch()
    code, told = end(run, code=1, reason="RuntimeError: x")
    assert code == 0 and told.startswith("lost node2: job 41 is queued again")
    assert (slurm / "requeued").is_file()


def test_sigterm_is_a_stop_for_good_unless_the_job_is_preempted(slurm, run):
    assert end(run, heard=signal.SIGTERM, reason="SIGTERM") == (0, "")
    job = slurm / "job"
    job.write_text(job.read_text().replace("PreemptTime=None", "PreemptTime=2026-11-22T00:02:14"))
    assert end(run, reason="SIGTERM")[1].startswith("preempted: job 41 is queued again")


@pytest.mark.parametrize(
    ("change", "limit", "told"),
    [
        (("Requeue=1", "Requeue=0"), None, "not queued again, as this is no batch job that SLURM requeues"),
        (("", ""), 2, "not queued again, all 2 requeues are used up"),
        (("", ""), 3, "is queued again"),
    ],
)
def test_limits(slurm, run, change, limit, told):
    job = slurm / "job"
    job.write_text(job.read_text().replace(*change))
    code, line = end(run, heard=signal.SIGUSR1, reason="SIGUSR1", limit=limit)
    assert code == 0 and told in line and (slurm / "requeued").exists() == ("is queued" in told)


def test_a_job_that_gets_no_further_ends(slurm, run):
    for _ in range(SAME_CHECKPOINT):
        assert end(run, heard=signal.SIGUSR1)[0] == 0
    code, told = end(run, heard=signal.SIGUSR1)
    assert code == 1 and "3 times it got no further than step_00000040" in told
    (run / "checkpoints" / "step_00000041").mkdir()
    assert end(run, heard=signal.SIGUSR1)[0] == 0  # one step is progress


def test_a_job_that_never_began_training_ends(slurm, tmp_path, monkeypatch):
    empty = tmp_path / "none"
    assert end(empty, heard=signal.SIGUSR1)[0] == 0 and not empty.exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(SAME_CHECKPOINT))
    code, told = end(empty, heard=signal.SIGUSR1)
    assert code == 1 and "no further than the beginning" in told


def test_a_refusal_of_slurm_is_a_failure(slurm, run):
    (slurm / "refuse").touch()
    code, told = end(run, heard=signal.SIGUSR1, reason="SIGUSR1")
    assert code == 1 and "SLURM does not queue it again: Requested operation is disabled" in told


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_of_a_job_there_are_no_nodes(slurm, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match="this is not inside a SLURM job"):
        Allocation.here()


def test_without_slurms_commands_there_are_none_either(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun is not in PATH on"):
        Allocation.here()
