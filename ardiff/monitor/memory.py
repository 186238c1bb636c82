"""Memory of the host and of the GPU: how much this process holds, how much it may still get, and whether it leaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

GB = 2**30
LITTLE = 0.05  # of all memory left: a warning
PERIOD = 600.0  # seconds over which the smallest size counts: a checkpoint being written holds memory for a while
SETTLING = 3  # periods after which the size is settled: buffers, caches and compilers have had their turn
GROWTH_GB, GROWTH = 1.0, 0.2  # that much more, and that share of the settled size, is worth a line
HOUR = 3600.0


@dataclass(frozen=True)
class HostMemory:
    """Memory in GiB.

    rss_gb: what this process holds of its own, anonymous and shared memory. Mapped files, such as shards, are not in
    it: they are page cache, which the system takes back when it needs room. available_gb: what it may still get, and
    total_gb: of how much; the least of the machine and of the control groups (containers, batch systems) around it.
    """

    rss_gb: float
    available_gb: float
    total_gb: float


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Memory of this process; None where the system does not tell (there is no /proc).

    root: where /proc and /sys are found.
    """
    own, machine = fields(root / "proc/self/status"), fields(root / "proc/meminfo")
    if "RssAnon" not in own or "MemAvailable" not in machine:
        return None
    limits = [(machine["MemTotal"] * 1024, machine["MemAvailable"] * 1024), *_group_limits(root)]
    return HostMemory(
        rss_gb=(own["RssAnon"] + own.get("RssShmem", 0)) * 1024 / GB,
        available_gb=max(0, min(available for _, available in limits)) / GB,
        total_gb=min(total for total, _ in limits) / GB,
    )


def gpu_memory(device: torch.device | None = None) -> dict[str, float] | None:
    """Of a GPU (the current one): the most memory allocated and reserved so far, in GiB, and how often the allocator
    had to give back its cache and try again (which costs much time: memory is nearly full). None without a GPU.
    """
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    stats = torch.cuda.memory_stats(device)
    return {
        "peak_memory_gb": stats.get("allocated_bytes.all.peak", 0) / GB,
        "peak_reserved_gb": stats.get("reserved_bytes.all.peak", 0) / GB,
        "alloc_retries": float(stats.get("num_alloc_retries", 0)),
    }


class MemoryWatch:
    """Warns when the memory that is left runs low, and when the process keeps growing.

    Low: less than 5 % of the total is left; said once an hour at most, unless it has halved since. Growing: the least
    size over ten minutes lies 1 GiB and 20 % above the greatest such least size of the first half hour, when buffers
    were filled and kernels compiled; said again whenever the growth has doubled.

    read, now: where the figures and the time (in seconds) come from.
    """

    def __init__(
        self,
        read: Callable[[], HostMemory | None] = host_memory,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._now = read, now
        self._period_begin, self._period_least = now(), float("inf")
        self._periods = 0
        self._settled, self._settled_at = 0.0, now()
        self._reported_growth = 0.0
        self._low: tuple[float, float] | None = None  # when it was last said, and what was left

    def check(self) -> str | None:
        """A line of warning, if there is something to warn of. Cheap: call it whenever metrics are reported."""
        memory = self._read()
        if memory is None:
            return None
        warnings = (self._running_low(memory), self._grown(memory))
        return "; ".join(filter(None, warnings)) or None

    def _running_low(self, memory: HostMemory) -> str | None:
        now = self._now()
        if memory.available_gb >= LITTLE * memory.total_gb:
            return None
        if self._low is not None and now - self._low[0] < HOUR and memory.available_gb > self._low[1] / 2:
            return None
        self._low = (now, memory.available_gb)
        return (
            f"host memory runs low: {memory.available_gb:.1f} of {memory.total_gb:.1f} GiB are left, this process "
            f"holds {memory.rss_gb:.1f}"
        )

    def _grown(self, memory: HostMemory) -> str | None:
        now = self._now()
        self._period_least = min(self._period_least, memory.rss_gb)
        if now - self._period_begin < PERIOD:
            return None
        least, self._period_begin, self._period_least = self._period_least, now, float("inf")
        self._periods += 1
        if self._periods <= SETTLING:
            self._settled, self._settled_at = max(self._settled, least), now
            return None
        growth = least - self._settled
        if growth < max(GROWTH_GB, GROWTH * self._settled, 2 * self._reported_growth):
            return None
        self._reported_growth = growth
        hours = (now - self._settled_at) / HOUR
        lasts = memory.available_gb / growth * hours
        return (
            f"host memory grows: this process holds {least:.1f} GiB, {growth:.1f} more than {hours:.1f} hours ago; "
            f"at this rate the {memory.available_gb:.1f} GiB that are left last {lasts:.0f} hours"
        )


def fields(path: Path) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file in /proc; none where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.strip().endswith(" kB")}


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of every control group around this process that limits memory: the limit, and what of it is left; in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits_around(root / "sys/fs/cgroup", path, ("memory.max", "memory.current", ""))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            yield from _limits_around(root / "sys/fs/cgroup/memory", path, names)


def _limits_around(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    """The limits of a group and of those that contain it. A container may see its own group as the root only."""
    limit_file, usage_file, prefix = names
    inside = PurePosixPath(path.lstrip("/"))
    for group in [inside, *inside.parents] if inside.parts else [inside]:
        folder = mount / group
        try:
            limit = int((folder / limit_file).read_text())
            usage = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not visible from here, or "max"
            continue
        cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield limit, limit - (usage - cache)
