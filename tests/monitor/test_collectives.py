"""Bandwidths: the formula, and that sizes and times of what is measured are those that were asked for."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ardiff.monitor.collectives import OPS, bus_bandwidth, measure, measure_link
from ardiff.training.distributed import World


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert bus_bandwidth("all_reduce", 8_000_000_000, 8, 1.0) == pytest.approx(14.0)  # 2 * 7/8 * 8 GB/s
    assert bus_bandwidth("reduce_scatter", 8_000_000_000, 8, 1.0) == pytest.approx(7.0)
    assert bus_bandwidth("all_gather", 8_000_000_000, 2, 0.5) == pytest.approx(8.0)
    assert bus_bandwidth("all_reduce", 1000, 1, 1.0) == 0.0


def two_ranks(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, torch.device("cpu"), dist.new_group(backend="gloo"))
    found = measure(world, [100_000, 1000], repeats=2)
    assert [(one.op, one.bytes) for one in found] == [(op, size) for op in OPS for size in (1000, 100_000)]
    assert all(one.ranks == 2 and one.seconds > 0 for one in found)
    assert all(one.bus_gb_per_s == bus_bandwidth(one.op, one.bytes, 2, one.seconds) for one in found)
    every = world.gather(found)
    assert every[0] == every[1]  # the slowest rank's time, on both
    assert len(measure(world, [1000, 1 << 40], repeats=1, seconds=0.5)) == 3  # a TiB is left out
    rates = world.gather([measure_link(world, 0, 1, 1 << 20), measure_link(world, 1, 0, 1 << 20, repeats=1)])
    assert [[rate is not None and rate > 0 for rate in each] for each in rates] == [[True, False], [False, True]]
    dist.destroy_process_group()


def test_two_ranks_measure_the_same(tmp_path):
    mp.start_processes(two_ranks, (str(tmp_path),), nprocs=2, start_method="fork")
