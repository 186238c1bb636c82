"""A new data set without the samples that are bad: whole shards as they are, damaged ones without what is damaged.

The original is only read. A run that was killed and started again gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ardiff.data.corpus import SPLITS
from ardiff.data.shards import MANIFEST, Moments, ShardEntry, write_manifest
from ardiff.errors import UserError
from ardiff.files import sha256
from data_tools.common import alone, claim_folder, output_folder
from data_tools.inspection.shard_folders import Part, Problem, Rules, ShardJob, open_parts
from data_tools.inspection.shard_repair import AS_IT_IS, BY_INDEX, Findings, WriteJob, examine, write_repaired
from data_tools.inspection.shard_workers import for_each_shard
from data_tools.inspection.verification import repeated
from data_tools.sharding.tasks import longest_text


@dataclass
class RepairedPart:
    """What became of one data set."""

    part: Part
    out: Path
    entries: list[ShardEntry] = field(default_factory=list)  # of the new shards
    dropped: list[Problem] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)  # shards that could not be written, and why
    same: int = 0  # shards that are as they were
    unchecked: list[str] = field(default_factory=list)  # shards whose descriptions nothing vouches for

    @property
    def lost(self) -> int:
        """Videos that the old manifest lists and the new one does not."""
        return sum(entry.samples for entry in self.part.chosen) - sum(entry.samples for entry in self.entries)


def repair(
    source: str,
    out: Path,
    keep_unchecked: bool = False,
    copy: bool = False,
    workers: int = 0,
    timeout: float = 600,
) -> list[RepairedPart]:
    """Write the good samples of `source` and of the data sets in its subfolders to `out`.

    `keep_unchecked` keeps samples that look right where no checksum is left; `copy` copies shards that need no change
    instead of making hard links. `workers` and `timeout` as in `for_each_shard`. Raises UserError when `source` is no
    data set or `out` holds something else.
    """
    parts = open_parts(source)
    _require_apart(parts[0], out)
    with alone(out):
        return _repair(parts, out, keep_unchecked, copy, workers, timeout)


def _repair(
    parts: Sequence[Part], out: Path, keep_unchecked: bool, copy: bool, workers: int, timeout: float
) -> list[RepairedPart]:
    _claim(parts, out, keep_unchecked)
    shards = [(part, ShardJob(part.folder, entry, Rules.of(part.manifest))) for part in parts for entry in part.chosen]
    sizes = [job.entry.bytes for _, job in shards]
    findings = [Findings() for _ in shards]
    examined = [(job, keep_unchecked) for _, job in shards]
    for outcome in for_each_shard(examine, examined, sizes, workers, timeout, "reading"):
        if outcome.failure:
            reason = f"could not be read ({outcome.failure}); all of it is left out"
            findings[outcome.item] = Findings(dropped=[Problem(str(shards[outcome.item][1].tar), reason)])
        else:
            findings[outcome.item] = outcome.value
    without = _superfluous([(part.name, str(job.tar)) for part, job in shards], findings)
    folders = {part.name: output_folder(out / part.name) for part in parts}
    jobs = [
        WriteJob(job, found, folders[part.name], left_out, copy)
        for (part, job), found, left_out in zip(shards, findings, without, strict=True)
    ]
    entries: list[ShardEntry | None] = [None] * len(jobs)
    failures: dict[int, str] = {}
    for outcome in for_each_shard(write_repaired, jobs, sizes, workers, timeout, "writing"):
        entries[outcome.item] = outcome.value
        if outcome.failure:
            failures[outcome.item] = outcome.failure
    results = []
    for part in parts:
        own = [number for number, (of, _) in enumerate(shards) if of is part]
        results.append(_finish(part, folders[part.name], own, jobs, entries, failures))
    return results


def _require_apart(part: Part, out: Path) -> None:
    folder, target = part.folder.resolve(), out.resolve()
    if target.is_relative_to(folder) or folder.is_relative_to(target):
        raise UserError(f"--out {out}: must lie apart from {part.folder}, which is not changed")


def _claim(parts: Sequence[Part], out: Path, keep_unchecked: bool) -> None:
    settings: dict[str, Any] = {"repaired": {part.name or SPLITS[0]: sha256(part.file) for part in parts}}
    if not parts[0].whole:
        settings["shards"] = [entry.file for entry in parts[0].chosen]
    output_folder(out)
    claim_folder(out, {**settings, "keep_unchecked": keep_unchecked}, results="**/*.tar")


def _superfluous(shards: Sequence[tuple[str, str]], findings: Sequence[Findings]) -> list[dict[str, Problem]]:
    """Per shard (its split and tar), the good samples that are left out all the same, by key.

    Of samples with one key the first stays. A video that lies in several splits stays in the last of them: measures
    taken on a test set remain comparable, and no model may have been trained on it.
    """
    without: list[dict[str, Problem]] = [{} for _ in shards]
    for split in {split for split, _ in shards}:
        own = [number for number, (of, _) in enumerate(shards) if of == split]
        for (home, position), *others in repeated([findings[number].keys for number in own]):
            for group, other in others:
                key, first, second = findings[own[group]].keys[other], own[home], own[group]
                if key == findings[first].keys[position]:
                    reason = f"the key is used in {Path(shards[first][1]).name} as well"
                    without[second][key] = Problem(shards[second][1], reason, key=key)
    order = sorted(range(len(shards)), key=lambda number: -_rank(shards[number][0]))
    for (home, position), *others in repeated([findings[number].sources for number in order]):
        kept = order[home]
        for group, other in others:
            number = order[group]
            same = findings[number].sources[other] == findings[kept].sources[position]
            if same and shards[number][0] != shards[kept][0]:
                key = findings[number].keys[other]
                reason = f"its source video is also in the {shards[kept][0]} split"
                without[number].setdefault(key, Problem(shards[number][1], reason, key=key))
    return without


def _rank(split: str) -> int:
    return SPLITS.index(split) if split else 0


def _finish(
    part: Part,
    out: Path,
    own: Sequence[int],
    jobs: Sequence[WriteJob],
    entries: Sequence[ShardEntry | None],
    failures: dict[int, str],
) -> RepairedPart:
    """Write the manifest of one data set, if all its shards are there and something is left."""
    result = RepairedPart(part, out)
    for number in own:
        job, entry = jobs[number], entries[number]
        result.dropped += job.dropped
        if number in failures:
            result.unwritten.append(f"{job.shard.tar}: {failures[number]}")
        elif entry is not None:
            result.entries.append(entry)
            restored = entry.sha256 == job.shard.entry.sha256
            result.same += job.findings.method == AS_IT_IS and not job.without
            if job.findings.method == BY_INDEX and not restored:
                result.unchecked.append(str(job.shard.tar))
    if result.unwritten or not result.entries:
        (out / MANIFEST).unlink(missing_ok=True)
        return result
    details = dict(part.manifest.details)
    if part.manifest.kind == "latents":
        details["mean"], details["std"] = Moments.merge(entry.statistics for entry in result.entries)
        if "text_tokens" in details:
            details["text_tokens"] = longest_text(out, result.entries)
    write_manifest(out, part.manifest.kind, result.entries, part.manifest.classes, details)
    return result
