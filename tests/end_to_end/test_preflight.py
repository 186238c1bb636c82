"""launch/preflight.py as a user starts it: a good machine, ranks that differ, hosts with slow links or none."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from data_helpers import write_latents

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, need, why_not
from processes import ROOT, SMALL, launcher, run

from ardiff import cli
from ardiff.monitor.collectives import OPS

pytestmark = pytest.mark.launcher
OPTIONS = [*SMALL, "--quick"]
# Starts the preflight; on rank 1 with other data, settings and versions.
OTHER_RANK = """
import os, runpy, sys
program, shards = sys.argv[1:3]
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(os.path.dirname(program)))
if os.environ["RANK"] == "1":
    sys.argv += ["--data.shards", shards, "--train.seed", "7"]
    from ardiff.preflight import software
    known = software.versions
    software.versions = lambda: {**known(), "deepspeed": "0.0.1"}
runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, lengths=((9, 30, 4), (17, 2, 40), (25, 8)))
    return folder


def test_two_ranks_of_one_machine(tmp_path, shards):
    report, run_dir = tmp_path / "report.json", tmp_path / "runs" / "new"
    command = [*launcher("torchrun", 2), "launch/preflight.py", *OPTIONS, "--data.shards", str(shards)]
    code, output = run([*command, "--run_dir", str(run_dir), "--json", str(report)])
    assert code == cli.EXIT_OK, output
    found = json.loads(report.read_text())
    assert found["version"] == 1 and found["ok"] and not found["failures"] and not found["outliers"], found
    (host,) = found["hosts"]
    assert host["ranks"] == [0, 1] and host["ok"] and host["failures"] == []
    assert host["shards"] == host["shards_read"] == 3 and host["run_dir_shared"] and host["write_mb_per_s"] > 0
    assert all(rate > 0 for rate in [*host["matmul_tflops"], *host["clips_per_s"]])
    assert {(one["op"], one["bytes"]) for one in found["collectives"]} >= {(op, 1024) for op in OPS}
    assert all(one["ranks"] == 2 and one["bus_gb_per_s"] > 0 for one in found["collectives"])
    assert found["estimates"]["memory_gb"]["total"] > 0 and found["estimates"]["step_s"]["total"] > 0
    assert set(found["not_checked"]) == {"GPU state", "clocks", "links between hosts"}
    assert output.rstrip().splitlines()[-1].startswith("preflight: OK (1 host(s), 2 rank(s), ")
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_differs_is_named(tmp_path, shards):
    report, wrapper, other = tmp_path / "report.json", tmp_path / "other.py", tmp_path / "other"
    wrapper.write_text(OTHER_RANK)
    write_latents(other, lengths=((9, 30, 4), (17, 2, 41), (25, 8)))
    command = [*launcher("ranks", 2), str(wrapper), str(ROOT / "launch/preflight.py"), str(other)]
    code, output = run([*command, *OPTIONS, "--data.shards", str(shards), "--json", str(report)])
    assert code == cli.EXIT_FAILURE, output
    found = json.loads(report.read_text())
    (host,) = found["hosts"]
    assert not found["ok"] and not host["ok"]
    begins = ("deepspeed's version is 0.0.1 here", "the configuration (digest) is ", "the data (identity of manifest")
    assert len(host["failures"]) == len(begins), host["failures"]
    for line, words in zip(host["failures"], begins, strict=True):
        assert line.startswith(f"rank 1: {words}") and f"on {host['host']} (rank 0); " in line
        assert f"  {host['host']}: {line}" in output
    assert "  run_dir: no --run_dir" in output
    verdict = next(line for line in output.splitlines() if line.startswith("preflight: "))
    assert verdict.startswith(f"preflight: FAILED, 3 failures on {host['host']} (")


def test_a_mistake_is_one_line():
    code, output = run([sys.executable, "launch/preflight.py", *OPTIONS, "--train.micro_batch_size", "3"])
    assert code == cli.EXIT_USER_ERROR
    (line,) = output.splitlines()
    assert line.startswith("error: ")
    assert "train.global_batch_size = 8 is no multiple of train.micro_batch_size = 3" in line


def ranks_on(cluster: Cluster, *options: str) -> list:
    """A preflight of one rank on every node; the ranks in order."""
    started = []
    for rank, node in enumerate(cluster.names):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(cluster.names)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": cluster.addresses["node1"], "MASTER_PORT": "29500"}
        words = ["python", "launch/preflight.py", *OPTIONS, "--world_size", "2", *options]
        started.append(cluster.start(node, words, {**place, **address}))
    return started


@pytest.mark.slow
def test_the_node_with_a_slow_link_is_named(tmp_path, shards):
    need(why_not())
    report, run_dir = tmp_path / "report.json", tmp_path / "run"
    with Cluster(nodes=3) as nodes:
        nodes.slow("node2", "10mbit")
        options = ("--data.shards", str(shards), "--run_dir", str(run_dir), "--json", str(report))
        ranks = ranks_on(nodes, *options)
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [cli.EXIT_FAILURE] * 3, outputs
    found = json.loads(report.read_text())
    assert found["outliers"] == ["node2"]
    assert {host["host"]: host["ok"] for host in found["hosts"]} == {"node1": True, "node2": False, "node3": True}
    (line,) = found["hosts"][1]["failures"]
    assert line.startswith("sends at ") and " and receives at " in line
    assert all(host["run_dir_shared"] for host in found["hosts"]) and not run_dir.exists()
    clocks = [(host["clock_ahead_s"], host["clock_error_s"]) for host in found["hosts"][1:]]  # of one machine
    assert all(abs(ahead) <= error + 0.001 and error < 0.5 for ahead, error in clocks)
    assert "preflight: FAILED, 1 failure on node2 (3 host(s), 3 rank(s), " in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "kill", "stop"])
def test_a_node_that_is_lost_meanwhile_is_named_and_nobody_hangs(tmp_path, shards, fault):
    need(why_not())
    report, run_dir = tmp_path / "report.json", tmp_path / "run"
    options = ("--data.shards", str(shards), "--run_dir", str(run_dir), "--json", str(report), "--timeout", "10")
    with Cluster(nodes=2) as nodes:
        ranks = ranks_on(nodes, *options)
        until = time.monotonic() + 100
        while not (run_dir / "logs").is_dir():  # both have begun
            assert time.monotonic() < until
            time.sleep(0.1)
        begin = time.monotonic()
        if fault == "stop":
            (process,) = nodes.processes("node2", "preflight.py")
            os.kill(process, signal.SIGSTOP)
        else:
            {"cut": nodes.cut, "kill": nodes.kill}[fault]("node2")
        output = ranks[0].communicate(timeout=150)[0]
        assert time.monotonic() - begin < 120
        if fault == "cut":  # which hears nothing, and ends by itself
            assert "was this host or rank 0's cut off?" in ranks[1].communicate(timeout=100)[0]
            assert ranks[1].returncode == cli.EXIT_FAILURE
        if fault == "stop":
            os.kill(process, signal.SIGKILL)
            os.kill(ranks[1].pid, signal.SIGCONT)  # nsenter stops when what it has started does
        ranks[1].communicate()
    assert ranks[0].returncode == cli.EXIT_FAILURE, output
    found = json.loads(report.read_text())
    assert {host["host"]: host["ok"] for host in found["hosts"]} == {"node1": True, "node2": False}
    (line,) = found["hosts"][1]["failures"]
    assert line.startswith("did not finish: last seen in '") and "no sign of life for" in line
    assert not run_dir.exists()
