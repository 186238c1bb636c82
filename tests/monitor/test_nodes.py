"""Samples of a node become the figures of a report, in every form that a report has."""

import json
import threading
import time
from dataclasses import replace

import pytest

from ardiff.monitor.gpu import GpuState
from ardiff.monitor.host import HostState
from ardiff.monitor.nodes import (
    LINES,
    SILENT,
    GpuSummary,
    NodeSampler,
    NodeSummary,
    by_name,
    charts,
    compact,
    every_gpu,
    extremes,
)

GPU = GpuState(
    name="A800",
    uuid="GPU-a",
    utilization=90.0,
    power_w=300.0,
    temperature_c=60.0,
    sm_clock_mhz=1400.0,
    ecc_uncorrected=0,
    throttle=(),
    nvlinks_active=8,
    nvlink_rx_gb=10.0,
)


class Node:
    """Stands for the host and the GPUs that a sampler reads; a sample is taken when a test says so."""

    def __init__(self, *gpus):
        self.gpus, self.host, self.seconds, self.closed = list(gpus), HostState(cpu=50.0, available_gb=8.0), 0.0, False
        self.sampler = NodeSampler(self, 8, self, now=lambda: self.seconds)  # it is both its GPUs and its host

    @property
    def count(self):
        return len(self.gpus)

    def read(self, index=None):
        return self.host if index is None else self.gpus[index]

    def sample(self, seconds=5.0):
        self.seconds += seconds
        self.sampler._sample()

    def close(self):
        self.closed = True


def test_a_report_sums_up_the_samples_since_the_last():
    node = Node(GPU)
    assert node.sampler.report() is None
    node.sample()
    node.sampler.report()
    node.gpus[0] = replace(GPU, power_w=200.0, temperature_c=70.0, throttle=("power cap",), nvlink_rx_gb=20.0)
    node.host = HostState(cpu=100.0, available_gb=4.0)
    node.sample()
    node.gpus[0] = replace(GPU, nvlinks_active=7, nvlink_rx_gb=40.0, ecc_uncorrected=2)
    node.host = HostState(cpu=0.0, available_gb=6.0, net_rx_mb_s=10.0)
    node.sample()
    assert node.sampler.report() == NodeSummary(
        {"cpu": 50.0, "available_gb": 4.0, "net_rx_mb_s": 10.0},
        [
            GpuSummary(
                "A800",
                "GPU-a",
                throttled={"power cap": 0.5},
                nvlinks_active=7,
                figures={
                    "utilization": 90.0,
                    "power_w": 250.0,
                    "sm_clock_mhz": 1400.0,
                    "temperature_c": 70.0,
                    "ecc_uncorrected": 2,
                    "nvlink_rx_gb_s": 3.0,  # 30 GiB in 10 seconds
                    "throttled": 50.0,
                },
            )
        ],
    )


def test_without_a_new_sample_the_last_one_counts_but_not_for_ever():
    node = Node(GPU)
    node.sample()
    first = node.sampler.report()
    node.seconds += SILENT - 1
    assert node.sampler.report() == first
    node.seconds += 2
    assert node.sampler.report() == NodeSummary({}, [], SILENT + 1)


def test_a_lost_gpu_keeps_its_name():
    node = Node(GPU)
    node.sample()
    node.gpus[0] = GpuState(lost="GPU is lost")
    node.sample()
    found = node.sampler.report().gpus[0]
    assert (found.lost, found.uuid, found.figures) == ("GPU is lost", "GPU-a", {})


def test_the_thread_survives_failures_and_ends(caplog):
    node, calls = Node(GPU), []
    sampler = NodeSampler(node, 8, node, period=0.02)

    def read(index=None):
        calls.append(index)
        if 1 < len(calls) < 5:  # the first reading is the one that rates count from
            raise OSError("no such file")
        return HostState(cpu=1.0) if index is None else GPU

    node.read = read
    sampler.start()
    until = time.monotonic() + 10
    while (found := sampler.report()) is None and time.monotonic() < until:
        time.sleep(0.01)
    assert found.host == {"cpu": 1.0}
    assert [record.getMessage() for record in caplog.records] == ["no statistics of this node: OSError: no such file"]
    sampler.close()
    assert node.closed
    assert "node statistics" not in {thread.name for thread in threading.enumerate()}


def test_a_driver_that_hangs_holds_nobody():
    node, hangs = Node(GPU), threading.Event()
    sampler = NodeSampler(node, 8, node, period=0.01)
    sampler.start()
    node.read = lambda index=None: hangs.wait(30)
    time.sleep(0.05)
    begin = time.perf_counter()
    sampler.report()
    assert time.perf_counter() - begin < 0.5
    sampler.close()  # waits for a second
    assert time.perf_counter() - begin < 5 and not node.closed
    hangs.set()


def test_only_as_many_gpus_as_the_node_has_ranks():
    node = Node(GPU, GPU, GPU)
    sampler = NodeSampler(node, 2, node)
    sampler._sample()
    assert len(sampler.report().gpus) == 2


def cluster(num_nodes, gpus_per_node):
    """Node i has i % processors busy; GPU j of it draws 300 + i + j / 10 W."""
    return {
        f"node{i:02d}": NodeSummary(
            {"cpu": float(i), "load": 2 / 3},
            [GpuSummary("A800", figures={"power_w": 300.0 + i + j / 10}) for j in range(gpus_per_node)],
        )
        for i in range(num_nodes)
    }


def test_nodes_of_one_name_are_numbered():
    node = NodeSummary({}, [])
    found = by_name([("a", node), ("a", None), ("b", node), ("a", node), ("a", node)])
    assert list(found) == ["a", "b", "a#2", "a#3"]


def test_compact_for_metrics_and_every_gpu_for_the_ranks():
    nodes = cluster(2, 3)
    assert compact(nodes)["node01"] == {"cpu": 1.0, "load": 0.6667, "gpu": {"power_w": [301.0, 301.1, 301.2]}}
    assert every_gpu(nodes)["node00"] == {"power_w": [300.0, 300.1, 300.2]}
    assert "gpu" not in compact(cluster(1, 0))["node00"]
    nodes["node01"].gpus[1].figures.clear()  # lost
    assert every_gpu(nodes)["node01"] == {"power_w": [301.0, None, 301.2]}
    assert len(json.dumps(compact(cluster(64, 8)))) < 64 * 100


def test_a_small_run_has_a_line_for_each():
    assert charts(cluster(2, 2)) == {
        "gpu/power_w/node00.0": 300.0,
        "gpu/power_w/node00.1": 300.1,
        "gpu/power_w/node01.0": 301.0,
        "gpu/power_w/node01.1": 301.1,
        "host/cpu/node00": 0.0,
        "host/cpu/node01": 1.0,
        "host/load/node00": 2 / 3,
        "host/load/node01": 2 / 3,
    }
    assert extremes(cluster(2, 2)) is None


def test_a_large_run_has_three_and_names_the_extremes():
    nodes = cluster(64, 8)
    drawn = charts(nodes)
    assert drawn["gpu/power_w/min"] == 300.0 and drawn["gpu/power_w/max"] == 363.7
    assert drawn["gpu/power_w/mean"] == pytest.approx(331.85)
    assert {tag for tag in drawn if "cpu" in tag} == {"host/cpu/min", "host/cpu/mean", "host/cpu/max"}
    assert len(drawn) == 9
    assert "| gpu power_w | node00.0 | 300 | 331.9 | node63.7 | 363.7 |" in extremes(nodes)
    mixed = charts(cluster(LINES, 2))  # as many nodes as lines, but more GPUs
    assert "host/cpu/node07" in mixed and "gpu/power_w/max" in mixed
