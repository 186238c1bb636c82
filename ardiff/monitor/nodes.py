"""What each node of a run does: sampled beside training, summed up at reports, gathered from all nodes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ardiff.monitor.gpu import GpuState, Nvml
from ardiff.monitor.host import HostReader, HostState

log = logging.getLogger("ardiff")
PERIOD, FIRST = 5.0, 1.0  # seconds between samples, and to the first
MOST_SAMPLES = 1000  # of them between two reports; older ones are forgotten
SILENT = 60.0  # seconds without a sample, after which the last one is no news any more
SPREAD = ("min", "mean", "max")
LINES = 8  # GPUs or nodes of a run, up to which each has a line of its own in a chart

WORST = {"available_gb": min, "open_files": max}  # of a node's figures; of the others the mean counts
MEANS = ("utilization", "power_w", "sm_clock_mhz", "memory_clock_mhz")  # of a GPU's; of these the greatest:
GREATEST = ("temperature_c", "memory_used_gb", "ecc_corrected", "ecc_uncorrected", "retired_pages")
RARE = ("memory_clock_mhz", "ecc_corrected", "retired_pages")  # of these only ranks.jsonl tells
RATES = ("nvlink_rx_gb", "nvlink_tx_gb")  # what they grew by, per second


@dataclass(frozen=True)
class GpuSummary:
    """A GPU since the last report."""

    name: str | None = None
    uuid: str | None = None
    lost: str | None = None  # why it cannot be used any more
    throttled: dict[str, float] = field(default_factory=dict)  # reason -> share of the samples
    nvlinks_active: int | None = None  # the fewest
    figures: dict[str, float] = field(default_factory=dict)  # what it tells


@dataclass(frozen=True)
class NodeSummary:
    """A node since the last report; what it does not tell is missing."""

    host: dict[str, float]
    gpus: list[GpuSummary]
    silent: float = 0.0  # seconds for which no sample could be taken, if that is long


@dataclass(frozen=True)
class _Sample:
    seconds: float
    host: HostState
    gpus: list[GpuState]


class NodeSampler:
    """Samples this node every few seconds in a thread that waits for nothing of training's, nor training for it.

    A driver that hangs, as it may when a GPU falls off the bus, stops the samples and nothing else.

    nvml, num_gpus: of the first so many GPUs of it; None: none. period: seconds between samples. now: where the time
    (in seconds) comes from.
    """

    def __init__(
        self,
        nvml: Nvml | None,
        num_gpus: int,
        host: HostReader | None = None,
        period: float = PERIOD,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml, self._gpus = nvml, range(min(num_gpus, nvml.count) if nvml else 0)
        self._host, self._period = host or HostReader(), period
        self._now = now
        self._samples: deque[_Sample] = deque(maxlen=MOST_SAMPLES)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = False

    def start(self) -> None:
        """Begin to sample."""
        self._host.read()  # rates count from here
        self._thread = threading.Thread(target=self._run, name="node statistics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; a thread that a driver holds is left behind."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
            if not self._thread.is_alive() and self._nvml is not None:
                self._nvml.close()
            self._thread = None

    def report(self) -> NodeSummary | None:
        """All samples since the last report, or the last one again where there is no newer; None before the first."""
        with self._lock:
            samples = list(self._samples)
            while len(self._samples) > 1:
                self._samples.popleft()
        if not samples:
            return None
        silent = self._now() - samples[-1].seconds
        return NodeSummary({}, [], silent) if silent > SILENT else summary(samples[1:] or samples, samples[0])

    def _run(self) -> None:
        pause = min(FIRST, self._period)
        while not self._stop.wait(pause):
            pause = self._period
            try:
                self._sample()
                self._failed = False
            except Exception as error:  # statistics are not worth a run
                if not self._failed:
                    log.warning("no statistics of this node: %s: %s", type(error).__name__, error)
                self._failed = True

    def _sample(self) -> None:
        host = self._host.read()
        gpus = [self._nvml.read(index) for index in self._gpus] if self._nvml else []
        with self._lock:
            self._samples.append(_Sample(self._now(), host, gpus))


def summary(samples: list[_Sample], before: _Sample) -> NodeSummary:
    """What the samples of a node say together; growth is counted from the sample before them."""
    host = {}
    for figure in fields(HostState):
        values = _known(getattr(sample.host, figure.name) for sample in samples)
        if values:
            host[figure.name] = WORST.get(figure.name, _mean)(values)
    seconds = samples[-1].seconds - before.seconds
    gpus = zip(*(sample.gpus for sample in samples), strict=True)
    return NodeSummary(host, [_gpu(states, first, seconds) for states, first in zip(gpus, before.gpus, strict=True)])


def _gpu(states: tuple[GpuState, ...], before: GpuState, seconds: float) -> GpuSummary:
    found: dict[str, float] = {}
    for names, together in ((MEANS, _mean), (GREATEST, max)):
        for name in names:
            if values := _known(getattr(state, name) for state in states):
                found[name] = together(values)
    for name in RATES:
        then, now = getattr(before, name), getattr(states[-1], name)
        if then is not None and now is not None and now >= then and seconds > 0:
            found[f"{name}_s"] = (now - then) / seconds
    reasons = [state.throttle or () for state in states]
    words = sorted({word for each in reasons for word in each})
    if any(state.throttle is not None for state in states):
        found["throttled"] = 100 * _mean([float(bool(each)) for each in reasons])
    links = _known(state.nvlinks_active for state in states)
    return GpuSummary(
        name=_last(state.name for state in states),
        uuid=_last(state.uuid for state in (before, *states)),
        lost=states[-1].lost,
        throttled={word: _mean([float(word in each) for each in reasons]) for word in words},
        nvlinks_active=min(links) if links else None,
        figures=found,
    )


def by_name(reports: Iterable[tuple[str, NodeSummary | None]]) -> dict[str, NodeSummary]:
    """What the ranks gave (one of each node more than None), by the name of the host; several nodes of one name, as
    containers may be, are numbered.
    """
    found: dict[str, NodeSummary] = {}
    for name, node in reports:
        if node is not None:
            same = sum(other.partition("#")[0] == name for other in found)
            found[f"{name}#{same + 1}" if same else name] = node
    return found


def compact(nodes: Mapping[str, NodeSummary]) -> dict[str, Any]:
    """For metrics.jsonl: the figures of every node, of its GPUs [least, mean, greatest]; four digits."""
    lines = {}
    for name, node in nodes.items():
        gpu = {figure: _spread(values) for figure, values in _by_figure(node.gpus).items() if figure not in RARE}
        lines[name] = {figure: short(value) for figure, value in node.host.items()} | ({"gpu": gpu} if gpu else {})
    return lines


def every_gpu(nodes: Mapping[str, NodeSummary]) -> dict[str, Any]:
    """For ranks.jsonl: the figures of every GPU, node by node; four digits."""
    return {
        name: {
            figure: [short(gpu.figures[figure]) if figure in gpu.figures else None for gpu in node.gpus]
            for figure in _by_figure(node.gpus)
        }
        for name, node in nodes.items()
        if node.gpus
    }


def charts(nodes: Mapping[str, NodeSummary]) -> dict[str, float]:
    """For TensorBoard: tag -> value. A line for each GPU and node of a small run; of a larger one least, mean and
    greatest, so that the number of charts does not grow with it.
    """
    drawn: dict[str, float] = {}
    for group, rows in _rows(nodes).items():
        for figure, values in _columns(rows):
            few = len(rows) <= LINES
            lines = values if few else dict(zip(SPREAD, _three(list(values.values())), strict=True))
            drawn |= {f"{group}/{figure}/{name}": value for name, value in lines.items()}
    return drawn


def extremes(nodes: Mapping[str, NodeSummary]) -> str | None:
    """A table (Markdown) that names the GPU or node with the least and the greatest of every figure; None where the
    charts name all.
    """
    lines = []
    for group, rows in _rows(nodes).items():
        for figure, values in _columns(rows) if len(rows) > LINES else ():
            least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            cells = (f"{group} {figure}", least, values[least], _mean(list(values.values())), most, values[most])
            lines.append("| {} | {} | {:.4g} | {:.4g} | {} | {:.4g} |".format(*cells))
    head = "| figure | least at | least | mean | greatest at | greatest |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(lines) if lines else None


def _rows(nodes: Mapping[str, NodeSummary]) -> dict[str, dict[str, dict[str, float]]]:
    """Group -> name of a GPU or node -> its figures."""
    gpus = {f"{name}.{index}": gpu.figures for name, node in nodes.items() for index, gpu in enumerate(node.gpus)}
    return {"gpu": gpus, "host": {name: node.host for name, node in nodes.items()}}


def _columns(rows: dict[str, dict[str, float]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Figure, and its value at all that tell it."""
    for figure in dict.fromkeys(name for row in rows.values() for name in row):
        yield figure, {name: row[figure] for name, row in rows.items() if figure in row}


def _by_figure(gpus: list[GpuSummary]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for gpu in gpus for name in gpu.figures)
    return {name: [gpu.figures[name] for gpu in gpus if name in gpu.figures] for name in names}


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _last(values: Iterable[Any]) -> Any:
    known = _known(values)
    return known[-1] if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _three(values: list[float]) -> tuple[float, float, float]:
    return min(values), _mean(values), max(values)


def _spread(values: list[float]) -> list[float]:
    return [short(value) for value in _three(values)]


def short(value: float) -> float:
    """Four digits: what is measured is not known to more."""
    return float(f"{value:.4g}")
