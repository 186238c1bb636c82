"""A table of faults: what ranks found -> the host that is named, and the line that says so."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ardiff.config import load
from ardiff.preflight.checks import Finding, Remark, Report
from ardiff.preflight.forecast import forecast
from ardiff.preflight.network import AMONG
from ardiff.preflight.program import CHECKS, _together
from ardiff.preflight.result import assemble
from ardiff.preflight.table import lines_of

HOSTS = ["node1", "node1", "node2", "node2", "node3", "node3"]
GOOD = {
    "version torch": "2.11",
    "source": "aaaa",
    "commit": "c0",
    "changes": "none",
    "environment": {"NCCL_DEBUG": "WARN"},
    "configuration": "c1",
    "ds_config": "d1",
    "devices": 2,
    "device": "H200",
    "gpu": {"power_limit_w": 700.0},
    "data": "s1",
    "held_out": "none",
    "clips_per_s": 1000.0,
    "matmul_tflops": 700.0,
    "matmul_model": "H200",
    "matmul_digest": "abcd",
    "backend": "nccl",
}
FIRST = {"cores": 96, "host_memory_gb": 1000.0, "write_mb_per_s": 900.0, "within_gb_per_s": 400.0}  # of a host
# rank -> figures that it has instead; the host named; words of its line; whether it is a failure, and an outlier
FAULTS = [
    ({3: {"version torch": "2.10"}}, "node2", "rank 3: torch's version is 2.10 here, but 2.11 on node1", 1, 0),
    ({4: {"version torch": None}}, "node3", "rank 4: torch is not installed here, but elsewhere", 1, 0),
    (
        {2: {"source": "bb"}, 3: {"source": "bb"}},
        "node2",
        "the source (a digest of all program files) is bb",
        1,
        0,
    ),
    ({2: {"commit": "c9"}, 3: {"commit": "c9"}}, "node2", "the git commit is c9 here, but c0 on node1", 0, 0),
    ({5: {"environment": {}}}, "node3", "rank 5: the variable NCCL_DEBUG is not set here, but WARN on", 0, 0),
    ({5: {"configuration": "c2"}}, "node3", "rank 5: the configuration (digest) is c2 here, but c1 on", 1, 0),
    ({0: {"ds_config": "d2"}}, "node1", "rank 0: the ds_config (digest) is d2 here, but d1 on", 1, 0),
    ({4: {"devices": 1}, 5: {"devices": 1}}, "node3", "the number of devices is 1 here, but 2 on node1", 1, 0),
    ({1: {"device": "A800"}}, "node1", "rank 1: the device is A800 here, but H200 on", 1, 0),
    ({2: {"uuid": "GPU-1"}, 3: {"uuid": "GPU-1"}}, "node2", "these ranks share one GPU (GPU-1); start one rank", 1, 0),
    ({3: {"gpu": {"power_limit_w": 300.0}}}, "node2", "rank 3: power limit 300 W, elsewhere 700 W; raise it", 1, 0),
    ({4: {"data": "s2"}}, "node3", "rank 4: the data (identity of manifest and shards) is s2 here, but s1", 1, 0),
    ({0: {"clips_per_s": 100.0}}, "node1", "rank 0: shards give 100 clips/s, on most ranks 1000", 0, 0),
    ({5: {"matmul_tflops": 400.0}}, "node3", "rank 5: matrix products run at 400 TFLOP/s, on most ranks at 700", 1, 1),
    ({5: {"matmul_tflops": 600.0}}, "node3", "rank 5: matrix products run at 600 TFLOP/s, on most ranks at 700", 0, 0),
    ({2: {"matmul_digest": "ffff"}}, "node2", "rank 2: the result of a matrix product (digest) is ffff here", 0, 0),
    ({2: {"clock_ahead_s": -2.0, "clock_error_s": 0.1}}, "node2", "the clock is 2.00 s behind rank 0's", 0, 0),
    (
        {2: {"clock_ahead_s": 90.0, "clock_error_s": 0.1}},
        "node2",
        "the clock is 90.00 s ahead of rank 0's",
        1,
        0,
    ),
    (
        {4: {"within_gb_per_s": 40.0}},
        "node3",
        "collectives within this host reach 40 GB/s, within most hosts 400",
        1,
        1,
    ),
    ({2: {"cores": 8}}, "node2", "8 cores, most hosts have 96", 0, 0),
    ({4: {"write_mb_per_s": 9.0}}, "node3", "run_dir is written at 9 MB/s; checkpoints will take long", 0, 0),
]


def links(slow: str = "", rate: float = 25.0, hosts=("node1", "node2", "node3")) -> dict[int, dict]:
    """Messages of each host to its neighbours, in a ring; those of `slow` at `rate`."""
    found: dict[int, dict] = {}
    for rank, host in zip((0, 2, 4), hosts, strict=False):
        others = [other for other in hosts if other != host]
        speeds = [{"from": host, "to": o, "gb_per_s": rate if slow in (host, o) else 25.0} for o in others]
        found[rank] = {"links": speeds}
    return found


def reports_with(changes: dict[int, dict]) -> list[Report]:
    reports = []
    for rank, host in enumerate(HOSTS):
        figures = GOOD | (FIRST if rank % 2 == 0 else {}) | changes.get(rank, {})
        known = {name: value for name, value in figures.items() if value is not None}
        reports.append(Report(rank, rank % 2, host, {"all": Finding(known)}))
    return reports


def test_a_good_cluster_has_nothing_to_say():
    result = assemble(reports_with(links()), CHECKS, HOSTS)
    assert result.ok and not result.outliers
    assert [host["host"] for host in result.hosts] == ["node1", "node2", "node3"]
    assert all(host["ok"] and not host["warnings"] for host in result.hosts)
    assert result.hosts[0]["matmul_tflops"] == 700.0 and result.hosts[1]["ranks"] == [2, 3]
    text = lines_of(result)
    assert text[-1] == "preflight: OK (3 host(s), 6 rank(s), 0 s)"
    assert not any("FAILED" in line for line in text)


@pytest.mark.parametrize(("changes", "host", "words", "fails", "outlier"), FAULTS, ids=[row[2][:40] for row in FAULTS])
def test_a_fault_is_named(changes, host, words, fails, outlier):
    result = assemble(reports_with(changes), CHECKS, HOSTS)
    named = {entry["host"]: entry for entry in result.hosts}
    lines = named[host]["failures" if fails else "warnings"]
    assert any(line.startswith(words) for line in lines), lines
    assert result.ok == (not fails) and named[host]["ok"] == (not fails)
    assert result.outliers == ([host] if outlier else [])
    others = [line for name, entry in named.items() if name != host for line in entry["failures"]]
    assert others == []
    text = lines_of(result)
    assert any(words in line and host in line for line in text)
    assert text[-1].startswith(f"preflight: FAILED, 1 failure on {host} (" if fails else "preflight: OK (")


def test_the_host_with_the_slow_link_is_named_and_not_its_neighbours():
    result = assemble(reports_with(links("node2", 2.0)), CHECKS, HOSTS)
    assert result.outliers == ["node2"]
    (line,) = result.hosts[1]["failures"]
    assert line.startswith("sends at 2 GB/s (most at 25) and receives at 2 GB/s (most at 25); look at its cable")
    assert result.hosts[0]["ok"] and result.hosts[2]["ok"]
    assert len(result.links) == 6


def test_of_two_hosts_it_is_not_known_which_is_slow():
    two = {0: {"links": [{"from": "node1", "to": "node2", "gb_per_s": 25.0}]}}
    two[2] = {"links": [{"from": "node2", "to": "node1", "gb_per_s": 1.0}]}
    result = assemble(reports_with(two), CHECKS, HOSTS)
    assert not result.ok and all(host["ok"] for host in result.hosts)
    assert result.failures[0].startswith(
        "node2 sends to node1 at 1 GB/s, the other way it is 25: one of the two is slow"
    )


def test_what_all_have_is_not_the_fault_of_any_host():
    reports = reports_with({rank: {"devices": 8} for rank in range(6)})
    for report in reports:
        report.findings["shards"] = Finding(failures=["shards: /data: no such folder"])
    result = assemble(reports, CHECKS, HOSTS)
    assert result.failures == ["shards: /data: no such folder"]
    assert result.warnings == ["8 GPUs, but 2 rank(s); start one for every GPU"]
    assert not result.ok and all(host["ok"] for host in result.hosts)
    alone = assemble(reports[:2], CHECKS, HOSTS[:2])
    assert not alone.hosts[0]["ok"] and alone.hosts[0]["failures"] == result.failures


def test_ranks_that_have_not_come_are_one_entry_per_host():
    hosts = ["node1", "node1", "", "", "", ""]
    absent = Remark("not come within 60 s", (2, 3, 4, 5))
    result = assemble(reports_with({})[:2], CHECKS, hosts, [absent])
    assert [(host["host"], host["ranks"], host["ok"]) for host in result.hosts] == [
        ("node1", [0, 1], True),
        ("?", [2, 3], False),
        ("?", [4, 5], False),
    ]
    assert "  ? (ranks 2-3), ? (ranks 4-5): not come within 60 s" in lines_of(result)


def test_a_host_with_more_than_most_is_no_fault_of_the_others():
    result = assemble(reports_with({0: {"cores": 256, "host_memory_gb": 4000.0}}), CHECKS, HOSTS)
    assert result.ok and not any(host["warnings"] for host in result.hosts)


def test_the_memory_of_the_gpus_is_in_the_table():
    (heading,) = [line for line in lines_of(assemble(reports_with({}), CHECKS, HOSTS)) if "TFLOP/s" in line]
    assert "GPU GiB" not in heading
    text = lines_of(assemble(reports_with({rank: {"memory_gb": 139.8} for rank in range(6)}), CHECKS, HOSTS))
    (heading,) = [line for line in text if "TFLOP/s" in line]
    (row,) = [line for line in text if line.startswith("  node2 ")]
    assert row[: heading.index("GPU GiB") + len("GPU GiB")].endswith(" 140")


def test_who_waits_in_vain_is_not_to_blame():
    def hanging() -> list[Report]:
        reports = reports_with({})
        for report in reports[:4]:
            report.findings["collectives"] = Finding(failures=["collectives: no answer within 60 s"])
        return reports

    assert _together(CHECKS, hanging(), missing=[4, 5]) == []
    (remark,) = _together(CHECKS, hanging(), missing=[])
    assert remark == Remark("collectives: no answer within 60 s (on ranks 0-3)")
    reports = hanging()
    assert assemble(reports, CHECKS, HOSTS, _together(CHECKS, reports, [])).hosts[0]["ok"]


def context(tmp_path: Path, *overrides: str) -> SimpleNamespace:
    return SimpleNamespace(
        config=load("ardiff_xl", list(overrides)),
        ds_settings={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}},
        trains="DiT",
        run_size=6,
        job=None,
        device=SimpleNamespace(type="cuda"),
        options=Namespace(run_dir=tmp_path / "run"),
    )


def test_a_model_that_does_not_fit_is_a_failure(tmp_path):
    batch = ("--train.global_batch_size", "1536", "--train.micro_batch_size", "256")
    estimated, remarks = forecast(context(tmp_path, *batch), reports_with({r: {"memory_gb": 39.4} for r in range(6)}))
    assert estimated["memory_gb"]["total"] > 39.4
    assert {remark.ranks for remark in remarks if "a run needs about" in remark.text} == {(r,) for r in range(6)}
    assert all("lower train.micro_batch_size" in remark.text and not remark.warning for remark in remarks[:6])


def test_a_model_that_fits_has_estimates_and_room_for_checkpoints_is_asked_for(tmp_path):
    known = {rank: {"memory_gb": 140.0, "disk_free_gb": 5.0} for rank in range(6)}
    small = ("--train.global_batch_size", "96", "--train.micro_batch_size", "16")
    estimated, remarks = forecast(context(tmp_path, *small), reports_with(known))
    assert 10 < estimated["checkpoint_gb"] < 11  # 673.6 M parameters, four vectors of fp32
    assert 0 < estimated["step_s"]["total"] < 1 and estimated["memory_gb"]["total"] < 140
    (remark,) = remarks
    assert "a checkpoint needs 10 GiB, but 5 GiB are free; make room" in remark.text and not remark.warning


def test_data_that_cannot_keep_up_are_a_warning(tmp_path):
    known = {rank: {"memory_gb": 140.0, "clips_per_s": 20.0} for rank in range(6)}
    small = ("--train.global_batch_size", "96", "--train.micro_batch_size", "16")
    _, remarks = forecast(context(tmp_path, *small), reports_with(known))
    assert [r.warning for r in remarks if r.text.startswith("a rank reads 20 clips/s, but steps would use")] == [True]


def test_text_counts_as_far_as_its_length_is_known(tmp_path):
    small = ("--train.global_batch_size", "96", "--train.micro_batch_size", "16", "--model.context_dim", "24")
    of_text = context(tmp_path, *small)
    without, _ = forecast(of_text, reports_with({}))
    assert without["notes"] == ["text is not counted, as its length is the data's: give --data.shards"]
    assert "  (text is not counted, as its length is the data's: give --data.shards)" in lines_of(
        assemble(reports_with({}), CHECKS, HOSTS, [], without)
    )
    of_text.job = SimpleNamespace(
        latent_space=SimpleNamespace(text_tokens=77), build_objective=lambda: torch.nn.Linear(2, 2)
    )
    known, _ = forecast(of_text, reports_with({}))
    assert "notes" not in known
    assert known["memory_gb"]["activations"] > 1.1 * without["memory_gb"]["activations"]
    assert known["step_s"]["compute"] > 1.1 * without["step_s"]["compute"]


def test_the_time_of_a_step_is_that_of_its_ds_config_and_not_of_a_cpu(tmp_path):
    rate = {0: {"collectives": [{"scope": AMONG, "op": "all_reduce", "bytes": 2**28, "bus_gb_per_s": 100.0}]}}
    small = ("--train.global_batch_size", "192", "--train.micro_batch_size", "16")
    steps = []
    for stage in (2, 1, 0):
        of_stage = context(tmp_path, *small)
        of_stage.ds_settings = {"zero_optimization": {"stage": stage}}
        of_stage.device = SimpleNamespace(type="cpu")
        estimated, _ = forecast(of_stage, reports_with(rate))
        steps.append(estimated["step_s"])
        assert len(estimated["notes"]) == 1 and estimated["notes"][0].startswith("on CPUs a step takes far longer")
    assert steps[0]["reduction"] == pytest.approx(2 * steps[1]["reduction"])
    assert steps[1]["gather"] > 0 == steps[2]["gather"]
