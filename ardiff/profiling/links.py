"""Time of a collective by size and number of ranks: alpha + bytes on the wire / bandwidth, fitted to measurements."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from ardiff.monitor.collectives import Measured, measure
from ardiff.training.distributed import World

SIZES = {"cuda": [2**power for power in (16, 20, 23, 26, 28)], "cpu": [2**power for power in (12, 16, 18, 20, 22, 23)]}
SECONDS = {"cuda": 2.0, "cpu": 1.0}  # for one operation over all sizes and a round
ROUNDS, REPEATS = 5, 2  # the quickest round counts: others may use machine and network at the same time
PASSES = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0}  # that a ring makes over the data


@dataclass(frozen=True)
class Link:
    """The fit of one collective: seconds = alpha * steps(n) / steps(ranks) + passes (n - 1) / n * bytes / bandwidth.

    steps: hops of a tree, log2 of the ranks: latency grows so, while bandwidth (of the bus, GB/s as in nccl-tests)
    stays. error: of the fit against what it was fitted to, mean of the absolute relative deviations.
    """

    op: str
    ranks: int
    alpha: float
    gb_per_s: float
    error: float = 0.0

    def seconds(self, size: float, ranks: int) -> float:
        """Of one call with `size` bytes of data among so many ranks."""
        if ranks < 2:
            return 0.0
        hops = math.log2(ranks) / math.log2(self.ranks) if self.ranks > 1 else 1.0
        return self.alpha * hops + PASSES[self.op] * (ranks - 1) / ranks * size / (self.gb_per_s * 1e9)

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)


def fit(found: Sequence[Measured]) -> dict[str, Link]:
    """A link for every collective among the measurements (of one group of ranks); the relative error is least."""
    links: dict[str, Link] = {}
    for op in dict.fromkeys(measured.op for measured in found):
        rows = [measured for measured in found if measured.op == op]
        ranks = rows[0].ranks
        wire = np.array([PASSES[op] * (ranks - 1) / ranks * row.bytes for row in rows])
        seconds = np.array([row.seconds for row in rows])
        columns = np.stack([np.ones_like(wire), wire], axis=1) / seconds[:, None]
        alpha, per_byte = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
        if alpha < 0 or per_byte <= 0 or len(rows) == 1:  # all too small, or too noisy, to tell both apart
            alpha, per_byte = 0.0, float(np.median(seconds / wire))
        error = float(np.abs((alpha + per_byte * wire) / seconds - 1).mean())
        links[op] = Link(op, ranks, float(alpha), float(1 / per_byte / 1e9), error)
    return links


@dataclass(frozen=True)
class Links:
    """How ranks are connected: links among the ranks of a node, and among all where these are on several nodes.

    ranks_per_node: of the node with most. assumed: what was not measured here and stands in, in words.
    """

    ranks_per_node: int
    within: dict[str, Link]
    across: dict[str, Link]
    measured: list[Measured]
    assumed: list[str]

    def seconds(self, op: str, size: float, ranks: int) -> float:
        """Of one call: inside a node as long as the ranks fit there."""
        links = self.within if ranks <= self.ranks_per_node else self.across
        return links[op].seconds(size, ranks) if ranks > 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return {
            "ranks_per_node": self.ranks_per_node,
            "within_node": {op: link.as_json() for op, link in self.within.items()},
            "across_nodes": {op: link.as_json() for op, link in self.across.items()},
            "measured": [found.as_json() for found in self.measured],
            "assumed": self.assumed,
        }

    @staticmethod
    def from_json(found: dict[str, Any]) -> Links:
        """What `as_json` made."""
        within, across = (
            {op: Link(**link) for op, link in found[name].items()} for name in ("within_node", "across_nodes")
        )
        measured = [Measured(**one) for one in found["measured"]]
        return Links(found["ranks_per_node"], within, across, measured, found["assumed"])


# Bus bandwidth in GB/s where nothing can be measured: of an all-reduce among 8 GPUs over an A800's NVLink (400 GB/s),
# and among nodes with 4 InfiniBand cards of 200 Gb/s each, at nine tenths of their rate.
ASSUMED_WITHIN, ASSUMED_ACROSS = 155.0, 90.0
ASSUMED_ALPHA = 40e-6


def measured_links(world: World, node_gb_per_s: float | None) -> Links:
    """Measure (collective) and fit; what cannot be measured here is assumed, and said.

    node_gb_per_s: bus bandwidth across nodes, instead of what is measured or assumed.
    """
    nodes = nodes_of(world.gather(platform.node()))
    everywhere = _measure(world, None) if world.size > 1 else []
    inside = _measure_inside(world, nodes) if 1 < len(nodes) < world.size else []
    assumed: list[str] = []
    if len(nodes) > 1:
        across, within = fit(everywhere), fit(inside)
    else:
        across, within = {}, fit(everywhere)
    if not within:
        within = across or _assumed(ASSUMED_WITHIN)
        source = "as across nodes" if across else f"{ASSUMED_WITHIN:g} GB/s (8 A800 with NVLink)"
        assumed.append(f"bus bandwidth inside a node: {source}, not measured here")
    if node_gb_per_s is not None:
        across = _assumed(node_gb_per_s)
        assumed.append(f"bus bandwidth across nodes: {node_gb_per_s:g} GB/s, as given")
    elif not across and world.device.type == "cpu" and everywhere:
        across = within
        assumed.append("bus bandwidth across nodes: that inside this one, not measured here")
    elif not across:
        across = _assumed(ASSUMED_ACROSS)
        assumed.append(
            f"bus bandwidth across nodes: {ASSUMED_ACROSS:g} GB/s (4 cards of 200 Gb/s a node), not measured here"
        )
    return Links(max(map(len, nodes)), within, across, [*inside, *everywhere], assumed)


def nodes_of(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of every host, in the order of the ranks. hosts: of every rank."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def _measure_inside(world: World, nodes: Sequence[Sequence[int]]) -> list[Measured]:
    """Every node by itself, all at once (collective); what the first of the largest ones found, on all ranks."""
    own: dist.ProcessGroup | None = None
    for node in nodes:  # every rank makes every group, in the same order
        group = dist.new_group(list(node))
        if world.rank in node:
            own = group
    assert own is not None
    found: list[Measured] = []
    if dist.get_world_size(own) > 1:
        found = _measure(world, own)
    else:
        world.barrier()  # as the others do before they measure
    everyone = world.gather(found)
    dist.destroy_process_group(own)
    return everyone[max(nodes, key=len)[0]]


def _measure(world: World, group: dist.ProcessGroup | None) -> list[Measured]:
    """The quickest of some rounds, at the sizes that most rounds had time for."""
    world.barrier()  # a rank may have had something of its own to do
    kind = world.device.type
    rounds: dict[tuple[str, int], list[Measured]] = {}
    for _ in range(ROUNDS):
        for one in measure(world, SIZES[kind], REPEATS, group, SECONDS[kind]):
            rounds.setdefault((one.op, one.bytes), []).append(one)
    complete = [found for found in rounds.values() if len(found) > ROUNDS // 2]
    return [min(found, key=lambda one: one.seconds) for found in complete]


def _assumed(gb_per_s: float) -> dict[str, Link]:
    return {op: Link(op, 8, ASSUMED_ALPHA, gb_per_s) for op in PASSES}
