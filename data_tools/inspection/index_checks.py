"""Whether the index beside a shard can be right, and whether it is: against the manifest and against the tar."""

from __future__ import annotations

import hashlib

import numpy as np

from ardiff.data.shards import INDEX_DTYPE, MEMBERS, TEXT_MEMBER, ShardEntry, parse_index
from ardiff.data.tar import BLOCK, Member
from data_tools.inspection.shard_folders import Problem, Rules, ShardJob

MAX_INDEX = 1 << 26  # more than a million rows
MAX_ROW_PROBLEMS = 20  # named of a wrong index: that of another shard would give one per sample


def check_index(job: ShardJob, problems: list[Problem]) -> np.ndarray | None:
    """The rows of the index if they can be read, with the problems of the index in itself."""
    file, entry = str(job.index), job.entry
    try:
        if job.index.stat().st_size > MAX_INDEX:
            problems.append(Problem(file, f"has more than {MAX_INDEX >> 20} MiB, which no index has"))
            return None
        content = job.index.read_bytes()
    except OSError as error:
        problems.append(Problem(file, f"cannot be read ({error.strerror})"))
        return None
    if hashlib.sha256(content).hexdigest() != entry.index_sha256:
        problems.append(Problem(file, "its sha256 is not the one that the manifest lists"))
    try:
        rows = parse_index(content)
    except ValueError as error:
        problems.append(Problem(file, f"is damaged ({error})"))
        return None
    fault = index_fault(rows, entry, job.rules)
    if fault:
        problems.append(Problem(file, f"cannot be the index of {entry.file}: {fault}"))
    return rows


def index_fault(rows: np.ndarray, entry: ShardEntry, rules: Rules) -> str | None:
    """Why an index cannot be the one of the shard that the manifest describes."""
    impossible = impossible_rows(rows, entry.bytes, rules)
    if impossible.any():
        return f"row {int(np.argmax(impossible))} is impossible"
    main = rows[rows["member"] == 0]
    samples = np.unique(main["sample"])
    if not (in_order(rows) and len(samples) == entry.samples and samples[0] == 0 and samples[-1] == entry.samples - 1):
        return f"it does not list samples 0 to {entry.samples - 1} in order"
    if int(main["frames"].sum(dtype=np.int64)) != entry.frames:
        return f"it counts {int(main['frames'].sum(dtype=np.int64))} frames, the manifest {entry.frames}"
    kinds = rows["sample"] * len(MEMBERS) + rows["member"]
    if rules.kind == "latents" and len(np.unique(kinds)) != len(kinds):
        return "a sample has two arrays of one kind"
    return None


def in_order(rows: np.ndarray) -> bool:
    """Whether the rows of an index go from sample to sample."""
    return bool((rows["sample"][1:] >= rows["sample"][:-1]).all())


def impossible_rows(rows: np.ndarray, size: int, rules: Rules) -> np.ndarray:
    """Which rows [R] cannot point at anything of this kind in a tar of `size` bytes."""
    length, frames = rows["bytes"], rows["frames"].astype(np.int64)
    bad = (length < 1) | (length > size) | (rows["offset"] < BLOCK) | (frames < 1)
    bad |= rows["offset"] > size - np.clip(length, 0, size)
    bad |= (rows["label"] < -1) | (rows["label"] >= len(rules.classes)) | (rows["sample"] < 0)
    bad |= rows["sample"] > size // BLOCK
    if rules.kind == "frames":
        return bad | (rows["member"] != 0) | (frames != 1)
    text = rows["member"] == MEMBERS[TEXT_MEMBER]
    width = np.where(text, 2 * (rules.text_dim or 0), 2 * rules.tokens * rules.channels)
    wrong = np.where(width > 0, length != frames * width, length % np.maximum(2 * frames, 1) != 0)
    return bad | (rows["member"] >= len(MEMBERS)) | wrong


class Comparison:
    """Sets the rows of an index beside those that the tar gives; which of the two is `whole` or `trusted`."""

    def __init__(self, job: ShardJob, rows: np.ndarray | None, whole: bool, trusted: bool) -> None:
        self.job, self.rows, self.whole, self.trusted = job, rows, whole, trusted
        self.problems: list[Problem] = []
        if rows is not None and not in_order(rows):
            self.rows = None  # already named as impossible

    def passes(self, number: int, group: list[Member], found: np.ndarray) -> bool:
        """Compare the rows of one sample; whether it counts as sound."""
        if self.rows is None:
            return True
        before = len(self.problems)
        first, end = np.searchsorted(self.rows["sample"], (number, number + 1))
        listed = self.rows[first:end]
        if len(listed) != len(found):
            reason = f"the index has {len(listed)} rows for it, the tar {len(found)}"
            self.problems.append(Problem(str(self.job.tar), reason, group[0].offset, group[0].key))
            listed = found
        for one, other in zip(listed, found, strict=True):
            differing = [name for name in INDEX_DTYPE.names or () if one[name] != other[name]]
            if differing:
                reason = f"not what the index says ({', '.join(differing)})"
                self.problems.append(Problem(str(self.job.tar), reason, int(other["offset"]), group[0].key))
        return self.whole or len(self.problems) == before

    def result(self, samples: int | None) -> list[Problem]:
        """All differences, of a wrong index only some; `samples` is the number in a tar that was read to its end."""
        shown = self.problems if self.trusted else self.problems[:MAX_ROW_PROBLEMS]
        if len(self.problems) > len(shown):
            more = f"{len(self.problems) - len(shown)} more places are not what the index says"
            shown.append(Problem(str(self.job.tar), more))
        listed = int(self.rows["sample"][-1]) + 1 if self.rows is not None and len(self.rows) else 0
        if samples is not None and listed > samples:
            reason = f"the index has {listed} samples, the tar {samples}"
            shown.append(Problem(str(self.job.index), reason))
        return shown
