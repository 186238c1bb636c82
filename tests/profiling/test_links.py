"""Collectives: the fit, what it says of other sizes and ranks, what is assumed where nothing was measured."""

import math

import pytest
import torch
import torch.distributed as dist

from ardiff.monitor.collectives import Measured
from ardiff.profiling import links
from ardiff.profiling.links import Link, Links, fit, measured_links, nodes_of
from ardiff.training.distributed import World


def seconds_of(size, ranks, alpha=2e-4, gb_per_s=3.0, passes=2):
    return alpha + passes * (ranks - 1) / ranks * size / (gb_per_s * 1e9)


def measurements(ranks, op="all_reduce", passes=2, noise=0.0):
    sizes = [2**power for power in range(12, 26, 2)]
    taken = [seconds_of(size, ranks, passes=passes) * (1 + noise * (-1) ** i) for i, size in enumerate(sizes)]
    return [Measured(op, size, ranks, seconds, 0.0) for size, seconds in zip(sizes, taken, strict=True)]


def test_fit_finds_latency_and_bandwidth():
    found = fit([*measurements(4), *measurements(4, "all_gather", passes=1)])
    for link in found.values():
        assert link.alpha == pytest.approx(2e-4) and link.gb_per_s == pytest.approx(3.0) and link.error < 1e-9
    assert found["all_gather"].seconds(1e6, 4) == pytest.approx(seconds_of(1e6, 4, passes=1))
    noisy = fit(measurements(4, noise=0.05))["all_reduce"]
    assert noisy.gb_per_s == pytest.approx(3.0, rel=0.1) and 0.01 < noisy.error < 0.1


def test_fit_of_one_size_is_bandwidth_alone():
    link = fit(measurements(2)[-1:])["all_reduce"]
    assert link.alpha == 0 and link.seconds(2**24, 2) == pytest.approx(seconds_of(2**24, 2))


def test_other_numbers_of_ranks():
    link = Link("all_reduce", 2, 1e-4, 10.0)
    assert link.seconds(1e9, 1) == 0.0
    assert link.seconds(1e9, 8) == pytest.approx(3e-4 + 2 * 7 / 8 * 0.1)
    assert link.seconds(0, 64) / link.seconds(0, 2) == pytest.approx(math.log2(64))


def test_inside_a_node_and_across():
    fast, slow = {"all_reduce": Link("all_reduce", 8, 0, 200.0)}, {"all_reduce": Link("all_reduce", 16, 0, 50.0)}
    found = Links(8, fast, slow, [], ["something"])
    assert found.seconds("all_reduce", 1e9, 8) == fast["all_reduce"].seconds(1e9, 8)
    assert found.seconds("all_reduce", 1e9, 16) == slow["all_reduce"].seconds(1e9, 16)
    assert Links.from_json(found.as_json()) == found


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


def test_one_rank_measures_nothing_and_says_so(alone):
    found = measured_links(alone, None)
    assert found.ranks_per_node == 1
    assert found.measured == [] and len(found.assumed) == 2
    assert found.within["all_reduce"].gb_per_s == links.ASSUMED_WITHIN
    given = measured_links(alone, 42.0)
    assert given.across["all_gather"].gb_per_s == 42.0 and "as given" in given.assumed[-1]


def test_disturbed_rounds_do_not_count(alone, monkeypatch):
    rounds = iter([5.0, 0.001, 0.001, 7.0, 0.002])

    def measure(_world, sizes, _repeats, _group, _seconds):
        taken = next(rounds)
        return [Measured("all_reduce", sizes[0], 2, taken, 0.0)]

    monkeypatch.setattr(links, "measure", measure)
    assert [one.seconds for one in links._measure(alone, None)] == [0.001]


class OneOfMany:
    """A rank on one of some hosts, which notes what all ranks must do alike."""

    device = torch.device("cpu")

    def __init__(self, rank, hosts, nodes):
        self.rank, self.size, self.hosts, self.nodes, self.together = rank, len(hosts), hosts, nodes, []

    def gather(self, value):
        self.together.append("gather")
        if isinstance(value, str):
            return self.hosts
        own = [next(node for node in self.nodes if rank in node) for rank in range(self.size)]
        return [measurements(len(node)) if len(node) > 1 else [] for node in own]

    def barrier(self):
        self.together.append("barrier")


@pytest.mark.parametrize("hosts", [["a", "b", "b", "b"], ["a", "b", "a", "b"], ["a", "a", "a", "b", "c"]])
def test_ranks_of_uneven_hosts_make_the_same_groups(monkeypatch, hosts):
    nodes = nodes_of(hosts)
    largest = max(map(len, nodes))
    seen = []
    for rank in range(len(hosts)):
        world, within = OneOfMany(rank, hosts, nodes), []

        def new_group(ranks, world=world):
            world.together.append(tuple(ranks))
            return ranks if world.rank in ranks else None

        def measure(world, group, within=within):
            world.barrier()
            within.append(group)
            return measurements(len(group or hosts))

        monkeypatch.setattr(links.dist, "new_group", new_group)
        monkeypatch.setattr(links.dist, "get_world_size", len)
        monkeypatch.setattr(links.dist, "destroy_process_group", lambda group: None)
        monkeypatch.setattr(links, "_measure", measure)
        found = measured_links(world, None)
        own = next(node for node in nodes if rank in node)
        assert within == ([None, own] if len(own) > 1 else [None])
        assert found.ranks_per_node == found.within["all_reduce"].ranks == largest
        assert found.across["all_reduce"].ranks == len(hosts)
        seen.append(world.together)
    assert all(one == seen[0] for one in seen) and seen[0].count("barrier") == 2
