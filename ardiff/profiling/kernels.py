"""Which kernels take the time: torch's profiler over a few steps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ardiff.profiling.instruments import Traffic, attached
from ardiff.profiling.session import synchronize, train_step
from ardiff.profiling.timeline import Timeline
from ardiff.training.trainer import Trainer

STEPS = 2
TOP = 15


@dataclass(frozen=True)
class Kernel:
    """Time of one kernel (on a CPU: operator), without what it calls, per step."""

    name: str
    calls: float
    ms: float
    share: float  # of all kernels' time

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)


def own_microseconds(event: Any, on_gpu: bool) -> float:
    """What a row of torch's `key_averages` adds to the time of kernels, 0 for rows that are none.

    On a GPU the row of an operator repeats the time of the kernels that it starts, which have rows of their own.
    """
    if event.is_user_annotation or event.key.startswith(("part: ", "ProfilerStep")):
        return 0.0
    if on_gpu:
        return 0.0 if event.device_type == DeviceType.CPU else float(event.self_device_time_total)
    return float(event.self_cpu_time_total)


def kernels(trainer: Trainer, trace: Path | None, steps: int = STEPS) -> list[Kernel]:
    """The kernels of rank 0 that take longest (collective; empty elsewhere), with the parts of the step marked in the
    trace.

    trace: where to write it (.json.gz, for Perfetto, chrome://tracing or TensorBoard's profiler), None for none.
    """
    device, is_main = trainer.world.device, trainer.world.is_main
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    timeline = Timeline(device)
    timeline.names_in_trace = True
    with attached(trainer, timeline, Traffic()):
        train_step(trainer, timeline)  # the profiler's own start must not count
        synchronize(device)
        with profile(activities=activities) if is_main else nullcontext() as profiler:
            for _ in range(steps):
                train_step(trainer, timeline)
            synchronize(device)
    if not is_main:
        return []
    assert profiler is not None
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    found = []
    for event in profiler.key_averages():
        own = own_microseconds(event, on_gpu)
        if own > 0:
            found.append((event.key, event.count / steps, own / 1000 / steps))
    everything = sum(ms for _, _, ms in found)
    found.sort(key=lambda row: -row[2])
    return [Kernel(name, calls, ms, ms / everything) for name, calls, ms in found[:TOP]]
