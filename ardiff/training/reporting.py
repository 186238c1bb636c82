"""Speeds, waiting and memory of all ranks since the last report; what stands out goes to the log."""

from __future__ import annotations

import logging
import platform
from typing import Any

from ardiff.config import Config
from ardiff.monitor.memory import MemoryWatch, gpu_memory, host_memory
from ardiff.monitor.stragglers import StepTimes, Straggler, StragglerWatch, slowest
from ardiff.monitor.throughput import Clock, peak_flops
from ardiff.training.distributed import World
from ardiff.training.job import Feed

log = logging.getLogger("ardiff")


class Reporter:
    """Measures on every rank, without waiting for the device between reports."""

    def __init__(self, world: World, config: Config) -> None:
        self._world, self._config = world, config
        self.clock = Clock()
        self.times = StepTimes(world.device)
        self._memory = MemoryWatch()
        self._stragglers = StragglerWatch()

    def report(self, feed: Feed, step: int) -> dict[str, Any]:
        """Figures of all ranks (collective); empty on all but rank 0."""
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
        gathered = world.gather((mine, platform.node()))
        if not world.is_main:
            return {}
        ranks, hosts = [figures for figures, _ in gathered], [name for _, name in gathered]
        straggler = slowest(ranks, hosts)
        if named := self._stragglers.see(straggler):
            log.warning("STRAGGLER at step %d: %s", step, named)
        per_second = self._config.train.global_batch_size // feed.counts_as / speed["seconds_per_step"]
        flops = 3 * feed.flops_per_clip * per_second / world.size
        peak = peak_flops(world.device)
        return {
            "clips_per_s": per_second,
            "tokens_per_s": per_second * feed.tokens_per_clip,
            "tflops_per_gpu": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "data_wait_frac": max(rank["data_wait_frac"] for rank in ranks),
            "step_ms": 1000 * speed["seconds_per_step"],
            "peak_memory_gb": max(rank["peak_memory_gb"] for rank in ranks) if gpu else None,
            "host_rss_gb": max(rank["host_rss_gb"] for rank in ranks) if host else None,
            "alloc_retries": sum(rank["alloc_retries"] for rank in ranks) if gpu else None,
            **self._of_slowest(straggler),
        }

    @staticmethod
    def _of_slowest(straggler: Straggler | None) -> dict[str, Any]:
        """The rank with the most work of its own per step, and how much that is to the median."""
        if straggler is None:
            return {}
        return {"slowest_rank": straggler.rank, "slowest_rank_ratio": straggler.ratio}
