"""What is said of nodes and GPUs that are not as they should be, and that nothing is said of others."""

from dataclasses import replace

import pytest

from ardiff.monitor.lasting import Lasting
from ardiff.monitor.node_watch import MOST_LINES, NodeWatch
from ardiff.monitor.nodes import GpuSummary, NodeSummary

FIGURES = {
    "utilization": 98.0,
    "sm_clock_mhz": 1400.0,
    "temperature_c": 65.0,
    "power_w": 390.0,
    "ecc_uncorrected": 0.0,
    "throttled": 0.0,
}


def gpu(uuid="GPU-a", name="A800", throttled=None, links=8, lost=None, **figures):
    return GpuSummary(name, uuid, lost, throttled or {}, links, FIGURES | figures)


class Watch:
    """Two nodes of two GPUs, a report every half minute."""

    def __init__(self):
        self.seconds = 0.0
        self.watch = NodeWatch(lambda: self.seconds)
        self.nodes = {name: NodeSummary({"cpu": 5.0}, [gpu("GPU-a"), gpu("GPU-b")]) for name in ("n1", "n2")}

    def see(self, **changed):
        """A report in which GPU 1 of node n2 is as given."""
        self.seconds += 30
        self.nodes["n2"].gpus[1] = gpu("GPU-b", **changed)
        return self.watch.see(self.nodes)


def test_nothing_is_said_of_healthy_nodes():
    watch = Watch()
    assert [watch.see() for _ in range(30)] == [[]] * 30
    assert NodeWatch().see({}) == []


def test_more_memory_errors_are_told_at_once():
    watch = Watch()
    assert watch.see(ecc_uncorrected=3.0) == []  # from before the run: preflight's to say
    assert watch.see(ecc_uncorrected=3.0) == []
    assert watch.see(ecc_uncorrected=5.0) == [
        "n2, GPU 1 (GPU-b): 2 more uncorrected memory errors (ECC), 5 since the driver was loaded; results of this GPU "
        "may be wrong, replace it"
    ]
    assert watch.see(ecc_uncorrected=5.0) == []


def test_a_lost_gpu_is_told_once():
    watch = Watch()
    watch.see()
    said = [watch.see(lost="GPU is lost", links=None) for _ in range(3)]
    assert said[0][0].startswith("n2, GPU 1 (GPU-b): LOST: GPU is lost; ")
    assert said[1:] == [[], []]


@pytest.mark.parametrize("reason", ["hardware thermal slowdown", "software thermal slowdown", "power brake"])
def test_throttling_is_told_if_it_lasts(reason):
    watch = Watch()
    said = [watch.see(throttled={reason: 0.9, "power cap": 1.0}, temperature_c=91.0) for _ in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 1]
    assert said[2] == [f"n2, GPU 1 (GPU-b): throttled ({reason}) at 91 C, 390 W, 1400 MHz"]
    assert watch.see(throttled={reason: 0.2}) == []  # a moment of it is nothing


def test_a_gpu_at_its_power_limit_is_no_news_unless_it_is_slower_than_the_others():
    watch = Watch()
    assert [watch.see(throttled={"power cap": 1.0}) for _ in range(9)] == [[]] * 9
    said = [watch.see(throttled={"power cap": 1.0}, sm_clock_mhz=1200.0) for _ in range(3)]
    assert said[2] == ["n2, GPU 1 (GPU-b): throttled (power cap) at 65 C, 390 W, 1200 MHz"]


def test_a_clock_far_below_the_others():
    watch = Watch()
    said = [watch.see(sm_clock_mhz=1000.0) for _ in range(3)]
    assert said == [[], [], ["n2, GPU 1 (GPU-b): runs at 1000 MHz, the median of its kind is 1400 MHz"]]
    assert [watch.see(sm_clock_mhz=200.0, utilization=1.0) for _ in range(3)] == [[]] * 3  # it is idle
    assert [watch.see(sm_clock_mhz=1000.0, name="T4") for _ in range(3)] == [[]] * 3  # another kind


def test_of_two_gpus_the_slower_one_is_named():
    watch = NodeWatch(iter(range(0, 1000, 60)).__next__)
    nodes = {"n1": NodeSummary({}, [gpu("GPU-a", sm_clock_mhz=900.0), gpu("GPU-b")])}
    said = [watch.see(nodes) for _ in range(3)]
    assert said[2] == ["n1, GPU 0 (GPU-a): runs at 900 MHz, the median of its kind is 1400 MHz"]


def test_nvlinks_that_go_down_or_were_never_up():
    watch = Watch()
    assert watch.see() == []
    line = "n2, GPU 1 (GPU-b): 2 NVLink(s) down, 6 up; collectives become slower or fail"
    assert [watch.see(links=6) for _ in range(3)] == [[line], [], []]
    assert watch.see(links=5)[0].startswith("n2, GPU 1 (GPU-b): 3 NVLink(s) down")
    assert watch.see() == []
    assert Watch().see(links=6) == [line]  # from the beginning, by what the others have
    assert Watch().see(links=None) == []


def test_a_node_that_falls_silent():
    watch = Watch()
    watch.see()
    watch.nodes["n1"] = NodeSummary({}, [], silent=70.0)
    assert watch.see() == ["n1: no statistics for 70 s; its driver or its kernel does not answer"]
    watch.nodes["n1"] = replace(watch.nodes["n1"], silent=100.0)
    assert watch.see() == []


def test_a_cluster_that_fails_does_not_fill_the_log():
    nodes = {f"n{i}": NodeSummary({}, [gpu(lost="GPU is lost") for _ in range(8)]) for i in range(4)}
    said = NodeWatch().see(nodes)
    assert len(said) == MOST_LINES + 1
    assert said[-1] == "and 24 more warnings about nodes"


def test_lasting_begins_anew_after_a_pause():
    lasting = Lasting(iter(range(0, 10_000, 20)).__next__)
    assert [lasting.see(so) for so in (True, True, True, False, True, True, True)] == [
        *(False, False, False, False),  # 20 s: too short
        *(False, False, False),
    ]
    assert [lasting.see(True) for _ in range(4)] == [True, False, False, False]
