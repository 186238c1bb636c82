"""Times of a rank's own work, and which rank is slow."""

import time

import pytest
import torch

from ardiff.monitor.stragglers import StepTimes, Straggler, StragglerWatch, slowest


def row(forward, wait=0.0):
    return {"forward_ms": forward, "data_wait_ms": wait}


def hosts(count):
    return [f"node-{rank // 2:02d}" for rank in range(count)]


def test_forward_passes_are_timed_per_step():
    times = StepTimes(torch.device("cpu"))
    for _ in range(2):  # steps of two micro-batches
        for _ in range(2):
            with times.forward():
                time.sleep(0.02)
            time.sleep(0.03)  # backward
    found = times.report(2, data_wait=0.005)
    assert found["forward_ms"] == pytest.approx(40, abs=15)
    assert found["data_wait_ms"] == pytest.approx(5)
    assert times.report(1, 0.0) == row(0.0)  # a new interval
    assert times.report(0, 0.0) == row(0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_passes_are_timed_on_a_gpu():
    times, value = StepTimes(torch.device("cuda")), torch.ones(4096, 4096, device="cuda")
    for _ in range(3):
        with times.forward():
            for _ in range(50):
                value = value @ value * 1e-4
    assert times.report(3, 0.0)["forward_ms"] >= 0  # does not wait for the passes that run
    torch.cuda.synchronize()
    for _ in range(2):
        with times.forward():
            value @ value
    torch.cuda.synchronize()
    assert times.report(1, 0.0)["forward_ms"] > 0
    assert not times._pending
    assert 0 < len(times._unused) <= 5


class Device:
    """Events of a device that works through its stream when told to."""

    def __init__(self, monkeypatch):
        self.clock, self.done, self.made = 0.0, 0, 0
        self.recorded = []
        device = self

        class Event:
            def __init__(self):
                device.made += 1

            def record(self):
                device.clock += 7.0
                self.at, self.number = device.clock, len(device.recorded)
                device.recorded.append(self)

            def query(self):
                return self.number < device.done

            def elapsed_time(self, end):
                assert self.query() and end.query()
                return end.at - self.at

        monkeypatch.setattr("ardiff.monitor.stragglers._event", Event)


def test_what_a_device_has_not_finished_counts_later(monkeypatch):
    device = Device(monkeypatch)
    times = StepTimes(torch.device("cuda"))
    for _ in range(4):
        with times.forward():
            pass
    device.done = 5  # two passes, and the beginning of the third
    assert times.report(2, 0.0) == row(7.0)
    device.done = 8
    assert times.report(1, 0.0) == row(14.0)
    for _ in range(4):
        with times.forward():
            pass
    assert device.made == 8  # events are used again
    device.done = 16
    assert times.report(4, 0.0) == row(7.0)


def test_the_slowest_rank_is_named():
    rows = [row(115, 5), row(118, 4), row(110, 6), row(110, 70), row(112, 5), row(117, 5)]
    found = slowest(rows, hosts(6))
    assert found == Straggler(3, "node-01", 180, 120, "data wait", 70, 5)
    assert found.ratio == pytest.approx(1.5)
    assert found.describe() == (
        "slowest rank 3 (node-01): 180 ms of its own work per step, median 120 ms (data wait 70 ms, median 5 ms)"
    )
    rows[3] = row(175, 5)
    found = slowest(rows, hosts(6))
    assert (found.slow_in, found.part_ms, found.part_median_ms) == ("forward", 175, 115)


def test_of_two_ranks_one_is_compared_with_the_other():
    found = slowest([row(100), row(150)], hosts(2))
    assert (found.rank, found.median_ms, found.ratio) == (1, 100, 1.5)


def test_one_rank_has_nobody_to_be_compared_with():
    assert slowest([row(100)], hosts(1)) is None
    assert slowest([row(0), row(0)], hosts(2)) is None
    assert StragglerWatch().see(None) is None


def straggler(rank, own=130.0, median=100.0):
    return Straggler(rank, "node", own, median, "forward", own, median)


class Minutes:
    """A clock that goes on by a minute whenever it is read."""

    time = 0.0

    def __call__(self) -> float:
        self.time += 60
        return self.time


def test_what_lasts_less_than_half_a_minute_is_no_straggler():
    times = iter(range(0, 100, 3))  # seconds: a report every three
    watch = StragglerWatch(now=lambda: float(next(times)))  # read at the first, and from the third report on
    assert [number for number in range(1, 20) if watch.see(straggler(1))] == [12]


def test_a_straggler_is_told_after_three_reports_and_then_ever_more_rarely():
    watch = StragglerWatch(Minutes())
    said = [watch.see(straggler(1)) for _ in range(30)]
    assert [number for number, line in enumerate(said, 1) if line] == [3, 6, 12, 24]
    assert said[2] == straggler(1).describe()


@pytest.mark.parametrize(
    "other", [straggler(2), straggler(1, own=120.0), None], ids=["another rank", "not that slow", "none"]
)
def test_a_straggler_must_be_one_all_the_time(other):
    watch = StragglerWatch(Minutes())
    assert [watch.see(each) for each in (straggler(1), straggler(1), other, straggler(1), straggler(1))] == [None] * 5
    assert watch.see(straggler(1))


def test_ranks_that_take_turns_are_no_stragglers():
    watch = StragglerWatch(Minutes())
    assert [watch.see(straggler(number % 2)) for number in range(20)] == [None] * 20


def test_jitter_of_short_steps_is_no_straggler():
    watch = StragglerWatch(Minutes())
    assert [watch.see(straggler(1, own=1.9, median=1.0)) for _ in range(9)] == [None] * 9
