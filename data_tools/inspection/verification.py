"""Checks of whole data sets: every shard, what the shards have in common, what the splits may not have in common.

`verify` finds what is wrong and names it; it raises UserError only when there is no data set at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.data.shards import Moments
from ardiff.errors import UserError
from data_tools.inspection.shard_checks import ShardReport, check_shard
from data_tools.inspection.shard_folders import Part, Problem, ShardJob, jobs_of, locate, open_part
from data_tools.inspection.shard_workers import for_each_shard

# mean and deviation as computed from sums in another order, as shares of the root mean square
MEAN_TOLERANCE = 1e-6
COMMON_DETAILS = ("tokens", "channels", "size", "flipped", "text_dim", "stride")  # must be the same in every split


@dataclass
class Verification:
    """What `verify` found: the problems, and how much it looked at."""

    problems: list[Problem] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    videos: int = 0  # sound ones; with `fast`, those of the manifests
    frames: int = 0

    @property
    def shards(self) -> int:
        """Shards that were looked at."""
        return sum(len(part.chosen) for part in self.parts)


def repeated(groups: Sequence[Sequence[str]]) -> Iterator[list[tuple[int, int]]]:
    """Where a text other than "" occurs more than once: (group, position) of each, in order.

    Texts are compared by 64-bit hashes, so that millions take little memory: whoever acts on it compares them again.
    """
    hashes = np.fromiter((hash(text) for group in groups for text in group), dtype=np.int64)
    starts = np.cumsum([0, *(len(group) for group in groups)])
    order = np.argsort(hashes, kind="stable")
    borders = np.flatnonzero(np.diff(hashes[order])) + 1
    found = [same for same in np.split(order, borders) if len(same) > 1 and hashes[same[0]] != hash("")]
    for same in sorted(found, key=lambda same: int(same[0])):  # hashes change from run to run
        home = np.searchsorted(starts, same, side="right") - 1
        yield list(zip(home.tolist(), (same - starts[home]).tolist(), strict=True))


def verify(source: str, fast: bool = False, workers: int = 0, timeout: float = 600) -> Verification:
    """Check the data set `source` and those in its subfolders (see `locate`).

    `fast` looks at files, sizes and indexes only. `workers` and `timeout` as in `for_each_shard`. Raises UserError
    when there is no data set.
    """
    result = Verification()
    for place in locate(source):
        if not place.name and (place.chosen is not None or not place.file.is_file()):
            open_part(place)  # raises where the user is mistaken: there is nothing that could be verified
        part = None
        try:
            part = open_part(place)
            result.parts.append(part)
        except UserError as error:
            result.problems.append(Problem(str(place.file), str(error).removeprefix(f"{place.file}: ")))
        if place.chosen is None:
            result.problems += leftovers(place.file.parent, part)
    jobs = jobs_of(result.parts, fast)
    reports = run_checks(jobs, workers, timeout)
    for report in reports:
        result.problems += report.problems
        result.videos += len(report.keys)
        result.frames += report.frames
    if fast:
        result.videos = sum(job.entry.samples for job in jobs)
        result.frames = sum(job.entry.frames for job in jobs)
    for part in result.parts:
        result.problems += statistics_problems(part)
    result.problems += disagreements(result.parts)
    if not fast:
        result.problems += _across_shards(result.parts, reports)
    return result


def run_checks(jobs: Sequence[ShardJob], workers: int, timeout: float) -> list[ShardReport]:
    """The report on every shard; one whose reader crashed or hung has just that as its problem."""
    reports = [ShardReport() for _ in jobs]
    sizes = [job.entry.bytes for job in jobs]
    processes = 0 if all(job.fast for job in jobs) else workers
    for outcome in for_each_shard(check_shard, jobs, sizes, processes, timeout, "verifying"):
        if outcome.failure:
            problem = Problem(str(jobs[outcome.item].tar), f"could not be checked: {outcome.failure}")
            reports[outcome.item] = ShardReport([problem])
        else:
            reports[outcome.item] = outcome.value
    return reports


def leftovers(folder: Path, part: Part | None) -> Iterator[Problem]:
    """Files in the folder that look as if they belonged to its data set (None: not known) but do not."""
    listed = {entry.file for entry in part.manifest.shards} if part else set()
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") and ".tmp." in name:
            yield Problem(str(path), "a temporary file of a program that was killed, or is still running")
        if part is None:
            continue
        for suffix, what in ((".tar", "a shard"), (".index.npy", "an index"), (".done.json", "a note of completion")):
            if not name.startswith(".") and name.endswith(suffix) and f"{name.removesuffix(suffix)}.tar" not in listed:
                yield Problem(str(path), f"{what} that the manifest does not list")


def statistics_problems(part: Part) -> Iterator[Problem]:
    """Whether mean and std of the manifest follow from the sums of its shards, up to MEAN_TOLERANCE."""
    if part.manifest.kind != "latents":
        return
    file, details = str(part.file), part.manifest.details
    mean, std = map(np.array, Moments.merge(entry.statistics for entry in part.manifest.shards))
    limit = MEAN_TOLERANCE * np.hypot(mean, std)
    for name, found in (("mean", mean), ("std", std)):
        channels = np.flatnonzero(~(np.abs(found - np.array(details[name])) <= limit)).tolist()
        if channels:
            yield Problem(
                file, f"its {name} does not follow from its shards in channels {', '.join(map(str, channels))}"
            )


def disagreements(parts: Sequence[Part]) -> Iterator[Problem]:
    """What differs between splits although a model is trained on one and judged on the other."""
    for part in parts[1:]:
        one, other = parts[0].manifest, part.manifest
        differing = [name for name in COMMON_DETAILS if one.details.get(name) != other.details.get(name)]
        differing += [name for name in ("kind", "classes") if getattr(one, name) != getattr(other, name)]
        if _arvae(one.details) != _arvae(other.details):
            differing.append("AR-VAE")
        if differing:
            reason = f"not the same as in {parts[0].file}: {', '.join(differing)}"
            yield Problem(str(part.file), reason)


def _arvae(details: dict[str, Any]) -> Any:
    arvae = details.get("arvae")
    return arvae.get("id") if isinstance(arvae, dict) else None


def _across_shards(parts: Sequence[Part], reports: Sequence[ShardReport]) -> Iterator[Problem]:
    """Keys that occur twice in a data set, videos that lie in two splits."""
    tars = [part.folder / entry.file for part in parts for entry in part.chosen]
    split_of = [part.name or "train" for part in parts for _ in part.chosen]
    first = 0
    for part in parts:
        own = slice(first, first + len(part.chosen))
        yield from _repeated_keys(tars[own], reports[own])
        yield from _text_tokens(part, reports[own])
        first = own.stop
    for (home, position), *others in repeated([report.sources for report in reports]):
        for group, other in others:
            if split_of[group] == split_of[home] or reports[group].sources[other] != reports[home].sources[position]:
                continue
            where = f"sample {reports[home].keys[position]} of {tars[home]}"
            reason = f"its source video is also in the {split_of[home]} split ({where})"
            yield Problem(str(tars[group]), reason, key=reports[group].keys[other])


def _text_tokens(part: Part, reports: Sequence[ShardReport]) -> Iterator[Problem]:
    """Batches are made as long as the manifest says that the longest text is."""
    listed, longest = part.manifest.details.get("text_tokens"), max(report.text_tokens for report in reports)
    unread = any(report.problems for report in reports) or not part.whole
    if listed is not None and (longest > listed or (longest < listed and not unread)):
        yield Problem(str(part.file), f"its text_tokens is {listed}, the longest text has {longest}")


def _repeated_keys(tars: Sequence[Path], reports: Sequence[ShardReport]) -> Iterator[Problem]:
    for (home, position), *others in repeated([report.keys for report in reports]):
        for group, other in others:
            key = reports[group].keys[other]
            if key == reports[home].keys[position]:
                yield Problem(str(tars[group]), f"the key is used in {tars[home]} as well", key=key)
