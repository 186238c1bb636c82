"""Shards of pictures: which sources lie in each, and the processes that write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ardiff.data.corpus import CorpusEntry
from ardiff.data.shards import Sample, write_shard
from ardiff.video import VideoError, frames_at
from data_tools.pool import run_in_processes
from data_tools.sharding.decoding import unchanged
from data_tools.sharding.pictures import FrameSettings, encode_picture
from data_tools.sharding.progress import Progress
from data_tools.sharding.sampling import INFO_BYTES, Source, plan_shards, tar_bytes, video_info
from data_tools.sharding.tasks import complete_shard, forget_manifest, remove_shard

REPORT_EVERY = 100  # frames


@dataclass(frozen=True)
class ShardTask:
    """One shard that is to be written. The sources `without` brought down a process: they are left out."""

    folder: Path
    name: str
    sources: tuple[Source, ...]
    class_numbers: dict[str, int]
    settings: FrameSettings
    without: frozenset[str] = frozenset()

    @property
    def samples(self) -> int:
        """How many samples it has if nothing is left out."""
        return sum(len(source.segments) for source in self.sources)

    @property
    def frames(self) -> int:
        """How many pictures it has if nothing is left out."""
        return sum(self.settings.rate.count(entry) for source in self.sources for entry in source.segments)


@dataclass(frozen=True)
class AtHand:
    """A process reports which source it decodes from now on; None: it writes."""

    path: str | None


@dataclass(frozen=True)
class Skipped:
    """A process reports that a source could not be used."""

    path: str
    reason: str


def plan_tasks(
    folder: Path,
    entries: Sequence[CorpusEntry],
    numbers: dict[str, int],
    settings: FrameSettings,
    bytes_per_picture: int,
    target: float,
) -> list[ShardTask]:
    """The shards of one split, of about `target` bytes."""

    def size(entry: CorpusEntry) -> int:
        return INFO_BYTES + settings.rate.count(entry) * tar_bytes(bytes_per_picture)

    return [
        ShardTask(folder, f"frames-{number:06d}", tuple(sources), numbers, settings)
        for number, sources in enumerate(plan_shards(entries, size, target))
    ]


def make_samples(
    source: Source, settings: FrameSettings, numbers: dict[str, int], report: Callable[[int], None] = lambda _: None
) -> list[Sample]:
    """Decode a source once into the samples of its segments, reporting numbers of frames now and then.

    `numbers` are those of the classes. Raises VideoError when the source is not what the corpus lists.
    """
    pictures: dict[int, bytes] = {}
    for position, frame in frames_at(unchanged(source.path, source.sha256), source.positions(settings.rate)):
        pictures[position] = encode_picture(frame, settings)
        if len(pictures) % REPORT_EVERY == 0:
            report(REPORT_EVERY)
    report(len(pictures) % REPORT_EVERY)
    samples = []
    for entry in source.segments:
        chosen = [pictures[position] for position in settings.rate.positions(entry)]
        members = {f"{number:05d}.{settings.picture_format}": data for number, data in enumerate(chosen)}
        samples.append(Sample(entry.id, video_info(entry, numbers, settings.rate), members))
    return samples


def make_shard(task: ShardTask, report: Callable[[AtHand | Skipped | int], None]) -> None:
    """Write one shard without the sources that cannot be used, reporting on each source and counting frames."""

    def samples() -> Iterator[Sample]:
        for source in task.sources:
            if source.path in task.without:
                continue
            report(AtHand(source.path))
            found: list[Sample] = []
            try:
                found = make_samples(source, task.settings, task.class_numbers, report)
            except VideoError as error:
                report(Skipped(source.path, error.reason))
            except Exception as error:  # whatever a decoder or Pillow comes up with, it is about this source
                report(Skipped(source.path, f"cannot be decoded ({type(error).__name__}: {error})"))
            report(AtHand(None))
            yield from found

    stream = samples()
    first = next(stream, None)
    if first is not None:
        write_shard(task.folder, task.name, chain([first], stream))
    else:  # nothing is left of this shard: an earlier version of it must not stay
        remove_shard(task.folder, task.name)


def run_tasks(tasks: Sequence[ShardTask], workers: int, timeout: float) -> tuple[dict[str, str], list[str]]:
    """Write the shards that are not yet complete, in parallel.

    Returns path -> reason of the sources that were left out, and lines on the shards that could not be written.
    """
    waiting = [task for task in tasks if complete_shard(task.folder, task.name, task.samples) is None]
    for folder in {task.folder for task in waiting}:
        forget_manifest(folder)
    total = sum(task.frames for task in tasks)
    progress = Progress(total, total - sum(task.frames for task in waiting))
    skipped: dict[str, str] = {}
    unwritten: list[str] = []
    while waiting:
        at_hand: dict[int, str | None] = {}
        counted = [0] * len(waiting)
        again = []
        for event in run_in_processes(make_shard, waiting, workers, timeout):
            task, path = waiting[event.item], at_hand.get(event.item)
            if event.failure and path is not None:  # a decoder that crashes or hangs costs that source only
                skipped[path] = f"cannot be decoded ({event.failure})"
                again.append(replace(task, without=task.without | {path}))
                progress.add(-counted[event.item])
            elif event.failure:
                unwritten.append(f"{task.folder / task.name}.tar: {event.failure}")
            elif isinstance(event.value, AtHand):
                at_hand[event.item] = event.value.path
            elif isinstance(event.value, Skipped):
                skipped[event.value.path] = event.value.reason
            elif isinstance(event.value, int):
                counted[event.item] += event.value
                progress.add(event.value)
        waiting = again
    progress.close()
    return skipped, sorted(unwritten)
