"""Checks of one shard: the tar, every sample in it, its index and its done marker, against each other and the manifest.

All of it is read as bytes that may be damaged or hostile; what is wrong becomes a Problem, never an exception.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ardiff.data.shards import (
    FRAME_MEMBER,
    INDEX_DTYPE,
    LATENTS_MEMBER,
    MEMBERS,
    TEXT_MEMBER,
    Moments,
    Sample,
)
from ardiff.data.tar import MAX_READ, Member, ShardError, read_member, read_members
from data_tools.inspection.index_checks import Comparison, check_index
from data_tools.inspection.sample_checks import Checked, Fault, add_latents, check_sample
from data_tools.inspection.shard_folders import Problem, ShardJob
from data_tools.inspection.shard_workers import PASSES, REPORT_EVERY, BytesDone, sha256_reporting

MAX_MARKER = 1 << 22
SUM_TOLERANCE = 1e-9  # of sums in float64 that were added up in another order, as a share of their possible size


@dataclass
class ShardReport:
    """What was found in one shard; keys and sources (sha256 or "") of the sound videos in order."""

    problems: list[Problem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    frames: int = 0
    text_tokens: int = 0  # of the longest text


class Kept(NamedTuple):
    """A sample without faults and what was made out about it."""

    sample: Sample
    checked: Checked


def check_shard(job: ShardJob, report: Callable[[Any], None]) -> None:
    """Check one shard, reporting BytesDone and at the end a ShardReport (as `for_each_shard` expects it)."""
    result = ShardReport()
    index_problems: list[Problem] = []
    rows = check_index(job, index_problems)
    result.problems += index_problems
    if not check_size(job, result.problems):
        report(result)
        return
    _check_marker(job, result.problems)
    if not job.fast:
        try:
            size = job.tar.stat().st_size
            whole = size == job.entry.bytes and sha256_reporting(job.tar, report) == job.entry.sha256
            if size == job.entry.bytes and not whole:
                result.problems.append(Problem(str(job.tar), "its sha256 is not the one that the manifest lists"))
            _check_content(job, Comparison(job, rows, whole, not index_problems), result, report)
        except OSError as error:
            result.problems.append(Problem(str(job.tar), f"cannot be read ({error.strerror})"))
    report(result)


def check_size(job: ShardJob, problems: list[Problem]) -> bool:
    """Whether the tar is there; another size than the manifest's is a problem, but it can be read."""
    try:
        size = job.tar.stat().st_size if job.tar.is_file() else None
    except OSError as error:
        problems.append(Problem(str(job.tar), f"cannot be read ({error.strerror})"))
        return False
    if size is None:
        problems.append(Problem(str(job.tar), "missing, although the manifest lists it"))
    elif size != job.entry.bytes:
        problems.append(Problem(str(job.tar), f"has {size} bytes where the manifest says {job.entry.bytes}"))
    return size is not None


def _check_marker(job: ShardJob, problems: list[Problem]) -> None:
    """NAME.done.json may be absent, as only the program that writes shards needs it."""
    if not job.marker.exists():
        return
    try:
        if job.marker.stat().st_size > MAX_MARKER:
            raise ValueError("too long")
        value = json.loads(job.marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(str(job.marker), f"is damaged ({error})"))
        return
    if value != asdict(job.entry):
        problems.append(Problem(str(job.marker), "does not say what the manifest says of this shard"))


def read_groups(stream: BinaryIO, path: Path) -> Iterator[list[Member]]:
    """The members of a tar, sample by sample.

    Raises ShardError where the tar cannot be read on, after the members of the last sample that it came to.
    """
    group: list[Member] = []
    members = read_members(stream, path)
    error: ShardError | None = None
    while error is None:
        member = None
        try:
            member = next(members, None)
        except ShardError as caught:
            error = caught
        if group and (member is None or member.key != group[0].key):
            yield group
            group = []
        if member is None:
            break
        group.append(member)
    if error is not None:
        raise error


def group_fault(group: list[Member], seen: set[str]) -> Fault | None:
    """Why the members of a sample cannot be read as one; `seen` are the keys before it."""
    if group[0].key in seen:
        return Fault(group[0].extension, "its members are not together")
    if len({member.extension for member in group}) != len(group):
        return Fault(group[0].extension, "it has two members of one name")
    large = next((member for member in group if member.size > MAX_READ), None)
    return Fault(large.extension, f"{large.name} has {large.size} bytes, too many to be read") if large else None


def read_group(stream: BinaryIO, group: list[Member], path: Path) -> dict[str, bytes]:
    """The content of a sample's members by extension. Raises ShardError if the file has shrunk meanwhile."""
    return {member.extension: read_member(stream, member, path) for member in group}


def problems_of(tar: Path, group: list[Member], faults: list[Fault]) -> list[Problem]:
    """Faults of a sample with their places."""
    offsets = {member.extension: member.offset for member in group}
    first = group[0].offset
    return [Problem(str(tar), fault.reason, offsets.get(fault.member, first), group[0].key) for fault in faults]


def read_checked(
    job: ShardJob, problems: list[Problem], report: Callable[[Any], None], passes: int = 1, decode: bool = True
) -> Iterator[tuple[list[Member], dict[str, bytes], Checked | None]]:
    """Every sample of a tar: its members, their content, and what was made out about it.

    The faults of a sample go to `problems`, and it comes with None. Reports a share of 1 / passes of the bytes as
    BytesDone. Raises ShardError where the tar cannot be read on, and OSError.
    """
    reported, seen = 0, set[str]()
    with job.tar.open("rb") as stream:
        for group in read_groups(stream, job.tar):
            fault = group_fault(group, seen)
            seen.add(group[0].key)
            members: dict[str, bytes] = {}
            checked = None
            if fault is None:
                members = read_group(stream, group, job.tar)
                checked = check_sample(group[0].key, members, job.rules, decode)
            faults = [fault] if fault else checked.faults if checked else []
            problems += problems_of(job.tar, group, faults)
            yield group, members, None if faults else checked
            end = group[-1].offset + group[-1].size
            if end - reported >= REPORT_EVERY:
                report(BytesDone((end - reported) // passes))
                reported = end


def _check_content(job: ShardJob, comparison: Comparison, result: ShardReport, report: Callable[[Any], None]) -> None:
    """Read the tar to its end, or as far as it can be read."""
    moments = Moments(job.rules.channels)
    count, before = 0, len(result.problems)
    try:
        for group, members, checked in read_checked(job, result.problems, report, PASSES):
            if checked and comparison.passes(count, group, rows_of(count, group, members, checked)):
                _take_in(group[0].key, checked, result, moments)
            count += 1
        result.problems += comparison.result(count)
        if len(result.problems) == before:
            result.problems += _count_problems(job, count, result.frames, moments)
    except ShardError as error:
        result.problems += [Problem.of(error), *comparison.result(None)]


def _take_in(key: str, checked: Checked, result: ShardReport, moments: Moments) -> None:
    result.keys.append(key)
    result.sources.append(checked.info.get("sha256") or "")
    result.frames += checked.frames
    result.text_tokens = max(result.text_tokens, len(checked.arrays.get(TEXT_MEMBER, ())))
    if LATENTS_MEMBER in checked.arrays:
        add_latents(moments, checked.arrays[LATENTS_MEMBER])


def rows_of(number: int, group: list[Member], members: dict[str, bytes], checked: Checked) -> np.ndarray:
    """The index rows of sample `number`, which has no faults, as `index_tar` makes them."""
    label = checked.info.get("class")
    rows = []
    for member in group:
        kind = MEMBERS.get(member.extension)
        if kind is None and not FRAME_MEMBER.match(member.extension):
            continue
        start = checked.starts.get(member.extension, 0)
        data = memoryview(members[member.extension])[start:]
        frames = 1 if kind is None else len(checked.arrays[member.extension])
        rows.append(
            (
                number,
                member.offset + start,
                len(data),
                frames,
                -1 if label is None else label,
                zlib.crc32(data),
                kind or 0,
            )
        )
    return np.array(rows, dtype=INDEX_DTYPE)


def _count_problems(job: ShardJob, samples: int, frames: int, moments: Moments) -> Iterator[Problem]:
    entry = job.entry
    for name, found in (("samples", samples), ("frames", frames)):
        if found != getattr(entry, name):
            reason = f"holds {found} {name} where the manifest says {getattr(entry, name)}"
            yield Problem(str(job.tar), reason)
    if job.rules.kind == "latents" and not same_sums(entry.statistics, moments.as_json()):
        yield Problem(str(job.tar), "the statistics in the manifest are not those of its latents")


def same_sums(listed: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two sets of sums over latents agree up to the order in which they were added up (SUM_TOLERANCE)."""
    count, squares = found["count"], np.array(found["squares"])
    if listed["count"] != count:
        return False
    off_total = np.abs(np.array(listed["total"]) - found["total"])
    off_squares = np.abs(np.array(listed["squares"]) - squares)
    # the sum of n numbers is at most sqrt(n * the sum of their squares)
    within = (off_total <= SUM_TOLERANCE * np.sqrt(count * squares)) & (off_squares <= SUM_TOLERANCE * squares)
    return bool(within.all())
