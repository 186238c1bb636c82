"""What is wrong with a node or a GPU, by what the nodes tell at reports: a line for the log, with the host named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median_high

from ardiff.monitor.lasting import Lasting
from ardiff.monitor.nodes import GpuSummary, NodeSummary

MOST_LINES = 8  # a report; a cluster whose power fails must not fill the log
OFTEN = 0.5  # share of the samples from which a GPU counts as throttled
SLOW = 0.8  # of the median clock of all GPUs of its kind: far below it
CAPPED = 0.9  # the same for one at its power limit, which alone is usual under full load
BUSY = 50.0  # % utilization; an idle GPU has low clocks
POWER_CAP = "power cap"


class NodeWatch:
    """Compares the GPUs with each other and with what they were.

    now: where the time (in seconds) comes from.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lasting: dict[tuple[str, str], Lasting] = {}  # GPU, what
        self._errors: dict[str, float] = {}  # uncorrected, at the last report
        self._links: dict[str, int] = {}  # the most that were up
        self._said: dict[tuple[str, str], object] = {}

    def see(self, nodes: Mapping[str, NodeSummary]) -> list[str]:
        """Take in a report of all nodes; returns lines of warning."""
        gpus = {(host, index): gpu for host, node in nodes.items() for index, gpu in enumerate(node.gpus)}
        clocks, links = _medians(gpus.values()), _most_links(gpus.values())
        lines = [
            f"{host}: no statistics for {node.silent:.0f} s; its driver or its kernel does not answer"
            for host, node in nodes.items()
            if self._is_new(host, "silent", bool(node.silent) or None)
        ]
        for (host, index), gpu in gpus.items():
            where = f"{host}, GPU {index}" + (f" ({gpu.uuid})" if gpu.uuid else "")
            key = f"{host}.{index}"
            found = [*self._events(key, gpu, links.get(gpu.name, 0)), *self._states(key, gpu, clocks.get(gpu.name))]
            lines += [f"{where}: {what}" for what in found]
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more warnings about nodes"]
        return lines

    def _events(self, key: str, gpu: GpuSummary, links_of_others: int) -> Iterator[str]:
        """What is told when it happens."""
        if self._is_new(key, "lost", gpu.lost):
            yield f"LOST: {gpu.lost}; its kernels fail or hang, the node needs a reset or a repair"
        errors = gpu.figures.get("ecc_uncorrected")
        if errors is not None:
            more = errors - self._errors.get(key, errors)
            self._errors[key] = errors
            if more > 0:
                yield (
                    f"{more:.0f} more uncorrected memory errors (ECC), {errors:.0f} since the driver was loaded; "
                    "results of this GPU may be wrong, replace it"
                )
        if gpu.nvlinks_active is not None:
            most = self._links[key] = max(self._links.get(key, 0), gpu.nvlinks_active)
            down = max(most, links_of_others) - gpu.nvlinks_active
            if self._is_new(key, "links", down or None):
                yield f"{down} NVLink(s) down, {gpu.nvlinks_active} up; collectives become slower or fail"

    def _states(self, key: str, gpu: GpuSummary, median_clock: float | None) -> Iterator[str]:
        """What is told if it lasts."""
        clock, busy = gpu.figures.get("sm_clock_mhz"), gpu.figures.get("utilization", 100.0) >= BUSY
        ratio = clock / median_clock if clock and median_clock and busy else 1.0
        often = [reason for reason, share in gpu.throttled.items() if share >= OFTEN]
        slowed = [reason for reason in often if reason != POWER_CAP or ratio < CAPPED]
        if self._lasts(key, "throttled", bool(slowed)):
            at = f" at {gpu.figures['temperature_c']:.0f} C" if "temperature_c" in gpu.figures else ""
            watts = f", {gpu.figures['power_w']:.0f} W" if "power_w" in gpu.figures else ""
            yield f"throttled ({', '.join(slowed)}){at}{watts}" + (f", {clock:.0f} MHz" if clock else "")
        if self._lasts(key, "slow", ratio < SLOW and not slowed):
            yield f"runs at {clock:.0f} MHz, the median of its kind is {median_clock:.0f} MHz"

    def _is_new(self, key: str, what: str, value: object) -> bool:
        before = self._said.get((key, what))
        self._said[key, what] = value
        return value is not None and value != before

    def _lasts(self, key: str, what: str, so: bool) -> bool:
        return self._lasting.setdefault((key, what), Lasting(self._now)).see(so)


def _medians(gpus: Iterable[GpuSummary]) -> dict[str | None, float]:
    """The median clock of the busy GPUs of every kind; of two GPUs the faster one's."""
    clocks: dict[str | None, list[float]] = {}
    for gpu in gpus:
        if "sm_clock_mhz" in gpu.figures and gpu.figures.get("utilization", 100.0) >= BUSY:
            clocks.setdefault(gpu.name, []).append(gpu.figures["sm_clock_mhz"])
    return {name: median_high(values) for name, values in clocks.items()}


def _most_links(gpus: Iterable[GpuSummary]) -> dict[str | None, int]:
    """How many NVLinks most GPUs of a kind have up."""
    links: dict[str | None, list[int]] = {}
    for gpu in gpus:
        if gpu.nvlinks_active is not None:
            links.setdefault(gpu.name, []).append(gpu.nvlinks_active)
    return {name: median_high(values) for name, values in links.items()}
