"""What the benchmarks share: alternating rounds, tables in Markdown, and a line about machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "webdataset", "mosaicml-streaming", "litdata", "av", "pillow")


class Rounds:
    """Measurements by name, one per round. All are taken in turn in every round, so that they meet equal conditions."""

    def __init__(self, values: Mapping[str, Sequence[float]]) -> None:
        self.values = {name: list(measured) for name, measured in values.items()}

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.values[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.values[name]), max(self.values[name])

    def ratio(self, name: str, other: str) -> float:
        """The median over the rounds of `name` divided by `other` in the same round."""
        return statistics.median(a / b for a, b in zip(self.values[name], self.values[other], strict=True))

    def fastest(self, names: Sequence[str]) -> str:
        """The name with the largest median."""
        return max(names, key=self.median)


def alternate(measurements: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Take every measurement once per round, in turn, every second round backwards."""
    names = list(measurements)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            values[name].append(measurements[name]())
    return Rounds(values)


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; its columns are aligned for reading as they are."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n### {title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(padded)} |")


def count(value: float) -> str:
    """A whole number with separators of thousands."""
    return f"{value:,.0f}"


def span(values: tuple[float, float], form: Callable[[float], str] = count) -> str:
    """The smallest and the largest value."""
    return f"{form(values[0])} to {form(values[1])}"


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds, with three digits that matter."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> str:
    """One paragraph on the machine, the versions and the load, for the head of a result."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    versions = [f"{package} {version}" for package in PACKAGES if (version := _version(package))]
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}); Python {platform.python_version()}, "
        f"{', '.join(versions)}; torch threads {torch.get_num_threads()}; load average {load}"
    )


def _read(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def work_folder(path: str | None) -> Iterator[Path]:
    """The folder named by the user, which is kept, or a temporary one."""
    if path is not None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ardiff-benchmark-") as name:
        yield Path(name)


def bring_into_page_cache(folder: Path) -> None:
    """Read every file of a folder once."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                while stream.read(1 << 22):
                    pass


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system to forget the content of the files in a folder (not their names and sizes)."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # what has not been written yet cannot be dropped
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
