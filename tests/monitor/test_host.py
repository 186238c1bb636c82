"""Figures of a node from made-up /proc and /sys, and from the real ones."""

import contextlib
import os
import time

import pytest

from ardiff.monitor.host import HostReader, HostState
from ardiff.monitor.memory import GB


class Node:
    """A /proc and a /sys whose counters a test moves on."""

    def __init__(self, root):
        self.root, self.seconds = root, 0.0
        self.busy = self.idle = self.iowait = self.stolen = 1000
        self.net = {"lo": [0, 0], "eth0": [10**12, 10**9], "eth1": [5, 5], "bond0": [10**12 + 5, 10**9 + 5]}
        self.infiniband = {"mlx5_0": [2**40, 2**41], "mlx5_1": [0, 0]}
        self.disks = {"nvme0n1": [10, 20], "nvme0n1p1": [10, 20], "sda": [1, 1], "dm-0": [7, 7], "loop0": [9, 9]}
        self.stalled = {"cpu": 10**6, "memory": 0, "io": 10**7}
        for card in ("eth0", "eth1"):
            (root / "sys/class/net" / card / "device").mkdir(parents=True)
        for disk in ("nvme0n1", "sda"):
            (root / "sys/block" / disk / "device").mkdir(parents=True)
        self.put("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nBuffers: 1048576 kB\n"
                 "Cached: 4194304 kB\nShmem: 2097152 kB\n")  # fmt: skip
        self.put("proc/self/status", "RssAnon: 1048576 kB\n")
        self.put("proc/loadavg", "7.11 4.57 3.49 3/267 7723\n")
        for descriptor in range(5):
            self.put(f"proc/self/fd/{descriptor}", "")
        self.write()

    def put(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write(self):
        ticks = f"{self.busy} 0 0 {self.idle} {self.iowait} 0 0 {self.stolen} {self.busy} 0"
        self.put("proc/stat", f"cpu  {ticks}\ncpu0 {ticks}\nintr 1 2 3\n")
        rows = [f"{name:>6}: {r} 1 2 3 4 5 6 7 {t} 1 2 3 4 5 6 7" for name, (r, t) in self.net.items()]
        head = "Inter-|   Receive        |  Transmit\n face |bytes    packets errs drop fifo frame|bytes packets\n"
        self.put("proc/net/dev", head + "\n".join(rows) + "\n")
        for card, (received, sent) in self.infiniband.items():
            self.put(f"sys/class/infiniband/{card}/ports/1/counters/port_rcv_data", f"{received}\n")
            self.put(f"sys/class/infiniband/{card}/ports/1/counters/port_xmit_data", f"{sent}\n")
        disks = [f"   8  0 {name} 5 6 {r} 7 8 9 {w} 10 0 11 12" for name, (r, w) in self.disks.items()]
        self.put("proc/diskstats", "\n".join(disks) + "\n")
        for kind, total in self.stalled.items():
            self.put(f"proc/pressure/{kind}", f"some avg10=1.00 avg60=2.00 avg300=3.00 total={total}\n"
                     "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")  # fmt: skip

    def reader(self):
        return HostReader(self.root, lambda: self.seconds)


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_shares_and_rates_between_two_readings(node):
    reader = node.reader()
    node.seconds += 10
    node.busy, node.stolen, node.idle, node.iowait = 1600, 1100, 1200, 1100  # of 1000 ticks
    node.net["eth0"] = [10**12 + 5 * 10**8, 10**9 + 10**7]
    node.net["bond0"][0] += 5 * 10**8
    node.net["lo"] = [10**12, 10**12]
    node.infiniband["mlx5_1"] = [25 * 10**8, 5 * 10**8]  # units of 4 bytes
    for disk in ("nvme0n1", "nvme0n1p1", "dm-0"):  # the same bytes three times
        node.disks[disk][0] += 10**6
        node.disks[disk][1] += 10**5
    node.stalled["io"] += 25 * 10**5
    node.stalled["memory"] += 10**5
    node.write()
    assert reader.read() == HostState(
        cpu=60.0,
        steal=10.0,
        load=7.11,
        available_gb=32.0,
        page_cache_gb=3.0,
        net_rx_mb_s=50.0,
        net_tx_mb_s=1.0,
        ib_rx_mb_s=1000.0,
        ib_tx_mb_s=200.0,
        disk_read_mb_s=51.2,
        disk_write_mb_s=5.12,
        cpu_pressure=0.0,
        memory_pressure=1.0,
        io_pressure=25.0,
        open_files=5,
    )
    node.seconds += 10
    idle = reader.read()  # nothing has moved: no rate, and no share of no time
    assert (idle.net_rx_mb_s, idle.disk_read_mb_s, idle.io_pressure, idle.cpu) == (0.0, 0.0, 0.0, None)


def test_counters_that_begin_anew_give_no_rate(node):
    reader = node.reader()
    node.seconds += 10
    node.net["eth0"] = [0, 0]
    del node.infiniband["mlx5_0"]
    node.write()
    state = reader.read()
    assert (state.net_rx_mb_s, state.net_tx_mb_s) == (None, None)
    node.seconds += 10
    assert reader.read().net_rx_mb_s == 0.0


def test_a_container_has_interfaces_without_cards(node):
    node.net = {"lo": [0, 0], "veth9": [0, 0]}
    node.write()
    reader = node.reader()
    node.seconds += 1
    node.net = {"lo": [10**9, 10**9], "veth9": [10**6, 2 * 10**6]}
    node.write()
    state = reader.read()
    assert (state.net_rx_mb_s, state.net_tx_mb_s) == (1.0, 2.0)


def test_a_system_that_tells_nothing(tmp_path):
    assert HostReader(tmp_path).read() == HostState()


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads /proc")  # noqa: PTH110
def test_of_this_machine(tmp_path):
    reader = HostReader()
    with contextlib.ExitStack() as stack:
        for number in range(20):
            stack.enter_context((tmp_path / str(number)).open("wb"))
        before = reader.read().open_files
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            pass
    state = reader.read()
    assert 0 < state.cpu <= 100 and 0 <= state.steal <= 100 and state.load > 0
    assert state.available_gb > 0 and state.page_cache_gb > 0
    assert state.available_gb * GB < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert before - 30 < state.open_files < before - 10  # other threads open files too
    for rate in (state.net_rx_mb_s, state.disk_write_mb_s, state.cpu_pressure):
        assert rate is None or rate >= 0
