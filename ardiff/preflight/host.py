"""What a host gives its processes: shared memory, open files, memory, cores, a name that others can reach."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from ardiff.launching.hostcheck import is_loopback, resolve
from ardiff.monitor.memory import host_memory
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import all_of_host, slower_than_most

GIB = 2**30
SHM = Path("/dev/shm")
SHM_GB_PER_RANK = 0.5  # NCCL's and DeepSpeed's buffers; containers often have 64 MiB in all
MANY = 128  # ranks
OPEN_FILES = 4096  # sockets to every other rank, and shards (at most 256)
FEWER = 0.8  # of the median's cores or memory
MEMORY_GB_PER_RANK = 2.0  # an idle rank has 1 GiB of libraries and buffers


def check_host(context: Context) -> Finding:
    """/dev/shm, the limit of open files, memory and cores for the ranks of this host."""
    ranks = len(context.nodes[context.host])
    found = Finding()
    _shared_memory(ranks, found)
    _open_files(context.size, found)
    memory = host_memory()
    if memory is not None:
        found.figures |= {"host_memory_gb": memory.total_gb, "host_available_gb": memory.available_gb}
        if memory.available_gb < MEMORY_GB_PER_RANK * ranks:
            found.warnings.append(
                f"{memory.available_gb:.1f} GiB of memory are available for {ranks} rank(s); {MEMORY_GB_PER_RANK:g} "
                "GiB each are the least: end other programs or raise the container's limit"
            )
    cores = len(os.sched_getaffinity(0))
    found.figures["cores"] = cores
    if cores < ranks:
        text = f"{cores} core(s) for {ranks} ranks; start fewer, or give the job more cores (affinity, cgroup)"
        (found.failures if context.device.type == "cuda" else found.warnings).append(text)
    if len(context.nodes) > 1:
        _address(found)
    return found


def _shared_memory(ranks: int, found: Finding) -> None:
    try:
        usage = shutil.disk_usage(SHM)
    except OSError as error:
        found.failures.append(f"{SHM}: {error.strerror}; mount a tmpfs there")
        return
    found.figures |= {"shm_gb": usage.total / GIB, "shm_free_gb": usage.free / GIB}
    if usage.free / GIB < SHM_GB_PER_RANK * ranks:
        found.warnings.append(
            f"{SHM}: {usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB are free, {SHM_GB_PER_RANK * ranks:g} are "
            f"advisable for {ranks} rank(s); remove what earlier jobs left there, or give the container more"
        )


def _open_files(size: int, found: Finding) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found.figures["open_files"] = limit
    if limit == resource.RLIM_INFINITY:
        return
    needed = max(1024, 4 * size)
    if limit < needed:
        found.failures.append(
            f"{limit} open files are allowed, {needed} are needed; ulimit -n {max(needed, OPEN_FILES)}"
        )
    elif limit < OPEN_FILES and size > MANY:
        found.warnings.append(f"{limit} open files are allowed; for so many ranks, ulimit -n {OPEN_FILES}")


def _address(found: Finding) -> None:
    """What the others will find this host under: gloo listens where its own name leads."""
    name = socket.gethostname()
    addresses = resolve(name)
    found.figures["address"] = next(iter(addresses), None)
    if not addresses:
        found.warnings.append(f"{name} cannot be resolved here; add it to /etc/hosts or DNS")
    elif is_loopback(addresses[0]) and not os.environ.get("GLOO_SOCKET_IFNAME"):
        found.failures.append(
            f"{name} resolves to {addresses[0]} here, where other hosts cannot reach it: correct /etc/hosts, or set "
            "GLOO_SOCKET_IFNAME to the interface of the cluster's network"
        )


def compare_hosts(reports: Sequence[Report]) -> list[Remark]:
    """Hosts with far less memory or fewer cores than most."""
    remarks: list[Remark] = []
    for figure, what in (("cores", "cores"), ("host_memory_gb", "GiB of memory")):
        values = {report.rank: report.figure(figure) for report in reports}
        known = {rank: value for rank, value in values.items() if value is not None}
        middle, _, less = slower_than_most(known, 0.0, FEWER)
        for rank in less:
            text = f"{known[rank]:.0f} {what}, most hosts have {middle:.0f}; is it of another kind, or shared?"
            remarks.append(Remark(text, all_of_host(reports, rank), warning=True))
    return remarks
