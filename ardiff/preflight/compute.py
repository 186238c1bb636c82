"""A plain matrix product for seconds on all ranks at once: is every device as fast as the others, and right?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ardiff.monitor.throughput import peak_flops
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import slower_than_most, unlike_most

SIDE = {"cuda": 8192, "cpu": 1024}
SECONDS = {"cuda": 10.0, "cpu": 3.0}  # warm, a GPU shows in ten seconds whether it is cooled and fed
QUICK_SECONDS = {"cuda": 2.0, "cpu": 0.5}
FAR = {"cuda": 0.8, "cpu": 0.2}  # of the median rate: all ranks wait for the slowest
NEAR = {"cuda": 0.93, "cpu": 0.5}
OF_PEAK = 0.6  # a healthy H200 reaches 0.8 of its data sheet
AT_ONCE = {"cuda": 10, "cpu": 1}  # products between looks at the clock


def check_matmul(context: Context) -> Finding:
    """TFLOP/s of matrix products: bf16 on GPUs, fp32 on CPUs with the threads that training would use."""
    kind = context.device.type
    ranks_here = len(context.nodes[context.host])
    wanted = context.config.train.num_threads if context.config is not None else 0
    torch.set_num_threads(wanted or max(1, len(os.sched_getaffinity(0)) // ranks_here))
    context.meeting.gate("matmul", sum(map(len, context.nodes.values())), context.limit / 3)
    rate, same, digest = matmul_rate(context.device, SIDE[kind], (QUICK_SECONDS if context.quick else SECONDS)[kind])
    found = Finding({"matmul_tflops": rate / 1e12, "matmul_digest": digest})
    if kind == "cuda":
        found.figures["matmul_model"] = torch.cuda.get_device_name(context.device)
    if not same:
        found.failures.append("the same matrix product gave different results; drain the host and replace the device")
    peak = peak_flops(context.device)
    if peak is not None:
        found.figures["matmul_of_peak"] = rate / peak
        if rate < OF_PEAK * peak:
            found.warnings.append(
                f"matrix products run at {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of the data sheet's "
                f"{peak / 1e12:.0f}; look at clocks, power limit and cooling (nvidia-smi -q -d PERFORMANCE)"
            )
    return found


def matmul_rate(device: torch.device, side: int, seconds: float) -> tuple[float, bool, str]:
    """FLOP/s of square products [side, side]; whether all were equal (on GPUs every bit); a digest of one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    first, out = a @ b, torch.empty(side, side, device=device, dtype=dtype)
    torch.mm(a, b, out=out)  # warm
    equal = torch.equal if device.type == "cuda" else torch.allclose  # CPU libraries may share the work out otherwise
    same = bool(equal(out, first))
    _synchronize(device)
    done, begin, products = 0, time.perf_counter(), AT_ONCE[device.type]
    while time.perf_counter() - begin < seconds or not done:
        for _ in range(products):
            torch.mm(a, b, out=out)
        _synchronize(device)
        done += products
    passed = time.perf_counter() - begin
    same = same and bool(equal(out, first))
    return 2 * side**3 * done / passed, same, _digest(first)


def _digest(result: Tensor) -> str:
    """A number that any other bit would change: the sum of the bits read as whole numbers, by place."""
    bits = result.view(torch.int16 if result.dtype == torch.bfloat16 else torch.int32).long().flatten()
    place = torch.arange(len(bits), device=bits.device) % 65521 + 1
    return f"{int((bits * place).sum()) & (2**64 - 1):016x}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_matmul(reports: Sequence[Report]) -> list[Remark]:
    """Ranks that compute far more slowly than most; GPUs of one model that compute something else."""
    rates = {report.rank: report.figure("matmul_tflops") for report in reports}
    known = {rank: rate for rank, rate in rates.items() if rate is not None}
    kind = "cuda" if any(report.figure("devices") for report in reports) else "cpu"
    middle, far, near = slower_than_most(known, FAR[kind], NEAR[kind])
    remarks = []
    for rank in [*far, *near]:
        text = (
            f"matrix products run at {known[rank]:.3g} TFLOP/s, on most ranks at {middle:.3g}: all would wait for it; "
            "look for other programs, throttling and clocks, or leave the host out"
        )
        remarks.append(Remark(text, (rank,), warning=rank in near, outlier=rank in far))
    if kind == "cuda":  # on CPUs libraries take another way on other models, with other rounding
        of_model: dict[str, list[Report]] = {}
        for report in reports:
            of_model.setdefault(str(report.figure("matmul_model")), []).append(report)
        for group in of_model.values():
            remedy = "where versions are equal, the device may compute wrongly: test it (dcgmi diag -r 3)"
            what = "the result of a matrix product (digest)"
            remarks += unlike_most(group, "matmul_digest", what, remedy, warning=True)
    return remarks
