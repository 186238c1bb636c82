"""One node's share of a job: started by hand on every node, or by a carrier whose connection may end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stand_ins

from ardiff.launching import processes
from ardiff.launching.node import payload as node_payload
from ardiff.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FAKE = str(Path(__file__).with_name("fake_rank.py"))


def payload(variables: dict[str, str], beats: bool, lost_seconds: float = 60.0) -> bytes:
    return node_payload(variables, beats, lost_seconds)


def share(run_dir: Path, plan: str, *options: str, python: str = sys.executable) -> list[str]:
    own = ["--stop_minutes", "0.2", *options]
    return [python, "launch/submit.py", *own, "--", FAKE, "--run_dir", str(run_dir), "--plan", plan]


STARTED: list[subprocess.Popen[bytes]] = []


def start(command: list[str], **more) -> subprocess.Popen[bytes]:
    STARTED.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        for who in processes.below(process.pid):
            processes.send(who, signal.SIGKILL)
        process.kill()
        process.wait()


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, paths
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["closed", "unread"])
def test_a_carried_share_ends_in_order_with_its_connection(tmp_path, how):
    command = share(tmp_path, "train", "--carried", "-", "--launcher", "python")
    process = start(command, stdin=subprocess.PIPE)
    process.stdin.write(payload({"NCCL_DEBUG": "WARN"}, beats=True))
    process.stdin.flush()
    wait_for(tmp_path / "training0")
    rank = int((tmp_path / "starts0").read_text())
    assert processes.environment(rank)["NCCL_DEBUG"] == "WARN"
    process.stdin.write(b"\n")  # a sign of life
    process.stdin.flush()
    time.sleep(0.3)
    assert process.poll() is None
    if how == "closed":
        errors = process.communicate(timeout=60)[1].decode()
        assert "the connection was closed: the ranks of this host stop" in errors
    else:
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        process.stdin.close()
        process.stderr.close()
    assert process.returncode == 0
    assert json.loads((tmp_path / "exit.json").read_text()) == {"reason": "SIGTERM", "code": 0, "step": 9}


@pytest.mark.parametrize("in_time", [True, False])
def test_silence_is_taken_for_a_lost_connection(tmp_path, in_time):
    """The job goes on elsewhere once the ranks have let go of the run_dir, so they do not have the usual time."""
    patched = (
        "import sys; sys.argv.pop(0); sys.path.insert(0, '.')\n"
        "import runpy; from ardiff.launching import node; node.SILENCE = 0.5\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ("--carried", "-", "--launcher", "python", "--stop_minutes", "10")
    command = [*share(tmp_path, "train", *options), "--stop_seconds", "0.3" if in_time else "100"]
    process = start([command[0], "-c", patched, *command[1:]], stdin=subprocess.PIPE)
    process.stdin.write(payload({}, beats=True, lost_seconds=20.0 if in_time else 0.5))
    process.stdin.flush()
    assert process.wait(timeout=60) == (0 if in_time else 1)
    assert b"no sign of life for 0.5 s" in process.stderr.read()
    assert (b"killing all processes: not ended within" in process.stdout.read()) != in_time
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_variables_from_a_file_are_read_and_removed(tmp_path):
    folder = tmp_path / "variables"
    folder.mkdir()
    (folder / "0.json").write_bytes(payload({"NCCL_DEBUG": "WARN"}, beats=False))
    command = share(tmp_path / "run", "train", "--carried", str(folder / "0.json"), "--launcher", "python")
    process = start(command, stdin=subprocess.PIPE)
    wait_for(tmp_path / "run" / "training0")
    assert not folder.exists()
    assert processes.environment(int((tmp_path / "run" / "starts0").read_text()))["NCCL_DEBUG"] == "WARN"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("sent", [b"", b"nothing\n", b"{}\n"])
def test_a_connection_without_variables_starts_nothing(tmp_path, sent):
    result = subprocess.run(
        share(tmp_path, "train", "--carried", "-"), cwd=ROOT, input=sent, capture_output=True, check=False
    )
    assert result.returncode == 2 and b"--carried -: no variables came over the connection" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nodes_started_by_hand_come_to_the_same_end(tmp_path):
    """The second one waits for what rank 0, on the first one, says of the failure."""
    python = str(stand_ins.python_with_torchrun(tmp_path / "venv"))
    run_dir = tmp_path / "run"
    common = ("--nodes", "2", "--ranks", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    words = (*common, "--max_restarts", "1", "--node_rank")
    second = start(share(run_dir, "fail,train", *words, "1", python=python))
    wait_for(run_dir / "training1")
    (run_dir / "training1").unlink()
    first = start(share(run_dir, "fail,train", *words, "0", python=python))
    wait_for(run_dir / "restarts.jsonl", run_dir / "training1")
    until = time.monotonic() + 60
    while json.loads((run_dir / "exit.json").read_text())["code"] is not None:
        assert time.monotonic() < until
        time.sleep(0.05)
    for node in (first, second):
        node.send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=90)[0].decode() for node in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "1 rank(s) with torchrun, node 0 of 2" in outputs[0] and "node 1 of 2" in outputs[1]
    assert all("RuntimeError: lost (exit code 1)" in output for output in outputs)
    assert [len((run_dir / f"starts{rank}").read_text().split()) for rank in range(2)] == [2, 2]
    assert len((run_dir / "restarts.jsonl").read_text().splitlines()) == 1  # noted by the first node alone
