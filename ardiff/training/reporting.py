"""Speeds, waiting, memory and nodes of all ranks since the last report; what stands out goes to the log."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ardiff.config import Config
from ardiff.monitor import nodes
from ardiff.monitor.gpu import open_nvml, why_not
from ardiff.monitor.memory import MemoryWatch, gpu_memory, host_memory
from ardiff.monitor.node_watch import NodeWatch
from ardiff.monitor.stragglers import StepTimes, StragglerWatch, slowest
from ardiff.monitor.throughput import Clock, peak_flops
from ardiff.monitor.writers import Details
from ardiff.training.distributed import World
from ardiff.training.job import Feed

log = logging.getLogger("ardiff")
OF_RANKS = ("forward_ms", "data_wait_ms", "host_rss_gb", "peak_memory_gb")  # in ranks.jsonl


class Reporter:
    """Measures on every rank, without waiting for the device between reports; on one rank of each node the node too."""

    def __init__(self, world: World, config: Config) -> None:
        self._world, self._config = world, config
        self.clock = Clock()
        self.times = StepTimes(world.device)
        self._memory = MemoryWatch()
        self._stragglers = StragglerWatch()
        self._sampler: nodes.NodeSampler | None = None
        self._node_watch = NodeWatch()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the node is sampled."""
        world = self._world
        if world.local_rank == 0:
            nvml = open_nvml() if world.device.type == "cuda" else None
            if world.device.type == "cuda" and nvml is None:
                log.info("%s: %s", platform.node(), why_not())
            self._sampler = nodes.NodeSampler(nvml, world.local_size)
            self._sampler.start()
        try:
            yield
        finally:
            if self._sampler is not None:
                self._sampler.close()

    def report(self, feed: Feed, step: int) -> tuple[dict[str, Any], Details]:
        """Figures of all ranks, and details of each (collective); empty on all but rank 0."""
        world = self._world
        speed = self.clock.report()
        warning = self._memory.check()
        if warning is not None:
            log.warning("rank %d (%s): %s", world.rank, platform.node(), warning)
        gpu, host = gpu_memory(world.device), host_memory()
        mine = {
            **self.times.report(int(speed["steps"]), speed["data_wait_seconds"] / speed["steps"]),
            "data_wait_frac": speed["data_wait_frac"],
            "host_rss_gb": host.rss_gb if host else 0.0,
            **(gpu or {}),
        }
        gathered = world.gather((mine, platform.node(), self._sampler.report() if self._sampler else None))
        if not world.is_main:
            return {}, Details()
        ranks, hosts = [figures for figures, _, _ in gathered], [name for _, name, _ in gathered]
        straggler = slowest(ranks, hosts)
        if named := self._stragglers.see(straggler):
            log.warning("STRAGGLER at step %d: %s", step, named)
        found = nodes.by_name((name, node) for _, name, node in gathered)
        for line in self._node_watch.see(found):
            log.warning("NODE at step %d: %s", step, line)
        per_second = self._config.train.global_batch_size // feed.counts_as / speed["seconds_per_step"]
        flops = 3 * feed.flops_per_clip * per_second / world.size
        peak = peak_flops(world.device)
        figures = {
            "clips_per_s": per_second,
            "tokens_per_s": per_second * feed.tokens_per_clip,
            "tflops_per_gpu": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "data_wait_frac": max(rank["data_wait_frac"] for rank in ranks),
            "step_ms": 1000 * speed["seconds_per_step"],
            "peak_memory_gb": max(rank["peak_memory_gb"] for rank in ranks) if gpu else None,
            "host_rss_gb": max(rank["host_rss_gb"] for rank in ranks) if host else None,
            "alloc_retries": sum(rank["alloc_retries"] for rank in ranks) if gpu else None,
            "nodes": nodes.compact(found),
        }
        if straggler is not None:
            figures |= {"slowest_rank": straggler.rank, "slowest_rank_ratio": straggler.ratio}
        of_ranks = {name: [nodes.short(rank[name]) for rank in ranks] for name in OF_RANKS if name in ranks[0]}
        gpus = {"gpus": of_gpus} if (of_gpus := nodes.every_gpu(found)) else {}
        return figures, Details({"step": step, **of_ranks, **gpus}, nodes.charts(found), nodes.extremes(found))
