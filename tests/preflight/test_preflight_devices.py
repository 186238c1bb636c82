"""What NVML says of a GPU -> the line about it."""

from dataclasses import replace

import pytest

from ardiff.monitor.gpu import GpuState
from ardiff.preflight.checks import Finding, Report
from ardiff.preflight.devices import compare_nvml, judge

HEALTHY = GpuState(
    name="NVIDIA H200",
    memory_used_gb=0.6,
    memory_total_gb=140.0,
    temperature_c=34.0,
    ecc_uncorrected=0,
    retired_pages=0,
    throttle=("power cap",),
    nvlinks_active=18,
    nvlinks_total=18,
)


class FakeNvml:
    count = 2

    def __init__(self, state: GpuState) -> None:
        self.state = state

    def read(self, index: int) -> GpuState:
        assert index < self.count
        return self.state


def test_a_healthy_gpu_and_one_that_tells_nothing_have_no_lines():
    for state in (HEALTHY, GpuState()):
        found = judge(FakeNvml(state), 1)
        assert not found.failures and not found.warnings
    assert judge(FakeNvml(HEALTHY), 0).figures["gpu"]["nvlinks_active"] == 18


@pytest.mark.parametrize(
    ("change", "line", "fails"),
    [
        ({"ecc_uncorrected": 2}, "GPU 1: 2 uncorrected ECC errors; drain the host", True),
        ({"retired_pages": 3}, "GPU 1: 3 retired pages or remapped rows; replace it when", False),
        ({"throttle": ("hardware thermal slowdown", "power cap")}, "GPU 1 is throttled (hardware thermal slowd", True),
        ({"temperature_c": 91.0}, "GPU 1 is at 91 C before any work; see to its cooling", False),
        ({"remap_failed": True}, "GPU 1: a broken row of its memory could not be remapped; replace", True),
        ({"repair_pending": True}, "GPU 1: broken memory is replaced at its next reset; drain", False),
        ({"memory_used_gb": 20.0}, "GPU 1: 20.0 GiB are in use by other processes; end them", True),
        ({"lost": "GPU is lost"}, "GPU 1 is lost (GPU is lost); drain the host", True),
    ],
)
def test_a_fault_of_a_gpu_has_its_line(change, line, fails):
    found = judge(FakeNvml(replace(HEALTHY, **change)), 1)
    told, silent = (found.failures, found.warnings) if fails else (found.warnings, found.failures)
    assert len(told) == 1 and told[0].startswith(line), found
    assert silent == []


def test_a_gpu_that_nvml_does_not_show_is_lost():
    assert judge(FakeNvml(HEALTHY), 2).failures == [
        "NVML shows 2 GPU(s), none with number 2: a GPU is lost; restart the host"
    ]


def links_of(*active, name="NVIDIA H200", total=18):
    """What `compare_nvml` says of ranks whose GPUs have so many links up: the ranks, and whether it is a failure."""
    gpus = [judge(FakeNvml(replace(HEALTHY, name=name, nvlinks_active=up, nvlinks_total=total)), 0) for up in active]
    assert not any(found.failures or found.warnings for found in gpus)
    remarks = compare_nvml([Report(rank, rank, "node1", {"gpu": found}) for rank, found in enumerate(gpus)])
    return [(remark.ranks, remark.warning, remark.text) for remark in remarks]


def test_nvlinks_are_compared_with_those_of_the_same_kind():
    assert links_of(18, 18, 18) == links_of(None, None) == []
    ((ranks, warning, text),) = links_of(18, 16, 18)
    assert (ranks, warning) == ((1,), False)
    assert text.startswith("16 NVLinks are up, 18 on other GPUs of its kind; reseat or replace it")
    assert links_of(0, 18)[0][:2] == ((0,), False)
    ((ranks, warning, text),) = links_of(0, 0, name="NVIDIA A100-PCIE-40GB", total=12)  # no bridges: nothing is wrong
    assert (ranks, warning) == ((0, 1), True) and text.startswith("0 of 12 NVLinks are up; if the others are wired")


def test_gpus_of_other_kinds_are_not_compared():
    kinds = [
        replace(HEALTHY, nvlinks_active=18),
        replace(HEALTHY, name="NVIDIA A800", nvlinks_active=8, nvlinks_total=8),
    ]
    reports = [Report(rank, rank, "node1", {"gpu": judge(FakeNvml(state), 0)}) for rank, state in enumerate(kinds)]
    assert compare_nvml(reports) == []
    assert compare_nvml([Report(0, 0, "node1", {"gpu": Finding()})]) == []
