"""What can be kept of a damaged shard, and a new shard of just that.

How a shard is read depends on what vouches for it. A tar with the right sha256 is read from front to back, and only
samples that are bad in themselves are left out. Of any other tar nothing can be believed but what has a checksum in
the index: see data_tools.inspection.shard_recovery.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.data.shards import LATENTS_MEMBER, Moments, Sample, ShardEntry, finished_shard, index_tar, write_shard
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from ardiff.files import replacing, sha256, write_json
from data_tools.inspection.index_checks import check_index
from data_tools.inspection.sample_checks import JSON_MEMBER, add_latents, check_sample
from data_tools.inspection.shard_checks import (
    MAX_MARKER,
    Kept,
    group_fault,
    problems_of,
    read_group,
    read_groups,
    same_sums,
)
from data_tools.inspection.shard_folders import Problem, ShardJob
from data_tools.inspection.shard_recovery import recover_samples
from data_tools.inspection.shard_workers import PASSES, REPORT_EVERY, BytesDone, sha256_reporting

AS_IT_IS, BY_TAR, BY_INDEX, NOTHING = "as it is", "by tar", "by index", "nothing"


@dataclass
class Findings:
    """What can be kept of a shard and how it is read; what cannot be kept."""

    method: str = NOTHING
    digest: str | None = None  # sha256 of the tar as it was found
    entry: ShardEntry | None = None  # of a shard that needs no change
    keys: list[str] = field(default_factory=list)  # of the good samples, in order
    sources: list[str] = field(default_factory=list)  # their sha256 or ""
    frames: int = 0
    dropped: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class WriteJob:
    """A shard that is to be written to the folder `out`, less the samples in `without` (problem by key)."""

    shard: ShardJob
    findings: Findings
    out: Path
    without: dict[str, Problem]
    copy: bool  # False: hard links where they can be made

    @property
    def name(self) -> str:
        """Of the shard, without its suffix."""
        return self.shard.tar.stem

    @property
    def record(self) -> Path:
        """Where it is noted what was left out."""
        return self.out / f"{self.name}.dropped.json"

    @property
    def dropped(self) -> list[Problem]:
        """All that is left out, and why."""
        return [*self.findings.dropped, *self.without.values()]


def examine(job: tuple[ShardJob, bool], report: Callable[[Any], None]) -> None:
    """Find out what can be kept, reporting BytesDone and at the end Findings (as `for_each_shard` expects it).

    `job` is the shard and whether to keep, too, what no checksum vouches for.
    """
    shard, keep_unchecked = job
    try:
        report(_examined(shard, keep_unchecked, report))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); all of it is left out"
        report(Findings(dropped=[Problem(str(shard.tar), reason)]))


def _examined(shard: ShardJob, keep_unchecked: bool, report: Callable[[Any], None]) -> Findings:
    if not shard.tar.is_file():
        return Findings(dropped=[Problem(str(shard.tar), "missing; all of it is left out")])
    digest = sha256_reporting(shard.tar, report)
    rows = check_index(shard, [])
    if digest in (shard.entry.sha256, _marked_sha256(shard)):
        found = _collect(shard, BY_TAR, digest, None, report)
        readable = all(problem.key is not None for problem in found.dropped)
        return found if readable or rows is None else _collect(shard, BY_INDEX, digest, rows, report)
    if rows is not None:
        return _collect(shard, BY_INDEX, digest, rows, report)
    if keep_unchecked:
        found = _collect(shard, BY_TAR, digest, None, report)
        found.entry, found.method = None, BY_TAR if found.keys else NOTHING  # it is to be written anew in any case
        return found
    reason = "its sha256 is wrong and its index unreadable: nothing tells good samples from bad, so all are left out"
    return Findings(digest=digest, dropped=[Problem(str(shard.tar), f"{reason} (--keep_unchecked keeps them)")])


def _marked_sha256(shard: ShardJob) -> str | None:
    """The sha256 in the done marker: a second witness where the manifest is damaged."""
    try:
        if shard.marker.stat().st_size > MAX_MARKER:
            return None
        value = json.loads(shard.marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    digest = value.get("sha256") if isinstance(value, dict) else None
    return digest if isinstance(digest, str) else None


def _collect(
    shard: ShardJob, method: str, digest: str, rows: np.ndarray | None, report: Callable[[Any], None]
) -> Findings:
    """Read a shard by one method and note what is good."""
    found, moments, read = Findings(method, digest), Moments(shard.rules.channels), 0
    for sample in read_good(shard, method, rows):
        if isinstance(sample, Kept):
            found.keys.append(sample.sample.key)
            found.sources.append(sample.checked.info.get("sha256") or "")
            found.frames += sample.checked.frames
            _add(moments, sample)
            read += sum(map(len, sample.sample.members.values()))
        else:
            found.dropped += sample
        if read >= REPORT_EVERY:
            report(BytesDone(read // PASSES))
            read = 0
    if not found.keys:
        found.method = NOTHING
    elif method == BY_TAR and not found.dropped:
        found.method, found.entry = AS_IT_IS, _true_entry(shard, digest, found, moments)
    return found


def _add(moments: Moments, kept: Kept) -> None:
    if LATENTS_MEMBER in kept.checked.arrays:
        add_latents(moments, kept.checked.arrays[LATENTS_MEMBER])


def _true_entry(shard: ShardJob, digest: str, found: Findings, moments: Moments) -> ShardEntry:
    """The entry of a tar that is whole, whatever manifest and index say of it."""
    listed, sums = shard.entry.statistics, moments.as_json()
    if shard.rules.kind == "frames" or same_sums(listed, sums):
        sums = listed  # bit by bit as the program wrote it that added the numbers up in its own way
    index = hashlib.sha256(_index_bytes(shard.tar)).hexdigest()
    size = shard.tar.stat().st_size
    return ShardEntry(shard.entry.file, size, digest, index, len(found.keys), found.frames, sums)


def _index_bytes(tar: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, index_tar(tar), allow_pickle=False)
    return buffer.getvalue()


def read_good(shard: ShardJob, method: str, rows: np.ndarray | None) -> Iterator[Kept | list[Problem]]:
    """Every sample of a shard: itself, or why it is left out. `rows` are needed for BY_INDEX."""
    if method == BY_INDEX:
        assert rows is not None
        seen = set[str]()
        for kept in recover_samples(shard.tar, rows, shard.rules):
            if isinstance(kept, Kept) and kept.sample.key in seen:
                yield [Problem(str(shard.tar), "a second sample of this name", key=kept.sample.key)]
                continue
            if isinstance(kept, Kept):
                seen.add(kept.sample.key)
            yield kept
    else:
        yield from _read_by_tar(shard)


def _read_by_tar(shard: ShardJob) -> Iterator[Kept | list[Problem]]:
    seen = set[str]()
    with shard.tar.open("rb") as stream:
        try:
            for group in read_groups(stream, shard.tar):
                key, fault = group[0].key, group_fault(group, seen)
                seen.add(key)
                if fault:
                    yield problems_of(shard.tar, group, [fault])
                    continue
                members = read_group(stream, group, shard.tar)
                checked = check_sample(key, members, shard.rules)
                if checked.faults:
                    yield problems_of(shard.tar, group, checked.faults)
                    continue
                del members[JSON_MEMBER]
                yield Kept(Sample(key, checked.info, members), checked)
        except ShardError as error:
            problem = Problem.of(error)
            yield [Problem(problem.file, f"{problem.reason}; what follows is left out", problem.offset)]


def write_repaired(job: WriteJob, report: Callable[[Any], None]) -> None:
    """Write one shard unless an earlier run did; reports its entry (None: nothing is left of it)."""
    found, record = job.findings, None
    if job.dropped:
        record = {"sha256_found": found.digest, "dropped": [_as_json(problem) for problem in job.dropped]}
    done = finished_shard(job.out, job.name)
    if _known(job.record) == record and (found.method != AS_IT_IS or record or done == found.entry):
        nothing_left = found.method == NOTHING or len(job.without) == len(found.keys)
        if (done is None) == nothing_left:
            report(done)
            return
    for suffix in ("done.json", "dropped.json", "index.npy", "tar"):
        (job.out / f"{job.name}.{suffix}").unlink(missing_ok=True)
    entry: ShardEntry | None = None
    if found.method == AS_IT_IS and not job.without:
        entry = _copy(job)
    elif len(job.without) < len(found.keys):
        entry = _rewrite(job)
    if record is not None:
        write_json(job.record, record)
    report(entry)


def _as_json(problem: Problem) -> dict[str, Any]:
    return {"key": problem.key, "offset": problem.offset, "reason": problem.reason}


def _known(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "damaged"


def _copy(job: WriteJob) -> ShardEntry:
    """Put an unchanged tar into the new folder, with its true index and marker."""
    shard, entry = job.shard, job.findings.entry
    assert entry is not None
    with replacing(job.out / entry.file) as temporary:
        try:
            if job.copy:
                raise OSError
            os.link(shard.tar, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(shard.tar, temporary)
            if sha256(temporary) != entry.sha256:
                raise UserError(f"{shard.tar}: changed while it was copied; start the repair again") from None
    with replacing(job.out / f"{job.name}.index.npy") as temporary:
        temporary.write_bytes(_index_bytes(shard.tar))
    write_json(job.out / f"{job.name}.done.json", asdict(entry))
    return entry


def _rewrite(job: WriteJob) -> ShardEntry:
    """Write the good samples into a new shard."""
    shard = job.shard
    moments = Moments(shard.rules.channels) if shard.rules.kind == "latents" else None
    rows = check_index(shard, []) if job.findings.method == BY_INDEX else None

    def samples() -> Iterator[Sample]:
        for kept in read_good(shard, job.findings.method, rows):
            if isinstance(kept, Kept) and kept.sample.key not in job.without:
                if moments is not None:
                    _add(moments, kept)
                yield kept.sample

    return write_shard(job.out, job.name, samples(), moments)
