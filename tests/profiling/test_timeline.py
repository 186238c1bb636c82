"""The stop-watch that is always in one part: nesting, relabelling, steps; with a fake GPU too."""

import pytest
import torch

from ardiff.profiling import timeline
from ardiff.profiling.timeline import BACKWARD, COPY, DATA, PARTS, REDUCTION, REST, Timeline


class Time:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    found = Time()
    monkeypatch.setattr(timeline, "time", found)
    return found


def one_step(watch, time):
    with watch.step():
        time.now += 0.001
        with watch.part(DATA):
            time.now += 0.002
        with watch.part(BACKWARD):
            time.now += 0.010
            with watch.part(REDUCTION):
                time.now += 0.004
            time.now += 0.020
        watch.relabel(COPY)
        time.now += 0.005


def test_inner_parts_do_not_count_for_outer_ones(time):
    watch = Timeline(torch.device("cpu"))
    one_step(watch, time)
    time.now += 100  # between steps nothing counts
    one_step(watch, time)
    first, second = watch.take()
    assert first == pytest.approx(second)
    expected = {DATA: 2, BACKWARD: 30, REDUCTION: 4, REST: 1, COPY: 5}
    assert first == pytest.approx({name: expected.get(name, 0) for name in PARTS})
    assert watch.take() == []


def test_nothing_is_marked_outside_steps(time):
    watch = Timeline(torch.device("cpu"))
    with watch.part(DATA):
        watch.relabel(REST)
        time.now += 1
    assert watch.take() == []


def test_a_step_that_fails_leaves_none_behind(time):
    watch = Timeline(torch.device("cpu"))
    with pytest.raises(KeyError), watch.step(), watch.part(DATA):
        raise KeyError
    assert watch.take() == [] and not watch.running
    one_step(watch, time)
    assert sum(watch.take()[0].values()) == pytest.approx(42)


def test_on_a_gpu_events_are_recorded_in_the_stream_that_computes(monkeypatch, time):
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            recorded.append(stream)
            self.at = time.now

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    class Stream:
        waited = 0

        def synchronize(self):
            self.waited += 1

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    watch = Timeline(torch.device("cuda", 0))
    one_step(watch, time)
    assert stream.waited == 0  # nothing waits for the device in a step
    found = watch.take()[0]
    assert found[BACKWARD] == pytest.approx(30) and found[REDUCTION] == pytest.approx(4)
    assert stream.waited == 1 and set(recorded) == {stream}
