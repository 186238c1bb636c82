"""Decode the videos of a corpus into shards of pictures, from which the AR-VAE is trained.

    python -m data_tools.shard_videos --corpus corpus.jsonl --out shards/ --size 256

The train split goes to --out, the validation split to --out/validation, each with its manifest.json. Frames are
scaled to a shorter side of --size and cropped to the centre square. Which video belongs to which shard follows from
the corpus and the settings alone, so a run that was killed and started again gives the same bytes.

Exit code 0: all videos are in the shards; 1: some could not be decoded any more and were left out, or a shard is
unfinished; 2: a mistake in the command.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ardiff import cli
from ardiff.data.corpus import SPLITS, CorpusEntry, classes, read_corpus, usable
from ardiff.data.shards import Sample, ShardEntry, finished_shard, write_manifest, write_shard
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.video import VideoError, decode, resize_and_crop
from data_tools.common import claim_folder, output_folder, require
from data_tools.pool import default_workers, run_in_processes

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
MAX_FRAMES = 100_000  # the names of a sample's pictures have five digits


@dataclass(frozen=True)
class FrameSettings:
    """How pictures are made; equal settings and sources give equal bytes."""

    size: int
    stride: int
    picture_format: str
    quality: int


@dataclass(frozen=True)
class ShardTask:
    """One shard that is to be written: its videos in order of their keys."""

    folder: Path
    name: str
    entries: tuple[CorpusEntry, ...]
    classes: tuple[str, ...]
    settings: FrameSettings


@dataclass(frozen=True)
class VideoReport:
    """What became of one video; `problem` says why it is not in the shard."""

    path: str
    problem: str | None = None


def plan_shards(entries: Sequence[CorpusEntry], stride: int, frames_per_shard: int) -> list[list[CorpusEntry]]:
    """Assign videos to shards of about that many pictures, mixed so that no shard holds just one class."""
    shards: list[list[CorpusEntry]] = []
    room = 0
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.id.encode()).digest()):
        frames = -(-entry.num_frames // stride)
        if not shards or frames > room:
            shards.append([])
            room = frames_per_shard
        shards[-1].append(entry)
        room -= frames
    return [sorted(shard, key=lambda entry: entry.id) for shard in shards]


def make_sample(entry: CorpusEntry, settings: FrameSettings, class_names: Sequence[str]) -> Sample:
    """Decode one video into the sample of a shard. Raises VideoError when it is not what the corpus lists."""
    path = unchanged(entry)
    if entry.num_frames > MAX_FRAMES * settings.stride:
        raise VideoError(path, f"has more than {MAX_FRAMES} frames; choose a larger --stride")
    members: dict[str, bytes] = {}
    for frame in decode(path, entry.first_frame, entry.num_frames, settings.stride):
        members[f"{len(members):05d}.{settings.picture_format}"] = _picture(frame, settings)
    info = {**video_info(entry, class_names), "num_frames": len(members), "stride": settings.stride}
    return Sample(entry.id, info, members)


def unchanged(entry: CorpusEntry) -> Path:
    """The file of a corpus entry. Raises VideoError if it is not the one that was scanned."""
    path = Path(entry.path)
    try:
        digest = sha256(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from error
    if digest != entry.sha256:
        raise VideoError(path, "has changed since it was scanned; run data_tools.scan_videos again")
    return path


def video_info(entry: CorpusEntry, class_names: Sequence[str]) -> dict[str, Any]:
    """What the description of a sample says of its source."""
    return {
        "id": entry.id,
        "path": entry.path,
        "sha256": entry.sha256,
        "fps": entry.fps,
        "first_frame": entry.first_frame,
        "width": entry.width,
        "height": entry.height,
        "label": entry.label,
        "class": None if entry.label is None else list(class_names).index(entry.label),
        "caption": entry.caption,
    }


def _picture(frame: np.ndarray, settings: FrameSettings) -> bytes:
    buffer = io.BytesIO()
    # Full chroma resolution: halving it a second time, after scaling down, would blur small coloured things.
    how = {"jpg": {"quality": settings.quality, "subsampling": 0}, "webp": {"quality": settings.quality}}
    image = Image.fromarray(resize_and_crop(frame, settings.size))
    image.save(buffer, format=FORMATS[settings.picture_format], **how.get(settings.picture_format, {}))
    return buffer.getvalue()


def make_shard(task: ShardTask, report: Callable[[VideoReport], None]) -> None:
    """Write one shard without the videos that cannot be decoded, reporting on each video."""

    def samples() -> Iterator[Sample]:
        for entry in task.entries:
            try:
                sample = make_sample(entry, task.settings, task.classes)
            except VideoError as error:
                report(VideoReport(entry.path, error.reason))
                continue
            report(VideoReport(entry.path))
            yield sample

    stream = samples()
    first = next(stream, None)
    if first is not None:
        write_shard(task.folder, task.name, chain([first], stream))
    else:  # nothing is left of this shard: an earlier version of it must not stay
        for suffix in ("done.json", "index.npy", "tar"):
            (task.folder / f"{task.name}.{suffix}").unlink(missing_ok=True)


def run_tasks(tasks: Sequence[ShardTask], workers: int, timeout: float) -> tuple[list[str], list[str]]:
    """Write the shards that are not yet complete, in parallel; returns lines on skipped videos and on failed shards."""
    unfinished = [task for task in tasks if _finished(task) is None]
    total = sum(len(task.entries) for task in tasks)
    skipped: list[str] = []
    unwritten: list[str] = []
    with tqdm(
        total=total,
        initial=total - sum(len(task.entries) for task in unfinished),
        unit="videos",
        disable=None,
    ) as bar:
        for event in run_in_processes(make_shard, unfinished, workers, timeout):
            if event.failure:
                task = unfinished[event.item]
                unwritten.append(f"{task.folder / task.name}.tar: {event.failure}")
            elif not event.done:
                bar.update()
                if event.value.problem:
                    skipped.append(f"{event.value.path}: {event.value.problem}")
    return sorted(skipped), sorted(unwritten)


def _finished(task: ShardTask) -> ShardEntry | None:
    """The entry of a complete shard; one that had to do without a video is tried again."""
    entry = finished_shard(task.folder, task.name)
    return entry if entry is not None and entry.samples == len(task.entries) else None


def _finish_split(tasks: Sequence[ShardTask], details: dict[str, Any]) -> str:
    """Write the manifest of one folder; returns a line about it."""
    shards = [shard for task in tasks if (shard := finished_shard(task.folder, task.name))]
    folder = tasks[0].folder
    manifest = write_manifest(folder, "frames", shards, list(tasks[0].classes), details)
    videos = sum(shard.samples for shard in shards)
    return f"{folder}: {videos} videos, {manifest.num_frames} frames, {len(shards)} shards"


def common_fps(entries: Sequence[CorpusEntry]) -> str | None:
    """The frame rate of the sources if they all have the same."""
    rates = {entry.fps for entry in entries}
    return rates.pop() if len(rates) == 1 else None


def _parse(arguments: list[str] | None) -> Any:
    parser = cli.parser(
        "Decode the videos of a corpus into shards of pictures for the AR-VAE.",
        "python -m data_tools.shard_videos --corpus corpus.jsonl --out shards/ --size 256",
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="made by scan_videos")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels (default %(default)s)")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame (default %(default)s)")
    parser.add_argument("--format", choices=sorted(FORMATS), default="jpg", help="(default %(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="of jpg and webp, 1 to 100 (default %(default)s)")
    parser.add_argument(
        "--frames_per_shard", type=int, default=2048, help="about 70 MB at 256 pixels (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds after which a video is given up (default %(default)g)"
    )
    options = parser.parse_args(arguments)
    for name in ("size", "stride", "frames_per_shard", "workers", "timeout"):
        require(f"--{name}", getattr(options, name), 1)
    require("--quality", options.quality, 1, 100)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    options = _parse(arguments)
    corpus = read_corpus(options.corpus)
    entries = usable(options.corpus, corpus)
    if not any(entry.split == "train" for entry in entries):
        raise UserError(f"{options.corpus}: all videos are in the validation split; none is left to train on")
    settings = FrameSettings(options.size, options.stride, options.format, options.quality)
    details = {**vars(settings), "corpus_sha256": sha256(options.corpus)}
    out = output_folder(options.out)
    claim_folder(out, {**details, "frames_per_shard": options.frames_per_shard}, results="**/*.tar")

    tasks: dict[str, list[ShardTask]] = {}
    for split in SPLITS:
        chosen = [entry for entry in entries if entry.split == split]
        if not chosen:
            continue
        folder = out if split == "train" else output_folder(out / split)
        tasks[split] = [
            ShardTask(folder, f"frames-{number:06d}", tuple(shard), tuple(classes(corpus)), settings)
            for number, shard in enumerate(plan_shards(chosen, options.stride, options.frames_per_shard))
        ]
    skipped, unwritten = run_tasks([*chain(*tasks.values())], options.workers, options.timeout)
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    for line in unwritten:
        print(f"not written {line}", file=sys.stderr)
    if unwritten:
        print(f"{len(unwritten)} shards are not written, so there is no manifest; run again", file=sys.stderr)
        return cli.EXIT_FAILURE
    for split, of_split in tasks.items():
        fps = common_fps([entry for entry in entries if entry.split == split])
        print(_finish_split(of_split, {**details, "split": split, "fps": fps}))
    if skipped:
        print(f"{len(skipped)} videos skipped", file=sys.stderr)
        return cli.EXIT_FAILURE
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
