"""Several nodes, each with its own address, processes and ssh (tests/end_to_end/cluster), and one of them failing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from cluster import REQUIRED, Cluster, Program, need, why_not
from processes import BIN, ROOT, SMALL, descendants, exact, exit_record, run, train, wait_for_step

from ardiff import cli

pytestmark = pytest.mark.launcher

LIMITS = ("--train.max_steps", "60", "--train.save_every", "8")
# Short patience: a rank that waits for a lost node, ssh that hears nothing of it, and the other nodes after that
HANG = ("--train.hang_minutes", "0.1")
PATIENCE = ("--ssh_args=-o ServerAliveInterval=2 -o ConnectTimeout=4", "--fail_minutes", "0.2")
FINISHED = {"reason": "finished", "code": 0, "step": 60}
FOUR = ("--train.micro_batch_size", "2")  # so that 4 ranks share the batch of 8


@pytest.fixture(scope="module")
def cluster():
    """node3 is a spare."""
    need(why_not())
    with Cluster(nodes=3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def four_nodes():
    need(why_not())
    with Cluster(nodes=4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Path:
    """Two ranks on this machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(train(run_dir, shards, *LIMITS))
    assert code == 0, output
    return run_dir


@pytest.fixture(scope="module")
def undisturbed_four(tmp_path_factory, shards) -> Path:
    """Four ranks on this machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(train(run_dir, shards, *LIMITS, *FOUR, ranks=4))
    assert code == 0, output
    return run_dir


def program(run_dir: Path, shards: Path, *extra: str, name: str = "train") -> list[str]:
    return [
        *(f"launch/{name}.py", "--ds_config", "ds_configs/zero2_cpu.json", *SMALL, *LIMITS),
        *("--data.shards", str(shards), "--run_dir", str(run_dir), *extra),
    ]


def submit(cluster: Cluster, nodes: int, command: list[str], *options: str) -> list[str]:
    hostfile = cluster.hostfile(names=cluster.names[:nodes])
    return [sys.executable, "launch/submit.py", "--hostfile", str(hostfile), *options, "--", *command]


def left(cluster: Cluster, text: str | Path) -> list[list[str]]:
    """Processes on any node with that text in their words or variables."""
    return [words for node in cluster.names for words in cluster.processes(node, str(text)).values()]


def ranks(cluster: Cluster, node: str, run_dir: Path) -> list[int]:
    found = cluster.processes(node, str(run_dir))
    return [pid for pid, words in found.items() if "launch/train.py" in words[1:3]]


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)


def finish(process: Program) -> str:
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


def restarts(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "restarts.jsonl").read_text().splitlines()]


def test_what_is_missing_is_named_and_may_be_required(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool, path=None: None if tool in ("ip", "tc", "pdsh") else tool)
    reason = why_not.__wrapped__()
    assert reason == "a cluster of namespaces needs the packages iproute2 pdsh"
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        need(reason)
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=reason):
        need(reason)


def test_a_cluster_ends_with_whoever_holds_it():
    need(why_not())
    paths = [str(ROOT), str(Path(__file__).parent)]
    holder = "import sys, time; sys.path[:0] = sys.argv[1:]; from cluster import Cluster\n"
    holder += "with Cluster() as nodes: print(nodes.folder, flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", holder, *paths], stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        below = descendants(process.pid)
        assert folder.is_dir() and len(below) >= 8  # unshare and the first process of hub and nodes, sshd
        process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the nodes end")
    assert not folder.exists()


def test_deepspeed_by_itself(cluster, tmp_path, shards, undisturbed):
    """DeepSpeed's own launcher; it starts the ranks through pdsh, without the virtual environment's PATH."""
    run_dir = tmp_path / "run"
    hostfile = cluster.hostfile(names=cluster.names[:2])
    done = cluster.run("node1", [BIN / "deepspeed", "--hostfile", hostfile, *program(run_dir, shards)])
    assert done.returncode == 0, done.stdout
    told = {line.partition(":")[0] for line in done.stdout.splitlines() if "exits successfully" in line}
    assert told == {"node1", "node2"}
    assert exit_record(run_dir) == FINISHED
    assert exact(run_dir) == exact(undisturbed)
    assert left(cluster, run_dir) == []


@pytest.mark.parametrize("carrier", ["ssh", pytest.param("pdsh", marks=pytest.mark.slow)])
def test_a_node_that_is_cut_off_is_replaced(cluster, tmp_path, shards, undisturbed, carrier):
    """No packet comes from it, and nobody is told: the hang is found, ranks end everywhere, a spare takes over."""
    run_dir = tmp_path / "run"
    options = ("--carrier", carrier, "--spares", "node3", "--max_restarts", "1", *PATIENCE)
    process = cluster.start("node1", submit(cluster, 2, program(run_dir, shards, *HANG), *options))
    wait_for_step(run_dir, 10, process)
    cluster.cut("node2")
    try:
        cut_at = time.monotonic()
        wait_until((run_dir / "restarts.jsonl").exists, "the job ends and is started again")
        seconds = time.monotonic() - cut_at
        output = finish(process)
    finally:
        cluster.mend("node2")
    assert process.returncode == 0, output
    assert seconds < 50  # 6 s until the hang or the lost connection is noticed, 12 s for the others, and margins
    assert "node2: the connection was lost" in output
    assert "node2: cannot be reached by" in output and "node3 takes its place" in output
    (restart,) = restarts(run_dir)
    assert restart["code"] in (cli.EXIT_HUNG, cli.EXIT_FAILURE) and restart["resumes_from"] in output
    assert exit_record(run_dir) == FINISHED
    assert exact(run_dir) == exact(undisturbed)
    assert left(cluster, run_dir) == []  # node2 neither: its rank has noticed by itself


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cable pulled and plugged in again", "node reset", "ranks killed"])
def test_a_node_that_comes_back_is_used_again(cluster, tmp_path, shards, undisturbed, what):
    run_dir = tmp_path / "run"
    options = ("--max_restarts", "1", *PATIENCE)
    process = cluster.start("node1", submit(cluster, 2, program(run_dir, shards, *HANG), *options))
    wait_for_step(run_dir, 10, process)
    if what == "cable pulled and plugged in again":
        cluster.cut("node2")
        try:
            wait_until(lambda: not ranks(cluster, "node1", run_dir), "the rank of the first node ends")
            wait_until(lambda: not ranks(cluster, "node2", run_dir), "that of the second, which hears of nobody")
        finally:
            cluster.mend("node2")
    elif what == "node reset":
        cluster.kill("node2")
        cluster.boot("node2")
    else:
        killed = ranks(cluster, "node2", run_dir)
        assert len(killed) == 1
        os.kill(killed[0], 9)
    output = finish(process)
    assert process.returncode == 0, output
    assert len(restarts(run_dir)) == 1
    assert exact(run_dir) == exact(undisturbed)
    assert left(cluster, run_dir) == []


@pytest.mark.slow
def test_a_healthy_node_whose_connection_is_lost_is_used_again(cluster, tmp_path, shards, undisturbed):
    """All ranks stop in order then, with a checkpoint and code 0, which is no end of the job."""
    run_dir = tmp_path / "run"
    options = ("--max_restarts", "1", "--ssh_args=-o ServerAliveInterval=2", "--fail_minutes", "0.5")
    process = cluster.start("node1", submit(cluster, 2, program(run_dir, shards), *options))
    wait_for_step(run_dir, 10, process)
    found = cluster.processes("node1", str(run_dir))
    (carrier,) = [pid for pid, words in found.items() if Path(words[0]).name == "ssh" and "node2" in words]
    os.kill(carrier, signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    (restart,) = restarts(run_dir)
    assert restart["reason"] == "node2: the connection was lost; the ranks: SIGTERM", output
    assert restart["code"] == cli.EXIT_FAILURE and restart["step"] < 60
    assert "2 rank(s) on node1, node2" in output.partition("restart 1 of 1")[2]
    assert exit_record(run_dir) == FINISHED and exact(run_dir) == exact(undisturbed)
    assert left(cluster, run_dir) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_submit_leaves_a_checkpoint_and_no_process(cluster, tmp_path, shards, number):
    run_dir = tmp_path / "run"
    command = program(run_dir, shards)
    command[command.index("--train.max_steps") + 1] = "1000000"
    process = cluster.start("node1", submit(cluster, 2, command, "--max_restarts", "1"))
    wait_for_step(run_dir, 10, process)
    process.send_signal(number)
    if number == signal.SIGTERM:
        output = finish(process)
        assert process.returncode == 0, output
    wait_until(lambda: left(cluster, run_dir) == [], "all processes end")
    record = exit_record(run_dir)
    assert (record["reason"], record["code"]) == ("SIGTERM", 0)
    assert (run_dir / "checkpoints" / f"step_{record['step']:08d}").is_dir()
    assert not (run_dir / "restarts.jsonl").exists()
    finish(process)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cut", "killed"])
def test_the_job_ends_everywhere_without_a_spare(cluster, tmp_path, shards, what):
    run_dir = tmp_path / "run"
    options = ("--max_restarts", "1", "--host_minutes", "0.1", *PATIENCE)
    process = cluster.start("node1", submit(cluster, 2, program(run_dir, shards, *HANG), *options))
    wait_for_step(run_dir, 10, process)
    (cluster.cut if what == "cut" else cluster.kill)("node2")
    try:
        started = time.monotonic()
        output = finish(process)
        seconds = time.monotonic() - started
        assert process.returncode == cli.EXIT_FAILURE, output
        assert seconds < 90
        assert "node2: the connection was lost" in output
        (line,) = [line for line in output.splitlines() if "not started again" in line]
        assert "1 of 2 hosts cannot be used" in line
        assert left(cluster, run_dir) == []
    finally:
        (cluster.mend if what == "cut" else cluster.boot)("node2")


@pytest.mark.slow
@pytest.mark.parametrize("carrier", ["deepspeed", "ssh", "pdsh"])
def test_training_on_four_nodes(four_nodes, tmp_path, shards, undisturbed_four, carrier):
    run_dir = tmp_path / "run"
    command = program(run_dir, shards, *FOUR)
    if carrier == "deepspeed":
        words = [BIN / "deepspeed", "--hostfile", four_nodes.hostfile(), *command]
    else:
        words = submit(four_nodes, 4, command, "--carrier", carrier)
    done = four_nodes.run("node1", words, timeout=240)
    assert done.returncode == 0, done.stdout
    assert exact(run_dir) == exact(undisturbed_four)
    assert left(four_nodes, run_dir) == []


def test_preflight(cluster, tmp_path, shards):
    report = tmp_path / "preflight.json"
    command = program(tmp_path / "run", shards, "--quick", "--json", str(report), name="preflight")
    done = cluster.run("node1", submit(cluster, 2, command), timeout=240)
    assert done.returncode == 0, done.stdout
    hosts = json.loads(report.read_text())["hosts"]
    assert [(host["host"], host["ranks"], host["ok"]) for host in hosts] == [("node1", [0], True), ("node2", [1], True)]
    assert not (tmp_path / "run").exists() and left(cluster, report) == []


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_profile(request, tmp_path, shards, nodes):
    cluster = request.getfixturevalue("four_nodes" if nodes == 4 else "cluster")
    out = tmp_path / "profile"
    command = program(tmp_path, shards, *FOUR, "--out", str(out), name="profile_throughput")
    del command[command.index("--run_dir") : command.index("--run_dir") + 2]  # it writes no run
    short = ("--steps", "3", "--warmup", "1", "--micro_batches", "none")
    done = cluster.run("node1", submit(cluster, nodes, [*command, *short]), timeout=240)
    assert done.returncode == 0, done.stdout
    profile = json.loads((out / "profile.json").read_text())
    assert profile["machine"]["ranks"] == nodes and profile["machine"]["ranks_per_host"] == 1
    assert len(profile["step"]["parts_ms_by_rank"]) == nodes
    assert (out / "profile.png").stat().st_size > 10_000
    assert left(cluster, out) == []


@pytest.mark.slow
def test_preflight_names_the_node_with_a_slow_link(tmp_path, shards):
    """Then submit leaves it out: a job on three nodes starts with the spare."""
    need(why_not())
    with Cluster(nodes=4) as nodes:
        report = tmp_path / "preflight.json"
        command = program(tmp_path / "run", shards, *FOUR, "--quick", "--json", str(report), name="preflight")
        done = nodes.run("node1", submit(nodes, 4, command), timeout=240)
        assert done.returncode == 0, done.stdout
        fine = json.loads(report.read_text())
        assert [host["host"] for host in fine["hosts"]] == nodes.names and fine["outliers"] == []

        nodes.slow("node2", "50mbit")
        done = nodes.run("node1", submit(nodes, 4, command), timeout=240)
        assert done.returncode == cli.EXIT_FAILURE, done.stdout
        bad = json.loads(report.read_text())
        assert {host["host"]: host["ok"] for host in bad["hosts"]} == {name: name != "node2" for name in nodes.names}
        assert bad["outliers"] == ["node2"]
        assert not (tmp_path / "run").exists()

        command = program(tmp_path / "run", shards, *FOUR)
        words = submit(nodes, 2, command, "--preflight", "--spares", "node3,node4")
        done = nodes.run("node1", words, timeout=280)
        assert done.returncode == 0, done.stdout
        assert "2 rank(s) on node1, node3" in done.stdout
        assert exit_record(tmp_path / "run") == FINISHED
        assert left(nodes, tmp_path) == []
