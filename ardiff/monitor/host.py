"""What the kernel says of this node: processors, memory, networks, disks, pressure; from /proc and /sys.

Traffic of network filesystems is in the figures of the network, not in those of the disks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ardiff.monitor.memory import GB, fields, host_memory

MB = 1e6
SECTOR = 512  # bytes, whatever the disk's own are
LANES = 4  # InfiniBand counts its data in units of so many bytes
PRESSURES = ("cpu", "memory", "io")


@dataclass(frozen=True)
class HostState:
    """A node at one moment; rates are means since the reading before. None where the system does not tell.

    Memory in GiB, rates in 10^6 bytes per second, shares in %.
    """

    cpu: float | None = None  # of all processors of the machine
    steal: float | None = None  # what other guests of the machine beneath took of them
    load: float | None = None  # processes that run or want to, mean of a minute
    available_gb: float | None = None  # memory that can still be had, control groups considered
    page_cache_gb: float | None = None  # files that are kept in memory, such as shards
    net_rx_mb_s: float | None = None  # of all network cards, without the loop-back
    net_tx_mb_s: float | None = None
    ib_rx_mb_s: float | None = None  # of all InfiniBand and RoCE ports; remote memory access is not in net_*
    ib_tx_mb_s: float | None = None
    disk_read_mb_s: float | None = None  # of all disks
    disk_write_mb_s: float | None = None
    cpu_pressure: float | None = None  # time in which something waited for a processor,
    memory_pressure: float | None = None  # for memory to be reclaimed or read back,
    io_pressure: float | None = None  # for a disk or a network filesystem
    open_files: int | None = None  # of this process


@dataclass(frozen=True)
class _Counters:
    """What only grows, at one moment, in seconds, ticks, bytes and microseconds."""

    seconds: float
    ticks: tuple[int, int, int] | None  # of all processors: busy, stolen, all
    net: tuple[int, int] | None  # received, sent
    infiniband: tuple[int, int] | None
    disks: tuple[int, int] | None  # read, written
    pressure: dict[str, int]


class HostReader:
    """Reads the state of this node.

    root: where /proc and /sys are found. now: where the time (in seconds) comes from.
    """

    def __init__(self, root: Path = Path("/"), now: Callable[[], float] = time.monotonic) -> None:
        self._root, self._now = root, now
        self._before = self._count()

    def read(self) -> HostState:
        """The state now; rates are since the call before, or since this was made."""
        before, after = self._before, self._count()
        self._before = after
        seconds = after.seconds - before.seconds
        cpu, steal = _shares(before.ticks, after.ticks)
        received, sent = _rates(before.net, after.net, seconds)
        ib_received, ib_sent = _rates(before.infiniband, after.infiniband, seconds)
        read, written = _rates(before.disks, after.disks, seconds)
        waited = {kind: _waited(before.pressure, after.pressure, kind, seconds) for kind in PRESSURES}
        memory = host_memory(self._root)
        return HostState(
            cpu=cpu,
            steal=steal,
            load=self._load(),
            available_gb=memory.available_gb if memory else None,
            page_cache_gb=_page_cache(fields(self._root / "proc/meminfo")),
            net_rx_mb_s=received,
            net_tx_mb_s=sent,
            ib_rx_mb_s=ib_received,
            ib_tx_mb_s=ib_sent,
            disk_read_mb_s=read,
            disk_write_mb_s=written,
            cpu_pressure=waited["cpu"],
            memory_pressure=waited["memory"],
            io_pressure=waited["io"],
            open_files=self._open_files(),
        )

    def _count(self) -> _Counters:
        return _Counters(
            self._now(),
            self._ticks(),
            self._net(),
            self._infiniband(),
            self._disks(),
            {kind: total for kind in PRESSURES if (total := self._pressure(kind)) is not None},
        )

    def _ticks(self) -> tuple[int, int, int] | None:
        first = next(iter(_lines(self._root / "proc/stat")), "").split()
        if len(first) < 9 or first[0] != "cpu":
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, first[1:9])  # guests are in user
        busy = user + nice + system + irq + softirq
        return busy, steal, busy + steal + idle + iowait

    def _load(self) -> float | None:
        words = next(iter(_lines(self._root / "proc/loadavg")), "").split()
        return float(words[0]) if words else None

    def _net(self) -> tuple[int, int] | None:
        """Of the interfaces with a card behind them (bonds and bridges would count twice); where there is none, as in
        a container with a virtual one, of all but the loop-back.
        """
        found = {}
        for line in _lines(self._root / "proc/net/dev"):
            name, colon, rest = line.partition(":")
            if colon and name.strip() != "lo":
                words = rest.split()
                found[name.strip()] = int(words[0]), int(words[8])
        cards = [name for name in found if (self._root / "sys/class/net" / name / "device").exists()]
        return _sum(found[name] for name in cards or found)

    def _infiniband(self) -> tuple[int, int] | None:
        ports = (self._root / "sys/class/infiniband").glob("*/ports/*/counters")
        counts = ((_integer(port / "port_rcv_data"), _integer(port / "port_xmit_data")) for port in ports)
        return _sum((LANES * received, LANES * sent) for received, sent in counts)

    def _disks(self) -> tuple[int, int] | None:
        """Of whole disks; partitions and what is made of disks would count twice."""
        rows = [line.split() for line in _lines(self._root / "proc/diskstats")]
        blocks = self._root / "sys/block"
        return _sum(
            (SECTOR * int(row[5]), SECTOR * int(row[9])) for row in rows if (blocks / row[2] / "device").exists()
        )

    def _pressure(self, kind: str) -> int | None:
        """Microseconds in which some process waited."""
        for line in _lines(self._root / "proc/pressure" / kind):
            if line.startswith("some "):
                return int(line.rpartition("total=")[2])
        return None

    def _open_files(self) -> int | None:
        try:
            return sum(1 for _ in (self._root / "proc/self/fd").iterdir())
        except OSError:
            return None


def _page_cache(meminfo: dict[str, int]) -> float | None:
    """Files in memory, in GiB; shared memory is counted with them, but is no file's."""
    if "Cached" not in meminfo:
        return None
    return (meminfo["Cached"] + meminfo.get("Buffers", 0) - meminfo.get("Shmem", 0)) * 1024 / GB


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel; none where there is no such file, or it is switched off."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _integer(path: Path) -> int:
    """The number that a file of the kernel holds; 0 where it cannot be read."""
    words = "".join(_lines(path)).split()
    return int(words[0]) if words and words[0].isdecimal() else 0


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Each part summed; None of nothing."""
    columns = list(zip(*pairs, strict=True))
    return (sum(columns[0]), sum(columns[1])) if columns else None


def _rates(
    before: tuple[int, int] | None, after: tuple[int, int] | None, seconds: float
) -> tuple[float | None, float | None]:
    """MB/s of both; None where nothing was counted or a counter began anew (an interface has gone)."""
    if before is None or after is None or seconds <= 0 or after[0] < before[0] or after[1] < before[1]:
        return None, None
    return (after[0] - before[0]) / seconds / MB, (after[1] - before[1]) / seconds / MB


def _shares(
    before: tuple[int, int, int] | None, after: tuple[int, int, int] | None
) -> tuple[float | None, float | None]:
    """% of the processors' time that was busy and stolen."""
    if before is None or after is None or after[2] <= before[2]:
        return None, None
    every = after[2] - before[2]
    return 100 * (after[0] - before[0]) / every, 100 * (after[1] - before[1]) / every


def _waited(before: dict[str, int], after: dict[str, int], kind: str, seconds: float) -> float | None:
    """% of the time in which something waited."""
    if kind not in before or kind not in after or seconds <= 0:
        return None
    return min(100.0, (after[kind] - before[kind]) / seconds / 1e4)
