"""Which rows of torch's profiler are kernels: none counts twice."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from ardiff.profiling.kernels import own_microseconds


def row(key, device_type, on_cpu, on_device, annotation=False):
    return SimpleNamespace(
        key=key,
        device_type=device_type,
        self_cpu_time_total=on_cpu,
        self_device_time_total=on_device,
        is_user_annotation=annotation,
    )


ROWS = [  # as torch gives them: operators carry the time of the kernels they start
    row("aten::mm", DeviceType.CPU, 30.0, 400.0),
    row("sm80_xmma_gemm", DeviceType.CUDA, 0.0, 400.0),
    row("aten::add", DeviceType.CPU, 20.0, 100.0),
    row("elementwise_kernel", DeviceType.CUDA, 0.0, 100.0),
    row("part: forward", DeviceType.CPU, 5.0, 500.0),
    row("part: forward", DeviceType.CUDA, 0.0, 500.0, annotation=True),
    row("ProfilerStep#1", DeviceType.CPU, 7.0, 0.0),
    row("cudaLaunchKernel", DeviceType.CPU, 9.0, 0.0),
]


@pytest.mark.parametrize(
    ("on_gpu", "expected"),
    [
        (True, {"sm80_xmma_gemm": 400.0, "elementwise_kernel": 100.0}),
        (False, {"aten::mm": 30.0, "aten::add": 20.0, "cudaLaunchKernel": 9.0}),
    ],
)
def test_every_kernel_counts_once(on_gpu, expected):
    assert {one.key: own for one in ROWS if (own := own_microseconds(one, on_gpu)) > 0} == expected
