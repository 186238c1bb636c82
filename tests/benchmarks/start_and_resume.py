"""How long the loader takes to start on 1,000 shards, and to its first batch at sample 0 and at sample 100,000,000.

    python -m tests.benchmarks.start_and_resume [--num_shards 1000] [--rounds 7] [--work DIR] [--quick]

Two sets: small shards of 20 short videos, and the index of 1,000 videos of 200 frames per shard over hollow tars (a
million videos without their 51 GB). The cold page cache is that of the files' content; names and sizes stay known.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ardiff.config import Config
from ardiff.data.mixture import Mixture, open_data
from ardiff.data.stream import BatchStream
from tests.benchmarks.common import (
    alternate,
    drop_from_page_cache,
    machine,
    milliseconds,
    print_table,
    seconds_of,
    span,
    work_folder,
)
from tests.benchmarks.latent_sets import write_hollow_shards, write_shards, written_once
from tests.benchmarks.readers import BATCH, CROP, configuration, training_clips

FAR = 100_000_000
AIM = 1.0  # seconds that a resume may cost more than a cold start


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both sets and measure them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_shards", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", help="folder for the data, which is kept (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="20 shards, 2 rounds: only to see that it runs")
    options = parser.parse_args(arguments)
    shards, rounds = (20, 2) if options.quick else (options.num_shards, options.rounds)
    torch.set_num_threads(1)
    with work_folder(options.work) as work:
        small = written_once(work / f"{shards}-small-shards", lambda path: write_shards(path, shards * 20, 20, CROP))
        large = written_once(work / f"{shards}-large-shards", lambda path: write_hollow_shards(path, shards, 1000))
        sets = {f"{shards} shards, {shards * 20:,} videos": small, f"{shards} shards, {shards * 1000:,} videos": large}
        print(machine())
        _print_start(sets, rounds)
        slower = max(_print_resume(name, folder, rounds) for name, folder in sets.items())
    print(f"\nslowest resume: {slower:+.3f} s against a start at 0 (aim: under {AIM:g} s more)\n\n{machine()}")
    return 0 if slower < AIM else 1


def _print_start(sets: dict[str, Path], rounds: int) -> None:
    """Time of `open_data`: manifest, every index against its checksum, every tar's size, the order."""
    measurements: dict[str, Callable[[], float]] = {}
    for name, folder in sets.items():
        config = configuration(folder)
        measurements[f"{name}, warm"] = partial(_warm, config)
        measurements[f"{name}, cold"] = partial(_cold, folder, config)
    for measure in measurements.values():
        measure()
    found = alternate(measurements, rounds)
    rows = [(name, milliseconds(found.median(name)), span(found.spread(name), milliseconds)) for name in found.values]
    print_table("Start: open_data", ("data, page cache", "ms", "range"), rows)


def _warm(config: Config) -> float:
    return seconds_of(lambda: open_data(config, "latents", CROP))


def _cold(folder: Path, config: Config) -> float:
    drop_from_page_cache(folder)
    return _warm(config)


def _print_resume(name: str, folder: Path, rounds: int) -> float:
    """Time to the first batch, from the shards' folder and from open data; returns the largest difference to 0."""
    rows, slower = [], -float("inf")
    for order in ("global", "lanes"):
        found, more = _resume(configuration(folder, f"data.order={order}"), rounds)
        slower = max(slower, more)
        rows += [(f"{order}, {row[0]}", *row[1:]) for row in found]
    header = (
        "order, first batch at",
        "from the folder, ms",
        "range",
        "more than at 0, ms",
        "from open data, ms",
        "range",
    )
    print_table(f"Resume: to the first training batch of {BATCH}, {name}", header, rows)
    return slower


def _resume(config: Config, rounds: int) -> tuple[list[tuple[str, ...]], float]:
    """Rows of the table for one order, and the largest difference to a start at 0."""
    data = open_data(config, "latents", CROP)
    last = FAR // data.visits_per_epoch * data.visits_per_epoch // BATCH * BATCH - BATCH
    places = {"sample 0": 0, f"sample {FAR:,}": FAR, f"end of an epoch, sample {last:,}": last}
    whole = alternate({place: partial(_from_folder, config, at) for place, at in places.items()}, rounds)
    opened = alternate({place: partial(_from_open, config, data, at) for place, at in places.items()}, rounds)
    first = whole.values["sample 0"]
    more = {
        place: statistics.median(b - a for a, b in zip(first, whole.values[place], strict=True)) for place in places
    }
    rows: list[tuple[str, ...]] = [
        (
            place,
            milliseconds(whole.median(place)),
            span(whole.spread(place), milliseconds),
            f"{1000 * more[place]:+.1f}",
            milliseconds(opened.median(place)),
            span(opened.spread(place), milliseconds),
        )
        for place in places
    ]
    return rows, max(more.values())


def _from_folder(config: Config, position: int) -> float:
    """What a run waits for: opening the data as well."""
    start = time.perf_counter()
    data = open_data(config, "latents", CROP)
    return time.perf_counter() - start + _from_open(config, data, position)


def _from_open(config: Config, data: Mixture, position: int) -> float:
    start = time.perf_counter()
    stream = BatchStream(
        data,
        training_clips(data, config),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        position=position,
        prefetch=config.data.prefetch,
    )
    batch = next(stream)
    elapsed = time.perf_counter() - start
    stream.close()
    assert batch.position == position
    return elapsed


if __name__ == "__main__":
    sys.exit(main())
