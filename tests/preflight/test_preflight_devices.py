"""What NVML says of a GPU -> the line about it."""

from dataclasses import replace

import pytest

from ardiff.monitor.gpu import GpuState
from ardiff.preflight.devices import judge

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
        ({"nvlinks_active": 16}, "GPU 1: 16 of 18 NVLinks are active; reseat or replace it", True),
        ({"nvlinks_active": 0}, "GPU 1: 0 of 18 NVLinks are active", True),
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
