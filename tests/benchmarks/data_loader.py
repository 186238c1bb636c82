"""Our loader against np.memmap, webdataset, mosaicml-streaming and litdata, in one process and one run.

    python -m tests.benchmarks.data_loader [--num_videos 12000] [--rounds 5] [--seconds 1] [--work DIR] [--quick]

Videos of 200 frames, clips of 16 frames at a random start, batches of 16, the page cache warm. The readers take turns
in every round; libraries that are not installed are left out. Ends with exit code 1 when the order is not what it must
be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ardiff.data.mixture import open_data
from ardiff.diffusion.timesteps import draw_from_seeds
from ardiff.randomness import Stream, hashed, normals
from tests.benchmarks.common import (
    Rounds,
    alternate,
    bring_into_page_cache,
    count,
    machine,
    print_table,
    seconds_of,
    span,
    work_folder,
)
from tests.benchmarks.latent_sets import (
    FRAMES,
    VIDEO_BYTES,
    latents_of,
    write_litdata,
    write_mds,
    write_npy,
    write_shards,
    written_once,
)
from tests.benchmarks.order_checks import run_checks
from tests.benchmarks.other_readers import installed, litdata_readers, streaming_readers, webdataset_readers
from tests.benchmarks.readers import BATCH, CROP, Reader, configuration, memmap_readers, our_reader, training_clips

OURS = "ardiff"
AIMS = (("np.memmap", 0.7), ("webdataset", 5.0), ("mosaicml-streaming", 8.0))  # ours must be this many times as fast


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sets, check the order, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_videos", type=int, default=12000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every reader in every round, about")
    parser.add_argument("--work", help="folder for the data, which is kept (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="480 videos, 2 rounds: only to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.num_videos, options.rounds, options.seconds = 480, 2, 0.05
    torch.set_num_threads(1)
    with work_folder(options.work) as work:
        folder = work / f"{options.num_videos}-videos"
        folder.mkdir(exist_ok=True)
        return _measure(folder, options.num_videos, options.rounds, options.seconds)


def _measure(folder: Path, num_videos: int, rounds: int, seconds: float) -> int:
    shards = written_once(folder / "shards", lambda path: write_shards(path, num_videos))
    array = written_once(folder / "latents.npy", lambda path: write_npy(path, num_videos))
    print(f"{num_videos:,} videos of {FRAMES} frames, {num_videos * VIDEO_BYTES / 1e6:,.0f} MB; {machine()}")
    visits = num_videos * (FRAMES // CROP)
    config = configuration(shards)
    groups = {
        OURS: [our_reader("ardiff", config, visits // BATCH)],
        "np.memmap": memmap_readers(array, visits // BATCH),
        "webdataset": webdataset_readers([str(path) for path in sorted(shards.glob("*.tar"))]),
        **_optional(folder, num_videos),
    }
    bring_into_page_cache(folder)
    measured = _rounds([reader for group in groups.values() for reader in group], rounds, seconds)
    _print_readers(groups, measured)
    _print_aims(groups, measured)
    _print_costs(shards, visits // BATCH, rounds, seconds)
    checks = run_checks(shards, array)
    print_table(
        "Order", ("check", "result", "seen"), [(c.name, "holds" if c.holds else "FAILS", c.detail) for c in checks]
    )
    print(f"\n{machine()}")
    return 0 if all(check.holds for check in checks) else 1


def _optional(folder: Path, num_videos: int) -> dict[str, list[Reader]]:
    """The readers of libraries that need not be there."""
    groups: dict[str, list[Reader]] = {}
    libraries: tuple[tuple[str, str, str, Callable, Callable], ...] = (
        ("mosaicml-streaming", "streaming", "mds", write_mds, streaming_readers),
        ("litdata", "litdata", "litdata", write_litdata, litdata_readers),
    )
    for name, module, short, write, make in libraries:
        if not installed(module):
            print(f"{name}: not installed")
            continue
        groups[name] = make(
            {
                as_array: written_once(
                    folder / f"{short}-{kind}", partial(write, num_videos=num_videos, as_array=as_array)
                )
                for as_array, kind in ((False, "bytes"), (True, "ndarray"))
            }
        )
    return groups


def _rounds(readers: Sequence[Reader], rounds: int, seconds: float) -> Rounds:
    """Measure them in turn, after a round that only warms caches."""
    for reader in readers:
        reader.clips_per_second(min(seconds, 0.1))
        reader.per_cpu_second.clear()
    return alternate({r.name: partial(r.clips_per_second, seconds) for r in readers}, rounds)


def _print_readers(groups: dict[str, list[Reader]], measured: Rounds) -> None:
    ours = groups[OURS][0].name
    rows = [
        (
            reader.name,
            count(measured.median(reader.name)),
            span(measured.spread(reader.name)),
            count(float(np.median(reader.per_cpu_second))),
            f"{measured.ratio(ours, reader.name):.2f}",
            reader.shuffle,
        )
        for group in groups.values()
        for reader in group
    ]
    header = ("reader", "clips/s", "range", "clips per CPU second", "ardiff / this", "shuffle")
    print_table("Readers, latents only", header, rows)


def _print_aims(groups: dict[str, list[Reader]], measured: Rounds) -> None:
    """Ours against the anchor of each group: the first of np.memmap, the fastest of a library."""
    rows = []
    for name, aim in AIMS:
        if name not in groups:
            continue
        names = [
            reader.name for reader in groups[name] if "12 clips" not in reader.name and "number" not in reader.name
        ]
        anchor = names[0] if name == "np.memmap" else measured.fastest(names)
        ratio = measured.ratio(groups[OURS][0].name, anchor)
        rows.append((anchor, f"{ratio:.2f}", f"{aim:g}", "met" if ratio >= aim else "missed"))
    print_table("Aims", ("ardiff against", "ratio", "aim", "result"), rows)


def _print_costs(shards: Path, num_batches: int, rounds: int, seconds: float) -> None:
    """What the parts of our loader cost."""
    few = max(32, num_batches // 12)
    readers = [
        our_reader("latents only", configuration(shards), num_batches),
        our_reader("latents only, prefetch 16", configuration(shards, "data.prefetch=16"), num_batches),
        our_reader("latents only, without the thread", configuration(shards), num_batches, thread=False),
        our_reader("latents only, order lanes", configuration(shards, "data.order=lanes"), num_batches),
        our_reader("latents only, data.verify", configuration(shards, "data.verify=true"), few),
        our_reader("training batch", configuration(shards), few, full=True),
        our_reader("training batch, without the thread", configuration(shards), few, full=True, thread=False),
        our_reader("training batch, order lanes", configuration(shards, "data.order=lanes"), few, full=True),
    ]
    measured = _rounds(readers, rounds, seconds)
    rows = [
        (name, count(measured.median(name)), span(measured.spread(name)), f"{1e6 / measured.median(name):.1f}")
        for name in measured.values
    ]
    print_table("Our loader", ("what", "clips/s", "range", "us per clip"), rows)
    parts = alternate({name: partial(_per_clip, call) for name, call in _parts(shards).items()}, rounds)
    shares = [(name, f"{parts.median(name):.1f}", span(parts.spread(name), "{:.1f}".format)) for name in parts.values]
    print_table("Parts of a training batch, one thread", ("what", "us per clip", "range"), shares)


def _parts(shards: Path) -> dict[str, Callable[[], object]]:
    """The work on one batch beyond reading it, piece by piece."""
    config = configuration(shards)
    positions = np.arange(BATCH)
    latents = np.stack([latents_of(video, CROP) for video in range(BATCH)])
    noise = np.empty(latents.shape, np.float32)

    def draw_noise() -> None:
        for i, position in enumerate(positions.tolist()):
            noise[i] = normals(0, Stream.NOISE, position, noise.shape[1:])

    def draw_timesteps(positions: np.ndarray) -> None:
        draw_from_seeds(config.diffusion.timesteps, hashed(0, Stream.TIMESTEPS, positions), CROP, 1000)

    space = training_clips(open_data(config, "latents", CROP), config).space
    return {
        "noise (2,048 normal numbers from a counter)": draw_noise,
        f"timesteps ({config.diffusion.timesteps}, {CROP} of them)": lambda: draw_timesteps(positions),
        f"normalisation ({space.normalize}) to float32": lambda: space.to_model(latents),
        "for comparison: noise of a whole batch from torch's generator": lambda: torch.randn(noise.shape),
    }


def _per_clip(call: Callable[[], object], repeats: int = 200) -> float:
    """Microseconds per clip."""
    return 1e6 * seconds_of(lambda: [call() for _ in range(repeats)]) / (repeats * BATCH)


if __name__ == "__main__":
    sys.exit(main())
