"""How fast videos become shards: strict decoding against plain PyAV, scanning, frame shards, latents.

    python -m tests.benchmarks.data_preparation [--frames 200] [--rounds 3] [--work DIR] [--quick]

Procedural H.264 clips at 64x64 and 256x256. Decoding is timed in this process. The tools are run as a user runs them;
what they need to start is measured on a list of one video and taken off. Every process computes on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import torch
from safetensors.torch import save_file

from ardiff.config import load, to_yaml
from ardiff.data.corpus import read_corpus
from ardiff.models import ARVAE
from ardiff.video import check, decode
from tests.benchmarks.common import alternate, count, machine, print_table, seconds_of, span, work_folder
from tests.benchmarks.latent_sets import written_once

REPOSITORY = Path(__file__).resolve().parents[2]
VIDEOS = {64: 240, 256: 72}  # by the side of a frame


@dataclass
class Clips:
    """The videos of one size, listed: all of them, and one."""

    size: int
    folder: Path
    files: list[Path]
    frames: int  # of a video
    corpus: Path
    corpus_of_one: Path

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.size}x{self.size}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the videos, then measure every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200, help="of a video")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="folder for the videos, which is kept (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="6 videos of 16 frames: only to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.frames, options.rounds = 16, 1
    torch.set_num_threads(1)
    with work_folder(options.work) as work:
        print(machine())
        sizes = {64: 6} if options.quick else VIDEOS
        sets = [_make(work, size, number, options.frames) for size, number in sizes.items()]
        _print_decoding(sets, options.rounds)
        _print_tools(sets, work / "output", options.rounds, options.quick)
    print(f"\n{machine()}")
    return 0


def _make(work: Path, size: int, num_videos: int, frames: int) -> Clips:
    """Procedural videos of one size and their lists."""
    folder = work / f"{num_videos}-clips-{size}px-{frames}-frames"

    def write(path: Path) -> None:
        numbers = ["--num_videos", str(num_videos), "--num_frames", str(frames), "--size", str(size)]
        _tool("make_demo_corpus", "--out", str(path / "videos"), *numbers)
        _tool("scan_videos", str(path / "videos"), "--out", str(path / "corpus.jsonl"))
        lines = (path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
        train = [line for line in lines if json.loads(line)["split"] == "train"]
        (path / "one.jsonl").write_text(train[0] + "\n", encoding="utf-8")

    written_once(folder, write)
    files = sorted(path for path in (folder / "videos").rglob("*") if path.suffix == ".mp4")
    return Clips(size, folder, files, frames, folder / "corpus.jsonl", folder / "one.jsonl")


def _tool(program: str, *arguments: str) -> None:
    """Run a program as a user does; its output is shown only when it fails."""
    command = [sys.executable, "-m", f"data_tools.{program}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _print_decoding(sets: Sequence[Clips], rounds: int) -> None:
    """Frames per second of one process: ours, and PyAV as it is, which conceals damage."""
    rows = []
    for clips in sets:
        steps: dict[str, Callable[[Path], object]] = {
            "strict, to RGB": lambda path: sum(1 for _ in decode(path)),
            "strict, without conversion": check,
            "PyAV, to RGB": lambda path: _plain(path, convert=True),
            "PyAV, without conversion": lambda path: _plain(path, convert=False),
        }
        chosen = clips.files[:: max(1, len(clips.files) // 24)]
        total = clips.frames * len(chosen)
        for step in steps.values():
            step(chosen[0])
        found = alternate({name: partial(_rate, step, chosen, total) for name, step in steps.items()}, rounds)
        rows += [
            (
                f"{clips.name}, {name}",
                count(found.median(name)),
                span(found.spread(name)),
                f"{found.ratio(name, 'PyAV, to RGB'):.2f}",
            )
            for name in found.values
        ]
    print_table("Decoding, one process", ("what", "frames/s", "range", "times PyAV to RGB"), rows)


def _rate(step: Callable[[Path], object], files: Sequence[Path], frames: int) -> float:
    return frames / seconds_of(lambda: [step(path) for path in files])


def _plain(path: Path, convert: bool) -> int:
    frames = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if convert:
                frame.to_ndarray(format="rgb24")
            frames += 1
    return frames


def _print_tools(sets: Sequence[Clips], output: Path, rounds: int, quick: bool) -> None:
    """Throughput of the programs."""
    rows = []
    for clips in sets:
        steps = _steps(clips, output, quick)
        found = alternate({name: run for name, (run, _) in steps.items()}, rounds)
        rows += [
            (f"{clips.name}, {name}", count(found.median(name)), span(found.spread(name)), unit)
            for name, (_, unit) in steps.items()
        ]
    print_table("Programs" + (", start included" if quick else ""), ("what", "rate", "range", "unit"), rows)


def _steps(clips: Clips, output: Path, quick: bool) -> dict[str, tuple[Callable[[], float], str]]:
    """What is measured of one size: a rate, and its unit. Quick: without taking off the start."""
    entries = [entry for entry in read_corpus(clips.corpus) if entry.ok]
    frames = sum(entry.num_frames for entry in entries)

    def rate(
        whole: float, one: float, program: str, source: Sequence[str], of_one: Sequence[str], *flags: str
    ) -> float:
        """Work per second; `one` is the part of it that the list of one has."""
        seconds = _seconds(output, program, *source, *flags)
        if quick:
            return whole / seconds
        return (whole - one) / (seconds - _seconds(output, program, *of_one, *flags))

    def scan(workers: int) -> float:
        flags = ("--out", str(output / "corpus.jsonl"), "--workers", str(workers))
        sources = ([str(clips.folder / "videos")], [str(clips.files[0])])
        return rate(len(clips.files), 1, "scan_videos", *sources, *flags)

    def from_corpus(program: str, *flags: str) -> float:
        sources = (["--corpus", str(clips.corpus)], ["--corpus", str(clips.corpus_of_one)])
        return rate(frames, clips.frames, program, *sources, "--out", str(output / "shards"), *flags)

    steps: dict[str, tuple[Callable[[], float], str]] = {}
    for workers in (2,) if quick else (1, 2):
        flags = ("--size", str(clips.size), "--workers", str(workers))
        steps[f"scan_videos, {workers} workers"] = (partial(scan, workers), "files/s")
        steps[f"shard_videos, {workers} workers"] = (partial(from_corpus, "shard_videos", *flags), "frames/s")
    flags = ("--arvae", str(_untrained(clips)), "--device", "cpu")
    steps["extract_latents, arvae_tiny"] = (partial(from_corpus, "extract_latents", *flags), "frames/s")
    return steps


def _seconds(output: Path, program: str, *arguments: str) -> float:
    """Seconds that a program takes with an empty output folder."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return seconds_of(lambda: _tool(program, *arguments))


def _untrained(clips: Clips) -> Path:
    """An export of an auto-encoder that was never trained: as fast as any. 64 patches at either size."""
    folder = clips.folder / "arvae"
    folder.mkdir(exist_ok=True)
    config = load("arvae_tiny", [f"vae.image_size={clips.size}", f"vae.patch_size={clips.size // 8}"])
    save_file(ARVAE(config.vae).state_dict(), folder / "ema.safetensors")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
