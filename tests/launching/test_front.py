"""launch/submit.py --hostfile with hosts that are folders of this machine, and a torchrun that starts at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stand_ins

from ardiff.launching import processes, reach

needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_rank.py")


class Front:
    """A job on alpha and beta."""

    def __init__(self, folder: Path, plan: str, *options: str, stop_seconds: float = 0.3, run: str = "run") -> None:
        self.folder, self.run_dir = folder, folder / run
        bin_ = folder / "bin"
        self.environment = stand_ins.install(bin_) if not bin_.exists() else self._again(bin_)
        venv = folder / "venv"
        python = venv / "bin" / "python"
        if not venv.exists():
            stand_ins.python_with_torchrun(venv)
        (folder / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
        own = ["--hostfile", str(folder / "hosts"), "--master_addr", "127.0.0.1", "--fail_minutes", "0.01", *options]
        program = ["--run_dir", str(self.run_dir), "--plan", plan, "--stop_seconds", str(stop_seconds)]
        self.command = [str(python), "launch/submit.py", *own, "--", str(FAKE), *program]

    def _again(self, bin_: Path) -> dict[str, str]:
        return {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        try:
            output = process.communicate(timeout=90)[0]
        finally:
            process.kill()
        assert self.alive() == [] and list(self.folder.glob("**/.ardiff-*")) == [], output
        return output

    def alive(self) -> list[str]:
        """Processes of this job, whichever host they are on."""
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        ours = [number for number in numbers if self.environment["PATH"] == processes.environment(number).get("PATH")]
        marked = [number for number in ours if "ARDIFF_JOB" in processes.environment(number)]
        return [processes.describe(who) for number in marked if (who := processes.identity(number))]

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + 60
        while not all((self.run_dir / name).exists() for name in names):
            assert time.monotonic() < until, names
            time.sleep(0.02)

    def record(self) -> dict:
        return json.loads((self.run_dir / "exit.json").read_text())

    def job_of(self, rank: int) -> str:
        started = (self.run_dir / f"starts{rank}").read_text().split()[-1]
        return processes.environment(int(started))["ARDIFF_JOB"]


def test_a_host_that_is_lost_is_replaced_by_a_spare(tmp_path):
    front = Front(tmp_path, "train,finish", "--max_restarts", "1", "--spares", "gamma,delta")
    (tmp_path / "bin" / "gamma.down").touch()
    process = front.start()
    front.wait_for("training0", "training1")
    (tmp_path / "bin" / "beta.down").touch()
    reach.end(front.job_of(1))
    output = front.finish(process)
    assert process.returncode == 0, output
    assert "spare gamma: cannot be reached by ssh (ssh: connect to host gamma port 22: No route to host)" in output
    assert "beta: the connection was lost; the others have 0.6 s to end" in output
    assert "killing all processes on alpha: not ended within 0.6 s" in output
    assert "beta: cannot be reached to end what is left there" in output
    assert "beta: cannot be reached by ssh" in output and "; delta takes its place" in output
    assert "2 rank(s) on alpha, delta, address 127.0.0.1" in output
    (restart,) = [json.loads(line) for line in (front.run_dir / "restarts.jsonl").read_text().splitlines()]
    assert restart["reason"] == "killed during training (beta: the connection was lost)"
    assert len((front.run_dir / "starts0").read_text().split()) == 2 and front.record()["reason"] == "finished"


def test_a_lost_connection_is_no_end_though_all_ranks_stop_in_order(tmp_path):
    front = Front(tmp_path, "train,finish", "--max_restarts", "1")
    process = front.start()
    front.wait_for("training0", "training1")
    job = front.job_of(1)
    os.kill(int((front.run_dir / "starts0").read_text()), signal.SIGTERM)  # as a rank does that hears of another's stop
    reach.end(job)
    output = front.finish(process)
    assert process.returncode == 0 and front.record()["reason"] == "finished", output
    (restart,) = [json.loads(line) for line in (front.run_dir / "restarts.jsonl").read_text().splitlines()]
    assert (restart["reason"], restart["code"]) == ("beta: the connection was lost; the ranks: SIGTERM", 1)


def test_signals_reach_the_ranks_of_all_hosts(tmp_path):
    front = Front(tmp_path, "train", "--max_restarts", "3")
    process = front.start()
    front.wait_for("training0", "training1")
    process.send_signal(signal.SIGUSR1)
    output = front.finish(process)
    assert process.returncode == 0, output
    assert front.record() == {"reason": "SIGUSR1", "code": 0, "step": 9}
    assert "alpha: " in output and "beta: " in output and not (front.run_dir / "restarts.jsonl").exists()


def test_ctrl_c_twice_ends_everything_everywhere(tmp_path):
    front = Front(tmp_path, "train", stop_seconds=60)
    process = front.start()
    front.wait_for("training0", "training1")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    output = front.finish(process)
    assert process.returncode == 130 and "killing all processes on alpha, beta" in output, output


@pytest.mark.parametrize("carrier", ["ssh", pytest.param("pdsh", marks=needs_pdsh)])
def test_ranks_stop_with_a_checkpoint_when_the_front_is_killed(tmp_path, carrier):
    front = Front(tmp_path, "train", "--carrier", carrier)
    process = front.start()
    front.wait_for("training0", "training1")
    process.kill()
    until = time.monotonic() + 30
    while front.alive() and time.monotonic() < until:
        time.sleep(0.1)
    assert front.alive() == [] and front.record() == {"reason": "SIGTERM", "code": 0, "step": 9}


def test_a_failure_on_one_host_ends_the_others(tmp_path):
    front = Front(tmp_path, "mistake")
    process = front.start()
    output = front.finish(process)
    assert process.returncode == 2 and "user error: no such thing (exit code 2)" in output, output


def test_a_single_host_needs_no_address(tmp_path):
    front = Front(tmp_path, "finish")
    (tmp_path / "hosts").write_text("alpha slots=2\n")
    at = front.command.index("--master_addr")
    del front.command[at : at + 2]
    process = front.start()
    output = front.finish(process)
    assert process.returncode == 0 and "2 rank(s) on alpha, address 127.0.0.1" in output, output
    assert (front.run_dir / "starts1").exists()


def test_every_host_that_cannot_be_used_is_named(tmp_path):
    front = Front(tmp_path, "finish")
    for host in ("alpha", "beta"):
        (tmp_path / "bin" / f"{host}.down").touch()
    process = front.start()
    output = front.finish(process)
    assert process.returncode == 2, output
    lines = output.splitlines()
    assert lines[0].startswith("error: 2 of 2 hosts cannot be used: mend them") and len(lines) == 3
    assert lines[1].startswith("  alpha: cannot be reached") and lines[2].startswith("  beta: cannot be reached")
    assert not front.run_dir.exists()


def test_variables_travel_unseen(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("SECRET_KEY=abc123\n")
    secrets.chmod(0o600)
    front = Front(tmp_path, "train", "--env_file", str(secrets))
    dry = subprocess.run(
        [*front.command[:2], "--dry_run", *front.command[2:]],
        cwd=ROOT,
        env=front.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert dry.returncode == 0 and "SECRET_KEY=***" in dry.stdout and "abc123" not in dry.stdout + dry.stderr
    assert "alpha slots=1" in dry.stdout and "--node_rank 1" in dry.stdout
    assert not (tmp_path / "bin" / "commands").exists() and not front.run_dir.exists()

    process = front.start(NCCL_DEBUG="INFO")
    front.wait_for("training0", "training1")
    for rank in range(2):
        here = processes.environment(int((front.run_dir / f"starts{rank}").read_text()))
        assert (here["SECRET_KEY"], here["NCCL_DEBUG"], here["RANK"]) == ("abc123", "INFO", str(rank))
        assert here["STAND_IN_HOST"] == ("alpha", "beta")[rank]
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"abc123" in line for line in lines)
    assert "abc123" not in (tmp_path / "bin" / "commands").read_text()
    process.send_signal(signal.SIGTERM)
    assert "abc123" not in front.finish(process) and process.returncode == 0
