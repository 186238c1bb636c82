"""What connects the ranks: clocks, collectives among all and within hosts, and messages between neighbouring hosts."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ardiff.errors import UserError
from ardiff.monitor.collectives import Measured, measure, measure_link
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import all_of_host, slower_than_most
from ardiff.training import distributed
from ardiff.training.distributed import World

KIB, MIB = 1024, 2**20
SIZES = {"cuda": (KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB), "cpu": (KIB, 64 * KIB, MIB, 16 * MIB)}
QUICK_SIZES = {"cuda": (KIB, MIB, 64 * MIB), "cpu": (KIB, MIB)}
MESSAGE = {"cuda": 64 * MIB, "cpu": 4 * MIB}  # between hosts
SECONDS = 30.0  # for the collectives of a check, about
ROUND_TRIPS = 20
# Of the median bandwidth. Between CPUs it is that of the kernel, which has other things to do as well.
FAR = {"nccl": 0.5, "gloo": 0.05}
NEAR = {"nccl": 0.75, "gloo": 0.2}
WITHIN = "within the host"
AMONG = "among all ranks"
SKEW, GREAT_SKEW = 0.5, 30.0  # seconds between clocks: a warning, a failure


def check_connection(context: Context) -> Finding:
    """Join the process group as training does, and meet once; sets `context.world`."""
    begin = time.perf_counter()
    limit = 2 * context.limit  # ours comes first, and does not end the process
    if not dist.is_initialized():
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", context.meeting.store)
        timeout = datetime.timedelta(seconds=limit)
        dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.size, timeout=timeout)
    threads = context.config.train.num_threads if context.config is not None else 0
    world = distributed.start(threads, limit / 60)
    try:
        world.barrier()
        dist.all_reduce(torch.ones(1, device=world.device))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except RuntimeError as error:
        raise UserError(
            f"cannot connect to the other ranks ({str(error).splitlines()[0]}); look at firewalls, and set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the cluster's network"
        ) from error
    context.world = world
    return Finding({"backend": dist.get_backend(), "connect_s": time.perf_counter() - begin})


def check_clocks(context: Context) -> Finding:
    """By how much every host's clock is ahead of rank 0's host, with a bound on the error: half the quickest of several
    round trips.
    """
    world = _world(context)
    leaders = [ranks[0] for ranks in context.nodes.values()]
    if len(leaders) < 2:
        return Finding(not_checked="one host")
    for leader in leaders[1:]:
        if world.rank == 0:
            _tell_time(world, leader)
        elif world.rank == leader:
            ahead, error = _ask_time(world)
            return Finding({"clock_ahead_s": ahead, "clock_error_s": error})
    return Finding()


def _tell_time(world: World, who: int) -> None:
    box = torch.zeros(1, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        dist.recv(box, who, group=world.control)
        box[0] = time.time_ns()
        dist.send(box, who, group=world.control)


def _ask_time(world: World) -> tuple[float, float]:
    box, best, ahead = torch.zeros(1, dtype=torch.int64), float("inf"), 0.0
    for _ in range(ROUND_TRIPS):
        sent = time.time_ns()
        dist.send(box, 0, group=world.control)
        dist.recv(box, 0, group=world.control)
        received = time.time_ns()
        if received - sent < best:
            best = received - sent
            ahead = (sent + received) / 2 - int(box[0])
    return ahead / 1e9, best / 2e9


def compare_clocks(reports: Sequence[Report]) -> list[Remark]:
    """Clocks that are off."""
    remarks = []
    for report in reports:
        ahead, error = report.figure("clock_ahead_s"), report.figure("clock_error_s")
        if ahead is not None and abs(ahead) - error > SKEW:
            text = (
                f"the clock is {abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's (error at most "
                f"{error:.3f} s); synchronise it (chrony, ntpd)"
            )
            whole = all_of_host(reports, report.rank)
            remarks.append(Remark(text, whole, warning=abs(ahead) - error < GREAT_SKEW))
    return remarks


def check_collectives(context: Context) -> Finding:
    """Collectives over sizes among all ranks, and at the same time within every host where there are several."""
    world, nodes = _world(context), context.nodes
    sizes = (QUICK_SIZES if context.quick else SIZES)[world.device.type]
    if world.size == 1:
        return Finding(not_checked="one rank")
    seconds = min(SECONDS, context.limit / 2) / 6  # three operations, twice
    found = Finding({"collectives": [_named(AMONG, one) for one in measure(world, sizes, seconds=seconds)]})
    if len(nodes) > 1 and any(len(ranks) > 1 for ranks in nodes.values()):
        groups = {host: dist.new_group(ranks) for host, ranks in nodes.items()}  # all ranks make all groups
        if len(nodes[context.host]) > 1:
            within = measure(world, sizes, group=groups[context.host], seconds=seconds)
            found.figures["collectives"] += [_named(WITHIN, one) for one in within]
            found.figures["within_gb_per_s"] = max(one.bus_gb_per_s for one in within)
    return found


def _named(scope: str, measured: Measured) -> dict[str, Any]:
    return {"scope": scope, **measured.as_json()}


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Every host beside the next one of a ring, in rounds in which no host has two partners: two, for an odd number
    three.
    """
    if num_hosts < 2:
        return []
    if num_hosts == 2:
        return [[(0, 1)]]
    ring = [(host, (host + 1) % num_hosts) for host in range(num_hosts)]
    even = num_hosts - num_hosts % 2
    result = [ring[0:even:2], ring[1:even:2]]
    return result if num_hosts % 2 == 0 else [*result, ring[even:]]


def check_links(context: Context) -> Finding:
    """GB/s of messages between neighbouring hosts, there and back, all ranks of a host at a time."""
    world, nodes = _world(context), list(context.nodes.items())
    if len(nodes) < 2:
        return Finding(not_checked="one host")
    links: list[dict[str, Any]] = []
    mine = [host for host, _ in nodes].index(context.host)
    for pairs in rounds(len(nodes)):
        for pair in pairs:
            if mine in pair:
                for source, target in (pair, pair[::-1]):
                    links += _link(context, world, nodes[source], nodes[target])
        world.barrier()
    return Finding({"links": links})


def _link(
    context: Context, world: World, source: tuple[str, list[int]], target: tuple[str, list[int]]
) -> list[dict[str, Any]]:
    for sender, receiver in zip(source[1], target[1], strict=False):
        if world.rank not in (sender, receiver):
            continue
        rate = measure_link(world, sender, receiver, MESSAGE[world.device.type], repeats=3 if context.quick else 7)
        return [{"from": source[0], "to": target[0], "gb_per_s": rate}] if world.rank == sender else []
    return []


def host_links(reports: Sequence[Report]) -> dict[tuple[str, str], float]:
    """(sending host, receiving host) -> GB/s, all of their ranks together."""
    found: dict[tuple[str, str], float] = {}
    for report in reports:
        for link in report.figure("links") or []:
            ends = (link["from"], link["to"])
            found[ends] = found.get(ends, 0.0) + link["gb_per_s"]
    return found


def _thresholds(reports: Sequence[Report]) -> tuple[float, float]:
    backend = next((report.figure("backend") for report in reports if report.figure("backend")), "gloo")
    return FAR.get(backend, FAR["gloo"]), NEAR.get(backend, NEAR["gloo"])


def compare_links(reports: Sequence[Report]) -> list[Remark]:
    """Hosts that send or receive far more slowly than most, with either neighbour."""
    links = host_links(reports)
    hosts = list(dict.fromkeys(host for ends in links for host in ends))
    ranks = {host: tuple(report.rank for report in reports if report.host == host) for host in hosts}
    remedy = "look at its cable, switch port and interface (ethtool, ibstat), and at NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
    if len(hosts) == 2:
        return _compare_two(links, hosts, _thresholds(reports)[0], remedy)
    slow: dict[tuple[str, bool], list[str]] = {}  # host, far below -> what it does slowly
    for verb, end in (("sends", 0), ("receives", 1)):
        # With its better neighbour: a host beside a slow one has another that is not.
        best = {host: max(rate for ends, rate in links.items() if ends[end] == host) for host in hosts}
        middle, far, near = slower_than_most(best, *_thresholds(reports))
        for host in [*far, *near]:
            slow.setdefault((host, host in far), []).append(f"{verb} at {best[host]:.3g} GB/s (most at {middle:.3g})")
    return [
        Remark(f"{' and '.join(what)}; {remedy}", ranks[host], warning=not far, outlier=far)
        for (host, far), what in slow.items()
    ]


def _compare_two(links: dict[tuple[str, str], float], hosts: Sequence[str], far: float, remedy: str) -> list[Remark]:
    one, other = hosts
    there, back = links.get((one, other)), links.get((other, one))
    if there is None or back is None or min(there, back) >= far * max(there, back):
        return []
    slow, ends = min((there, (one, other)), (back, (other, one)))
    text = (
        f"{ends[0]} sends to {ends[1]} at {slow:.3g} GB/s, the other way it is {max(there, back):.3g}: one of the two "
        f"is slow (a third host would tell which); {remedy}"
    )
    return [Remark(text)]


def compare_collectives(reports: Sequence[Report]) -> list[Remark]:
    """Hosts whose ranks communicate far more slowly with one another than those of most hosts."""
    of_host = {report.host: report for report in reports if report.figure("within_gb_per_s") is not None}
    sizes = {host: sum(report.host == host for report in reports) for host in of_host}
    rates = {host: float(of_host[host].figure("within_gb_per_s")) for host in of_host}
    usual = max(sizes.values(), default=0)
    middle, far, near = slower_than_most({h: r for h, r in rates.items() if sizes[h] == usual}, *_thresholds(reports))
    remarks = []
    for host in [*far, *near]:
        ranks = tuple(report.rank for report in reports if report.host == host)
        text = (
            f"collectives within this host reach {rates[host]:.3g} GB/s, within most hosts {middle:.3g}; look at "
            "NVLink (nvidia-smi topo -m, nvlink -s), the fabric manager and other programs"
        )
        remarks.append(Remark(text, ranks, warning=host in near, outlier=host in far))
    return remarks


def _world(context: Context) -> World:
    assert context.world is not None, "the check of the connection comes first"
    return context.world
