"""The GPUs: their number and model, whose they are, and what NVML says of their health."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict

import torch

from ardiff.errors import UserError
from ardiff.monitor.gpu import GpuState, Nvml, open_nvml, why_not
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import slower_than_most, unlike_most

OTHERS_GB = 1.5  # GiB in use before we begin; the driver itself keeps some hundred MiB
HOT_C = 85.0  # GPUs of these kinds slow down from about 87 to 95 degrees
# The power cap is usual under full load, and is not to be seen on a GPU that rests.
HARMFUL = ("hardware slowdown", "hardware thermal slowdown", "software thermal slowdown", "power brake")
POWER = 0.95  # of the median power limit


def check_devices(context: Context) -> Finding:
    """How many devices this host has, and which is this rank's."""
    if not torch.cuda.is_available():
        return Finding({"devices": 0, "device": f"cpu ({platform.machine()})"})
    count = torch.cuda.device_count()
    if context.local_rank >= count:
        raise UserError(f"local rank {context.local_rank}, but there are {count} GPUs here: start fewer ranks")
    own = torch.cuda.get_device_properties(context.local_rank)
    return Finding(
        {
            "devices": count,
            "device": own.name,
            "uuid": str(getattr(own, "uuid", "")) or None,  # older versions of torch do not tell
            "memory_gb": own.total_memory / 2**30,
        }
    )


def compare_devices(reports: Sequence[Report]) -> list[Remark]:
    """Other numbers or models of devices than elsewhere, devices without a rank, and devices with two."""
    remarks = unlike_most(reports, "devices", "the number of devices", "look for a lost GPU (nvidia-smi, dmesg)")
    remarks += unlike_most(reports, "device", "the device", "train on hosts of one kind")
    owners: dict[tuple[str, str], list[int]] = {}
    of_host: dict[str, list[Report]] = {}
    for report in reports:
        of_host.setdefault(report.host, []).append(report)
        if report.figure("uuid"):
            owners.setdefault((report.host, report.figure("uuid")), []).append(report.rank)
    for (_, uuid), ranks in owners.items():
        if len(ranks) > 1:
            text = f"these ranks share one GPU ({uuid}); start one rank for every GPU (CUDA_VISIBLE_DEVICES)"
            remarks.append(Remark(text, tuple(ranks)))
    for here in of_host.values():
        devices = here[0].figure("devices") or 0
        if devices > len(here):
            text = f"{devices} GPUs, but {len(here)} rank(s); start one for every GPU"
            remarks.append(Remark(text, tuple(report.rank for report in here), warning=True))
    return remarks


def check_nvml(context: Context) -> Finding:
    """ECC errors, retired pages, throttling, links, temperature and foreign memory of this rank's GPU."""
    if context.device.type != "cuda":
        return Finding(not_checked="no GPU")
    nvml = open_nvml()
    if nvml is None:
        return Finding(not_checked=why_not())
    context.clean_up.callback(nvml.close)
    return judge(nvml, context.local_rank)


def judge(nvml: Nvml, index: int) -> Finding:
    """What is wrong with a GPU at rest."""
    if index >= nvml.count:
        return Finding(
            failures=[f"NVML shows {nvml.count} GPU(s), none with number {index}: a GPU is lost; restart the host"]
        )
    state = nvml.read(index)
    found = Finding({"gpu": {name: value for name, value in asdict(state).items() if value is not None}})
    if state.lost is not None:
        found.failures.append(f"GPU {index} is lost ({state.lost}); drain the host and reset or replace the GPU")
        return found
    if state.ecc_uncorrected:
        found.failures.append(
            f"GPU {index}: {state.ecc_uncorrected} uncorrected ECC errors; drain the host, reset the GPU, and replace "
            "it if they come back"
        )
    if state.retired_pages:
        text = f"GPU {index}: {state.retired_pages} retired pages or remapped rows; replace it when they become more"
        found.warnings.append(text)
    if state.remap_failed:
        found.failures.append(f"GPU {index}: a broken row of its memory could not be remapped; replace the GPU")
    if state.repair_pending:
        found.warnings.append(f"GPU {index}: broken memory is replaced at its next reset; drain the host and reset it")
    _judge_throttling(state, index, found)
    if state.memory_used_gb is not None and state.memory_used_gb > OTHERS_GB:
        found.failures.append(
            f"GPU {index}: {state.memory_used_gb:.1f} GiB are in use by other processes; end them (see nvidia-smi)"
        )
    return found


def _judge_throttling(state: GpuState, index: int, found: Finding) -> None:
    reasons = [reason for reason in state.throttle or () if reason in HARMFUL]
    if reasons:
        found.failures.append(f"GPU {index} is throttled ({', '.join(reasons)}); see to its cooling and power supply")
    if state.temperature_c is not None and state.temperature_c > HOT_C:
        found.warnings.append(f"GPU {index} is at {state.temperature_c:.0f} C before any work; see to its cooling")


def compare_nvml(reports: Sequence[Report]) -> list[Remark]:
    """Power limits below those of most, and GPUs with fewer NVLinks up than others of their kind."""
    limits = {report.rank: (report.figure("gpu") or {}).get("power_limit_w") for report in reports}
    known = {rank: float(limit) for rank, limit in limits.items() if limit}
    middle, far, near = slower_than_most(known, 0.0, POWER)
    remarks = [
        Remark(f"power limit {known[rank]:.0f} W, elsewhere {middle:.0f} W; raise it (nvidia-smi -pl)", (rank,))
        for rank in [*far, *near]
    ]
    return remarks + _compare_nvlinks(reports)


def _compare_nvlinks(reports: Sequence[Report]) -> list[Remark]:
    """How many links a GPU should have up is what the best of its kind has: those of PCIe cards lead to nothing where
    there are no bridges, so that links which are down everywhere are worth a warning only.
    """
    kinds: dict[str, dict[int, int]] = {}
    total: dict[str, int] = {}
    for report in reports:
        gpu = report.figure("gpu") or {}
        if gpu.get("nvlinks_active") is not None:
            name = str(gpu.get("name"))
            kinds.setdefault(name, {})[report.rank] = gpu["nvlinks_active"]
            total[name] = max(total.get(name, 0), gpu.get("nvlinks_total") or 0)
    remarks = []
    for name, links in kinds.items():
        most = max(links.values())
        remarks += [
            Remark(
                f"{links[rank]} NVLinks are up, {most} on other GPUs of its kind; reseat or replace it (nvidia-smi "
                "nvlink -s, fabric manager)",
                (rank,),
            )
            for rank in links
            if links[rank] < most
        ]
        if most < total[name]:
            text = f"{most} of {total[name]} NVLinks are up; if the others are wired, look at the fabric manager"
            remarks.append(Remark(text, tuple(links), warning=True))
    return remarks


def local_device(local_rank: int) -> torch.device:
    """The device that this rank will train on."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", min(local_rank, torch.cuda.device_count() - 1))
