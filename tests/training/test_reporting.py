"""What a report says of all ranks and nodes."""

import logging
import threading

import pytest
import torch
import torch.distributed as dist
from training_helpers import join_world

from ardiff.config import load
from ardiff.monitor import nodes
from ardiff.monitor.gpu import GpuState
from ardiff.monitor.nodes import GpuSummary, NodeSummary
from ardiff.training import reporting
from ardiff.training.distributed import World
from ardiff.training.job import Feed
from ardiff.training.reporting import Reporter

FEED = Feed(data=None, collate=None, flops_per_clip=1e9, tokens_per_clip=64)


class FourRanks(World):
    """Rank 0 of two nodes of two ranks; the others answer what a test gives them."""

    others = ()

    def gather(self, value):
        return [value, *self.others]


def world(**changes):
    return FourRanks(**{"rank": 0, "size": 4, "local_rank": 0, "local_size": 2, "device": torch.device("cpu"),
                        "control": None, **changes})  # fmt: skip


def rank(forward, node=None, host="n2"):
    return {"forward_ms": forward, "data_wait_ms": 1.0, "data_wait_frac": 0.1, "host_rss_gb": 2.0}, host, node


def test_figures_of_every_rank_and_node():
    four = world()
    gpu = GpuSummary("A800", figures={"power_w": 300.0})
    four.others = [rank(20.0, host="n1"), rank(30.0, NodeSummary({"cpu": 9.0}, [gpu, gpu])), rank(44.44444)]
    reporter = Reporter(four, load("tiny"))
    reporter.clock.step()
    figures, details = reporter.report(FEED, 7)
    assert figures["slowest_rank"] == 3
    assert figures["data_wait_frac"] == 0.1
    assert figures["nodes"] == {"n2": {"cpu": 9.0, "gpu": {"power_w": [300.0, 300.0, 300.0]}}}
    assert details.ranks["step"] == 7
    assert details.ranks["forward_ms"] == [0.0, 20.0, 30.0, 44.44]
    assert details.ranks["data_wait_ms"][1:] == [1.0, 1.0, 1.0]
    assert "peak_memory_gb" not in details.ranks  # no GPU
    assert details.ranks["gpus"] == {"n2": {"power_w": [300.0, 300.0]}}
    assert details.charts["host/cpu/n2"] == 9.0 and details.charts["gpu/power_w/n2.1"] == 300.0


def test_a_node_in_trouble_is_named_in_the_log(caplog, monkeypatch):
    four = world()
    four.others = [rank(1.0, NodeSummary({}, [GpuSummary("A800", "GPU-x", lost="GPU is lost")]))]
    monkeypatch.setattr(logging.getLogger("ardiff"), "propagate", True)
    Reporter(four, load("tiny")).report(FEED, 7)
    assert "NODE at step 7: n2, GPU 0 (GPU-x): LOST: GPU is lost" in caplog.text


@pytest.mark.parametrize(("local_rank", "samples"), [(0, True), (1, False)])
def test_one_rank_of_a_node_samples_while_training(local_rank, samples, monkeypatch):
    monkeypatch.setattr(nodes, "FIRST", 0.0)
    reporter = Reporter(world(local_rank=local_rank), load("tiny"))

    def running():
        return "node statistics" in {thread.name for thread in threading.enumerate()}

    with reporter.sampling():
        assert running() == samples
    assert not running()
    with pytest.raises(KeyError), reporter.sampling():
        raise KeyError
    assert not running()


def test_gpus_are_read_where_there_are_some(monkeypatch, caplog):
    class Nvml:
        count = 8

        def read(self, index):
            return GpuState(name="A800", power_w=100.0 * index)

        def close(self):
            pass

    monkeypatch.setattr(reporting, "open_nvml", Nvml)
    reporter = Reporter(world(device=torch.device("cuda")), load("tiny"))
    with reporter.sampling():
        reporter._sampler._sample()
        found = reporter._sampler.report()
    assert [gpu.figures["power_w"] for gpu in found.gpus] == [0.0, 100.0]  # as many as ranks
    monkeypatch.setattr(reporting, "open_nvml", lambda: None)
    monkeypatch.setattr(reporting, "why_not", lambda: "no driver")
    monkeypatch.setattr(logging.getLogger("ardiff"), "propagate", True)
    with caplog.at_level(logging.INFO, "ardiff"), Reporter(world(device=torch.device("cuda")), load("tiny")).sampling():
        assert "no driver" in caplog.text


def test_a_report_of_a_real_world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        reporter = Reporter(join_world(), load("tiny"))
        with reporter.sampling():
            reporter._sampler._sample()
            figures, details = reporter.report(FEED, 1)
    finally:
        dist.destroy_process_group()
    (node,) = figures["nodes"].values()
    assert node["open_files"] > 0 and "gpu" not in node
    assert len(details.ranks["host_rss_gb"]) == 1
    assert "slowest_rank" not in figures  # it is alone
