"""Inside a SLURM job, with commands that answer as SLURM's do: nodes, srun's words, and when it is queued again."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import launch.submit
from ardiff.errors import UserError
from ardiff.launching import allocation, processes, records
from ardiff.launching.allocation import SAME_CHECKPOINT, Allocation, NoAnswerError, Srun, why_again
from ardiff.launching.command import run_dir_of
from ardiff.launching.job import End, StopRequest
from ardiff.launching.records import Record

SCONTROL = """#!/bin/sh
cd "$(dirname "$0")"
if test -s failures; then sed -i 1d failures; echo "Unable to contact slurm controller" >&2; exit 1; fi
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


JOB = ("--", "launch/train.py", "--run_dir")
USR1, TERM, INT = (signal.SIGUSR1,), (signal.SIGTERM,), (signal.SIGINT,)


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
    monkeypatch.setattr(allocation, "ASK_AGAIN", 0.01)
    monkeypatch.setattr(allocation, "ASK_SECONDS", 5.0)
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


def signalled(*numbers: int) -> StopRequest:
    """What has heard these."""
    with StopRequest() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
    return stop


def end(run_dir: Path, code=0, heard=(), reason=None, limit=None) -> tuple[int, str]:
    """What the script ends with, and what is told."""
    told = Told()
    record = Record(reason, code, 7) if reason else None
    stop = signalled(*heard)
    code = Allocation.here(stop).conclude(code, stop, record, run_dir, limit, told)
    return code, "\n".join(told)


def test_the_nodes_of_a_job(slurm, monkeypatch):
    here = Allocation.here(StopRequest())
    assert here == Allocation("41", ("node1", "node2"), 2, True)
    assert [(host.name, host.slots) for host in here.with_ranks((8,))] == [("node1", 8), ("node2", 8)]
    assert [host.slots for host in here.with_ranks((8, 4))] == [8, 4]
    with pytest.raises(UserError, match="3 numbers for 2 node"):
        here.with_ranks((1, 2, 3))
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not Allocation.here(StopRequest()).is_batch


def test_the_words_of_srun(slurm, monkeypatch):
    assert Srun().command("node1", "cd / && x 'y z'") == [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node1", "--export=ALL", "--mpi=none"),
        *("sh", "-c", "cd / && x 'y z'"),
    ]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    here = Allocation.here(StopRequest()).carrier(570.0, StopRequest())
    assert {"--cpus-per-task=16", "--cpu-bind=none"} <= set(here.command("node1", "x"))
    assert here.environment() == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "570"}
    assert [code for code in (0, 1, 2, 3, 130, 137, 143, -9) if here.lost(code)] == [137, 143, -9]


@pytest.mark.parametrize(
    ("code", "heard", "reason", "taken", "silent", "why"),
    [
        (0, USR1, "SIGUSR1", None, [], "SIGUSR1"),
        (0, None, "SIGUSR1", None, [], "SIGUSR1"),  # scancel without --batch: only the ranks heard it
        (0, USR1, None, None, [], "SIGUSR1"),  # before training began
        (1, USR1, "running", None, [], "SIGUSR1"),  # too slow: killed
        (0, USR1, "finished", None, [], None),
        (130, USR1, None, None, [], "SIGUSR1"),  # during the preflight
        (130, INT, None, "preempted", [], None),
        (2, USR1, "user error: x", None, [], None),
        (0, TERM, "SIGTERM", None, [], None),
        (0, None, "SIGTERM", "preempted", [], "preempted"),
        (0, USR1 + TERM, "SIGUSR1", None, [], None),  # the user wants it to end all the same
        (0, USR1 + TERM, "SIGUSR1", "the time limit", [], "the time limit"),  # too slow: that is SLURM's
        (1, None, "SIGTERM", None, ["node2"], "lost node2"),  # ranks stop so too where a connection is lost
        (1, None, "SIGTERM", None, [], None),
        (1, None, "SIGTERM", "preempted", [], "preempted"),
        (1, USR1, "SIGTERM", None, [], "SIGUSR1"),
        (130, TERM + INT + INT, None, "preempted", [], None),
        (1, TERM, None, None, ["node2"], None),  # stopped for good, and badly
        (0, INT, "SIGINT", "preempted", ["node2"], None),
        (1, None, "RuntimeError: x", None, [], None),
        (1, None, "rank 0 lost another rank", None, ["node2", "node3"], "lost node2, node3"),
        (3, None, "hang: rank 1", None, ["node2"], "lost node2"),
        (0, None, "finished", "preempted", ["node2"], None),
    ],
)
def test_what_leads_to_another_turn_in_the_queue(code, heard, reason, taken, silent, why):
    record = Record(reason, code, 7) if reason else None
    found = why_again(code, heard or (), record, lambda: taken, lambda: silent)
    assert found is None if why is None else found is not None and found.startswith(why)


def test_a_job_is_queued_again_and_says_so(slurm, run):
    code, told = end(run, heard=USR1, reason="SIGUSR1")
    assert code == 0 and (slurm / "requeued").read_text() == "requeue 41\n"
    assert told == "SIGUSR1, as ahead of the time limit: job 41 is queued again, and goes on from step_00000040"
    (note,) = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert (note["requeue"], note["job"], note["resumes_from"]) == (3, "41", "step_00000040")


def test_no_srun_outlives_this_stay(slurm, run, monkeypatch):
    """It would end a step of the next one, where numbers begin anew."""
    with subprocess.Popen(["sleep", "60"]) as left:
        monkeypatch.setattr(processes, "below", lambda process: [processes.identity(left.pid)])
        assert end(run, code=1, reason="RuntimeError: x") == (1, "") and left.poll() is None
        assert end(run, heard=USR1)[0] == 0
        assert left.wait(10) == -signal.SIGKILL


def test_a_lost_node_is_replaced_and_a_failure_on_good_ones_is_not(slurm, run):
    assert end(run, code=1, reason="RuntimeError: x") == (1, "")
    (slurm / "node2").touch()
    code, told = end(run, code=1, reason="RuntimeError: x")
    assert code == 0 and told.startswith("lost node2: job 41 is queued again")
    assert (slurm / "requeued").is_file()


def test_sigterm_is_a_stop_for_good_unless_the_job_is_preempted(slurm, run):
    assert end(run, heard=TERM, reason="SIGTERM") == (0, "")
    job = slurm / "job"
    job.write_text(job.read_text().replace("PreemptTime=None", "PreemptTime=2026-11-22T00:02:14"))
    assert end(run, reason="SIGTERM")[1].startswith("preempted: job 41 is queued again")


def test_sigterm_is_one_after_sigusr1_too_unless_it_comes_at_the_time_limit(slurm, run):
    assert end(run, heard=USR1 + TERM, reason="SIGUSR1") == (0, "") and not (slurm / "requeued").exists()
    job = slurm / "job"
    job.write_text(job.read_text().replace("PreemptTime=None", "PreemptTime=None Reason=TimeLimit"))
    assert end(run, heard=USR1 + TERM, reason="SIGUSR1")[1].startswith("the time limit: job 41 is queued again")


def test_signals_are_heard_while_it_is_decided(slurm, run):
    """One that comes while the nodes are asked: SIGUSR1 would have ended this process."""
    (slurm / "node2").touch()
    for number, queued in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        (slurm / "srun").write_text(SRUN.replace("do case", f"do kill -{int(number)} $PPID; case"))
        told = Told()
        with StopRequest() as stop:
            here = Allocation.here(stop)
            code = here.conclude(1, stop, Record("RuntimeError: x", 1, 7), run, None, told)
        assert stop.numbers == {number} and (slurm / "requeued").exists() == queued
        assert code == (0 if queued else 1) and (told[0].startswith("SIGUSR1, as") if queued else not told)


@pytest.mark.parametrize(
    ("change", "limit", "told", "expected"),
    [
        (("Requeue=1", "Requeue=0"), None, "not queued again, as this is no batch job that SLURM requeues", 0),
        (("", ""), 2, "not queued again, all 2 requeues are used up", 1),
        (("", ""), 3, "is queued again", 0),
    ],
)
def test_limits(slurm, run, change, limit, told, expected):
    job = slurm / "job"
    job.write_text(job.read_text().replace(*change))
    code, line = end(run, heard=USR1, reason="SIGUSR1", limit=limit)
    assert code == expected and told in line and (slurm / "requeued").exists() == ("is queued" in told)


def test_a_job_that_gets_no_further_ends(slurm, run):
    for _ in range(SAME_CHECKPOINT):
        assert end(run, heard=USR1)[0] == 0
    with (run / "restarts.jsonl").open("a") as file:
        file.write('{"requeue": 6, "jo')  # cut short: it changes nothing
    code, told = end(run, heard=USR1)
    assert code == 1 and "3 times it got no further than step_00000040" in told
    (run / "checkpoints" / "step_00000041").mkdir()
    assert end(run, heard=USR1)[0] == 0  # one step is progress


def test_a_job_that_never_began_training_ends(slurm, tmp_path, monkeypatch):
    empty = tmp_path / "none"
    assert end(empty, heard=USR1)[0] == 0 and not empty.exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(SAME_CHECKPOINT))
    code, told = end(empty, heard=USR1)
    assert code == 1 and "no further than the beginning" in told


def test_a_refusal_of_slurm_is_a_failure(slurm, run, monkeypatch):
    (slurm / "refuse").touch()
    monkeypatch.setattr(allocation, "ASK_SECONDS", 0.1)
    code, told = end(run, heard=USR1, reason="SIGUSR1")
    assert code == 1 and "SLURM does not queue it again: Requested operation is disabled" in told


def test_a_controller_that_does_not_answer_is_asked_again(slurm, run, monkeypatch):
    for times in (1, 2, 3):
        (slurm / "failures").write_text("x\n" * times)
        assert end(run, heard=USR1)[0] == 0 and not (slurm / "failures").read_text()
    assert (slurm / "requeued").read_text().count("requeue 41") == 3
    monkeypatch.setattr(allocation, "ASK_SECONDS", 0.1)
    (slurm / "failures").write_text("x\n" * 1000)
    with pytest.raises(NoAnswerError, match=r"scontrol show hostnames .* Unable to contact slurm controller"):
        Allocation.here(StopRequest())
    left = (slurm / "failures").read_text().count("x")
    with pytest.raises(NoAnswerError):  # Ctrl-C ends the patience
        Allocation.here(signalled(signal.SIGINT))
    assert 0 < left < 999 and (slurm / "failures").read_text().count("x") == left - 1


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_of_a_job_there_are_no_nodes(slurm, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match="this is not inside a SLURM job"):
        Allocation.here(StopRequest())


def test_without_slurms_commands_there_are_none_either(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun is not in PATH on"):
        Allocation.here(StopRequest())


@pytest.mark.parametrize(("restarts", "held"), [("2", 0.5), ("2", 60.0), ("0", 0.5)])
def test_ranks_of_the_last_stay_are_waited_for(slurm, run, monkeypatch, restarts, held):
    """They stop by themselves on a node that SLURM has lost, and hold the run until then."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(records.in_use, "__defaults__", (0.1, *records.in_use.__defaults__[1:]))
    monkeypatch.setattr(launch.submit, "Fleet", Idle)
    monkeypatch.setattr(sys, "argv", ["submit.py", "--carrier", "srun", "--ranks", "1", *JOB, str(run)])
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = threading.Timer(held, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        free.start()
        try:
            if restarts == "0":
                with pytest.raises(UserError, match="another run is writing there"):
                    launch.submit.main()
            else:
                assert launch.submit.main() == (0 if held < Idle.lock_patience else 1)
        finally:
            free.cancel()
    assert not (slurm / "requeued").exists()


class Idle:
    """A job that has nothing to do."""

    is_first, lock_patience, record_patience = True, 1.0, 0.0

    def __init__(self, hosts, spares, carrier, settings) -> None:
        self.run_dir = run_dir_of(settings.command)

    def prepare(self, again, stop, tell) -> bool:
        return True

    def start(self, tell) -> "Idle":
        return self

    def wait(self, stop, stop_seconds, in_training, tell) -> End:
        return End(0, False, None)

    def close(self) -> None:
        pass
