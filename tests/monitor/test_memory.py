"""Memory of the process and of the groups around it, and the lines that warn of too little or of a leak."""

import mmap
import os
import platform

import numpy as np
import pytest
import torch

from ardiff.monitor.memory import GB, HostMemory, MemoryWatch, gpu_memory, host_memory

ON_LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
STATUS = "Name:\tpython\nVmRSS:\t 9000000 kB\nRssAnon:\t 3145728 kB\nRssFile:\t 4805696 kB\nRssShmem:\t 1048576 kB\n"
MEMINFO = (
    "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   33554432 kB\nHugePages_Total:   0\n"
)


def system(root, cgroup="0::/\n", **files):
    """A /proc and a /sys; the keys of `files` are paths below /sys/fs/cgroup."""
    for name, text in {"self/status": STATUS, "meminfo": MEMINFO, "self/cgroup": cgroup}.items():
        (root / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "proc" / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder, limit, usage, cache, names=("memory.max", "memory.current", "")):
    stat = f"anon 1\n{names[2]}inactive_file {cache // 2}\n{names[2]}active_file {cache - cache // 2}\n"
    return {f"{folder}{names[0]}": f"{limit}\n", f"{folder}{names[1]}": f"{usage}\n", f"{folder}memory.stat": stat}


def test_of_the_machine(tmp_path):
    assert host_memory(system(tmp_path)) == HostMemory(rss_gb=4.0, available_gb=32.0, total_gb=64.0)


def test_of_a_container(tmp_path):
    found = host_memory(system(tmp_path, **group("", 8 * GB, 6 * GB, 3 * GB)))
    assert found == HostMemory(rss_gb=4.0, available_gb=5.0, total_gb=8.0)  # page cache can be had back


def test_of_groups_within_one_another(tmp_path):
    outer, inner = group("job/", 16 * GB, 15 * GB, 0), group("job/step/", 20 * GB, 2 * GB, 0)
    root = system(tmp_path, "0::/job/step\n", **outer, **inner, **{"job/step/task/memory.max": "max\n"})
    assert host_memory(root) == HostMemory(rss_gb=4.0, available_gb=1.0, total_gb=16.0)


def test_of_an_older_control_group(tmp_path):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    files = {
        **group("memory/slurm/job/", 10 * GB, 4 * GB, GB, names),
        **group("memory/", 2**63 - 4096, 50 * GB, 0, names),
    }
    root = system(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/slurm/job\n0::/\n", **files)
    assert host_memory(root) == HostMemory(rss_gb=4.0, available_gb=7.0, total_gb=10.0)


def test_a_limit_above_the_machine_does_not_count(tmp_path):
    found = host_memory(system(tmp_path, **group("", 1000 * GB, 6 * GB, 0)))
    assert (found.available_gb, found.total_gb) == (32.0, 64.0)


def test_of_a_system_that_does_not_tell(tmp_path):
    assert host_memory(tmp_path) is None
    assert MemoryWatch(lambda: host_memory(tmp_path)).check() is None


@ON_LINUX
def test_of_this_process(tmp_path):
    before = host_memory()
    assert 0 < before.rss_gb < before.total_gb
    assert 0 < before.available_gb <= before.total_gb
    size, page = 200 * 2**20, os.sysconf("SC_PAGE_SIZE")
    # Anonymous pages of its own: an array may get memory that the allocator holds already.
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[::page] = b"1" * (size // page)
    after = host_memory()
    assert after.rss_gb - before.rss_gb == pytest.approx(size / GB, rel=0.2)
    path = tmp_path / "shard"
    path.write_bytes(held)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(mapped[::page].sum()) > 0  # every page is resident now
    assert host_memory().rss_gb - after.rss_gb < 0.25 * size / GB  # and none of them is its own


class Machine:
    """Memory and time that a test sets."""

    def __init__(self, rss=10.0, available=50.0, total=100.0):
        self.rss, self.available, self.total, self.seconds = rss, available, total, 0.0
        self.watch = MemoryWatch(lambda: HostMemory(self.rss, self.available, self.total), lambda: self.seconds)

    def run(self, hours, growth_per_hour=0.0, every=60.0):
        """What was said over so many hours."""
        said, steps = [], round(hours * 3600 / every)
        for _ in range(steps):
            self.seconds += every
            self.rss += growth_per_hour * every / 3600
            said.append(self.watch.check())
        return [line for line in said if line]


def test_nothing_is_said_of_a_steady_process():
    assert Machine().run(48) == []


def test_growth_while_it_settles_is_not_a_leak():
    machine = Machine()
    assert machine.run(0.5, growth_per_hour=20) == []
    assert machine.run(24) == []


def test_memory_held_for_a_while_is_not_a_leak():
    machine = Machine()
    machine.run(1)
    for _ in range(24):  # checkpoints
        machine.rss += 20
        assert machine.run(0.1) == []
        machine.rss -= 20
        assert machine.run(0.9) == []


def test_a_leak_is_told_whenever_it_has_doubled():
    machine = Machine(rss=10, available=50)
    machine.run(1)
    said = machine.run(80, growth_per_hour=0.25)
    assert len(said) == 4  # at 2, 4, 8 and 16 GiB
    assert said[0].startswith("host memory grows: this process holds 12.")
    assert "; at this rate the 50.0 GiB that are left last" in said[0]
    hours = float(said[-1].split()[-2])
    assert hours == pytest.approx(50 / 0.25, rel=0.1)


def test_a_small_process_may_grow_by_a_gigabyte():
    machine = Machine(rss=0.2)
    machine.run(1)
    assert machine.run(3.5, growth_per_hour=0.25) == []
    assert len(machine.run(2, growth_per_hour=0.25)) == 1


def test_low_memory_is_told_once_an_hour_or_when_half_of_it_is_gone():
    machine = Machine(available=5.0, rss=90.0)
    assert machine.watch.check() is None
    machine.available = 4.9
    assert machine.watch.check() == ("host memory runs low: 4.9 of 100.0 GiB are left, this process holds 90.0")
    assert machine.run(0.9) == []
    machine.available = 2.0
    assert "2.0 of 100.0" in machine.watch.check()
    assert machine.watch.check() is None
    assert len(machine.run(2.5)) == 2
    machine.available = 50.0
    assert machine.run(3) == []


def test_both_at_once_are_one_line():
    machine = Machine()
    machine.run(1.05)  # ends within a period
    machine.rss, machine.available = 20.0, 1.0
    machine.seconds += 3600  # a report an hour: each is a period of its own
    assert "grows" not in machine.watch.check()  # it may be for a while only
    machine.seconds += 3600
    line = machine.watch.check()
    assert line.startswith("host memory runs low")
    assert "; host memory grows" in line


def test_without_a_gpu():
    assert gpu_memory(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert gpu_memory() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_of_a_gpu():
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    found = gpu_memory(held.device)
    assert found["peak_memory_gb"] >= 64 / 1024
    assert found["peak_reserved_gb"] >= found["peak_memory_gb"]
    assert found["alloc_retries"] == 0
