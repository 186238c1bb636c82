"""launch/submit.py with programs that end in every way a start can end, under the real launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardiff.launching.job import End
from ardiff.launching.records import Record
from ardiff.launching.supervisor import judge

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_rank.py")


def start(run_dir: Path, plan: str, *options: str, launcher: str = "python", ranks: int = 1, stop: float = 0.3):
    command = [sys.executable, "launch/submit.py", "--launcher", launcher, "--ranks", str(ranks), *options, "--"]
    command += [str(FAKE), "--run_dir", str(run_dir), "--plan", plan, "--stop_seconds", str(stop)]
    # What a launcher around submit.py would have set must not reach the job.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "7", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 90
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, paths
        time.sleep(0.02)


def processes_of(run_dir: Path) -> list[int]:
    """Those that are still there; so that nothing of a job outlives submit.py."""
    pids = [int(line) for path in run_dir.glob("starts*") for line in path.read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/environ").exists() and is_fake(pid)]


def is_fake(pid: int) -> bool:
    try:
        return FAKE.name in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def restarts(run_dir: Path) -> list[dict]:
    file = run_dir / "restarts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [("finish", 0, 1), ("mistake", 2, 1), ("fail,finish", 0, 2), ("hang,fail,hang", 3, 3), ("die,finish", 0, 2)],
)
def test_restarts_cure_what_a_start_can_cure(tmp_path, plan, code, starts):
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)
    (tmp_path / "exit.json").write_text('{"reason": "finished", "code": 0, "step": 5}')  # of an earlier start
    process = start(tmp_path, plan, "--max_restarts", "2")
    output = finish(process)
    assert process.returncode == code, output
    assert len((tmp_path / "starts0").read_text().splitlines()) == starts
    noted = restarts(tmp_path)
    assert len(noted) == starts - 1
    if noted:
        assert noted[0]["resumes_from"] == "step_00000040" and noted[0]["restart"] == 1
        assert "restart 1 of 2 in 2 s, from step_00000040" in output
    if plan.startswith("hang"):
        assert (noted[0]["reason"], noted[0]["code"], noted[0]["step"]) == ("hang: rank 1", 3, 7)
        assert "all 2 restarts are used up" in output
    if plan.startswith("die"):
        assert (noted[0]["reason"], noted[0]["code"]) == ("killed during training (the launcher died by signal 9)", 1)


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_once(tmp_path, launcher, number):
    if launcher == "deepspeed" and number == signal.SIGINT:
        pytest.skip("slow, and the same as the others")
    process = start(tmp_path, "train", launcher=launcher, ranks=2)
    wait_for(tmp_path / "training0", tmp_path / "training1")
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 0, output
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record == {"reason": signal.Signals(number).name, "code": 0, "step": 9}
    assert processes_of(tmp_path) == []


def test_a_signal_before_training_and_one_in_the_pause_end_with_0(tmp_path):
    process = start(tmp_path / "early", "silent", "--max_restarts", "3")
    wait_for(tmp_path / "early" / "starts0")
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0 and "stopped before training began" in output, output

    process = start(tmp_path / "pause", "fail", "--max_restarts", "3")
    wait_for(tmp_path / "pause" / "restarts.jsonl")
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 0 and "stopped while waiting" in output, output
    assert len(restarts(tmp_path / "pause")) == 1


def test_a_stop_that_takes_too_long_is_a_failure(tmp_path):
    process = start(tmp_path, "train", "--stop_minutes", "0.02", "--max_restarts", "3", stop=60)
    wait_for(tmp_path / "training0")
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 1 and "not ended within 1.2 s" in output, output
    assert processes_of(tmp_path) == [] and restarts(tmp_path) == []


def test_ctrl_c_twice_ends_at_once(tmp_path):
    process = start(tmp_path, "train", stop=60)
    wait_for(tmp_path / "training0")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    output = finish(process)
    assert process.returncode == 130, output
    assert processes_of(tmp_path) == []


@pytest.mark.launcher
def test_a_killed_launcher_is_a_failure_and_its_ranks_stop_in_order(tmp_path):
    process = start(tmp_path, "orphan,finish", "--max_restarts", "1", launcher="torchrun", ranks=2)
    wait_for(tmp_path / "training0", tmp_path / "training1")
    time.sleep(1)
    rank = int((tmp_path / "starts0").read_text())
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(torchrun, signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    (noted,) = restarts(tmp_path)
    assert noted["code"] == 1 and noted["step"] == 9  # the ranks have written their checkpoint
    assert noted["reason"] == "the launcher died by signal 9 before its ranks: SIGTERM"
    assert processes_of(tmp_path) == []


@pytest.mark.launcher
def test_ranks_stop_when_submit_itself_was_killed(tmp_path):
    process = start(tmp_path, "orphan", launcher="torchrun", ranks=2)
    wait_for(tmp_path / "training0", tmp_path / "training1")
    time.sleep(1)
    process.kill()
    until = time.monotonic() + 30
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    assert json.loads((tmp_path / "exit.json").read_text()) == {"reason": "SIGTERM", "code": 0, "step": 9}


def end(code: int, orphaned: bool = False, in_training: bool | None = None) -> End:
    return End(code, orphaned, in_training)


@pytest.mark.parametrize(
    ("how", "record", "code"),
    [
        (end(0), None, 0),  # --help
        (end(2), None, 2),
        (end(247), None, 1),
        (end(-9), None, 1),
        (end(0, orphaned=True), None, 1),
        (end(0), Record("running", None, 4), 1),  # deepspeed says 0 when its second process was killed
        (end(1), Record("finished", 0, 4), 0),
        (end(0, orphaned=True), Record("finished", 0, 4), 0),
        (end(0, orphaned=True), Record("SIGTERM", 0, 4), 1),
        (end(0), Record("SIGTERM", 0, 4), 0),
        (end(1), Record("user error: x", 2, None), 2),
        (end(-15, in_training=False), None, 0),
        (end(1, in_training=False), Record("KeyboardInterrupt: ", 1, None), 0),
        (end(1, in_training=False), Record("user error: x", 2, None), 2),
        (end(-9, in_training=True), Record("running", None, 4), 1),
        (end(1, in_training=True), Record("hang: x", 3, 4), 3),
    ],
)
def test_judge(how, record, code):
    assert judge(how, record, at_once=False).code == code
    assert judge(how, record, at_once=True).code == 130


def test_the_first_host_that_failed_is_named():
    lost = End(255, False, None, how="node2: the connection was lost")
    assert judge(lost, Record("lost a rank", 1, 4), at_once=False).reason == f"lost a rank; first, {lost.how}"
    assert judge(lost, Record("running", None, 4), at_once=False).reason == f"killed during training ({lost.how})"
    assert judge(lost, Record("finished", 0, 4), at_once=False).reason == "finished"
    assert judge(lost, None, at_once=False).reason == f"{lost.how} before training began"


# submit.py where SIGKILL does not end the ranks, as with processes that wait for a disk that hangs.
UNKILLABLE = """
import runpy, signal, sys
from ardiff.launching import job, processes
send = processes.send
processes.send = lambda who, number: number == signal.SIGKILL or send(who, number)
job.KILL_PATIENCE, job.AT_LEAST = float(sys.argv.pop(1)), 0.3
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what comes after the supervisor's end is not meant for it
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("hears", [False, True], ids=["in time", "at a signal"])
def test_processes_that_cannot_be_killed_are_named_and_given_up(tmp_path, hears):
    arguments = [str(FAKE), "--run_dir", str(tmp_path), "--plan", "train", "--stop_seconds", "100"]
    options = ["--launcher", "python", "--stop_minutes", "0.02", "--max_restarts", "3", "--", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", UNKILLABLE, "600" if hears else "1", "launch/submit.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "training0")
    rank = int((tmp_path / "starts0").read_text())
    try:
        process.send_signal(signal.SIGTERM)
        told = [process.stdout.readline()]
        while "killing all processes" not in told[-1]:
            told.append(process.stdout.readline())
            assert told[-1], told
        until = time.monotonic() + 60
        while hears and process.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()  # in case it has not given up
        os.kill(rank, signal.SIGKILL)  # which holds the other end of the pipe
    output = finish(process)
    assert f"SIGKILL does not end {rank} (python" in output and ", state S); a disk or a driver hangs" in output
    assert "not started again beside them" in output and restarts(tmp_path) == []


@pytest.mark.parametrize("where", ["pipe", "full"])
def test_nobody_need_listen(tmp_path, where):
    """A reader that has gone, or a log on a full disk, changes neither the ranks' fate nor the exit code."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "launch/submit.py", "--launcher", "python", "--max_restarts", "1", "--", str(FAKE)]
        process = subprocess.Popen(
            [*command, "--run_dir", str(tmp_path), "--plan", "fail,train"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE if where == "pipe" else full,
            stderr=subprocess.PIPE,
            text=True,
        )
    if where == "pipe":
        assert "1 rank(s) with python" in process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    wait_for(tmp_path / "restarts.jsonl")
    (tmp_path / "training0").unlink(missing_ok=True)  # of the first start
    wait_for(tmp_path / "training0")
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and errors == ""
    assert json.loads((tmp_path / "exit.json").read_text()) == {"reason": "SIGTERM", "code": 0, "step": 9}


def test_the_exit_code_is_true_without_a_listener(tmp_path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "launch/submit.py", "--launcher", "python", "--", str(FAKE), "--plan", "hang"]
        ended = subprocess.run([*command, "--run_dir", str(tmp_path)], cwd=ROOT, stdout=full, check=False, timeout=60)
    assert ended.returncode == 3


# A launcher that is killed as soon as its rank trains, under a job that is told to leave other processes 0.2 s.
ORPHANS = """
import os, sys
from pathlib import Path
from ardiff.launching import job
job.LEFTOVERS = 0.2
launcher = (
    "import os, subprocess, sys, time\\n"
    "subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, 'RANK': '0'})\\n"
    "while not os.path.exists(sys.argv[3] + '/go'): time.sleep(0.02)\\n"
    "os._exit(9)"
)
with job.StopRequest() as stop:
    started = job.Job([sys.executable, "-c", launcher, *sys.argv[1:]], dict(os.environ), False)
    end = started.wait(stop, 30.0, lambda: True, print)
print(end)
"""


def test_a_rank_without_a_launcher_has_time_for_its_checkpoint(tmp_path):
    arguments = [str(FAKE), "--run_dir", str(tmp_path), "--plan", "train", "--stop_seconds", "1.5"]
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "training0")
    time.sleep(1.5)  # until the job has seen the rank
    (tmp_path / "go").touch()
    output = finish(process)
    assert "End(code=9, orphaned=True, in_training=None, outlived=False" in output, output
    assert json.loads((tmp_path / "exit.json").read_text()) == {"reason": "SIGTERM", "code": 0, "step": 9}
