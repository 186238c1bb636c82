"""What the ranks of a hanging run leave in its folder, and what it says of the cause."""

from __future__ import annotations

import datetime
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LISTED = 8  # ranks that a line names one by one, collectives that a file lists


@dataclass(frozen=True)
class Answer:
    """Where a rank was when it noticed that it hangs."""

    phase: str
    step: int
    since: float  # Unix time of its last progress


# The phases of a step in their order. The first collective is in the last one, where ranks wait for those behind.
STEP = ("waiting for data", "training step", "gradients and update")


def folder(run_dir: Path) -> Path:
    """Where the files of all ranks lie."""
    return run_dir / "logs"


def file(run_dir: Path, rank: int) -> Path:
    """The phase and the stacks of one rank; exists after a hang only."""
    return folder(run_dir) / f"hang_rank{rank:05d}.txt"


def held_file(run_dir: Path, rank: int) -> Path:
    """Stacks that were dumped for a rank whose threads could not do it; empty in a healthy run, gone after it."""
    return folder(run_dir) / f".held_rank{rank:05d}.txt"


def clear(run_dir: Path, rank: int, world_size: int) -> None:
    """Set aside what an earlier start left, with the time in its name: each rank its own, rank 0 that of ranks that are
    no more.
    """
    folder(run_dir).mkdir(parents=True, exist_ok=True)
    _set_aside(file(run_dir, rank))
    if rank == 0:
        for path in [*folder(run_dir).glob("hang_rank*.txt"), *folder(run_dir).glob(".held_rank*.txt")]:
            number = path.stem.rpartition("rank")[2]
            if number.isdigit() and int(number) >= world_size:
                _set_aside(path)


def _set_aside(path: Path) -> None:
    try:
        told = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem.removeprefix('.')}_{told}.txt"))
    except FileNotFoundError:
        return


def open_collectives() -> list[str]:
    """The last collectives that this process has begun and not seen the end of, from torch's flight recorder."""
    from torch._C import _distributed_c10d as recorders

    entries: list[dict[str, Any]] = []
    for name in (
        "_dump_nccl_trace_json",
        "_dump_fr_trace_json",
    ):  # NCCL has a recorder of its own, where it is built in
        dump = getattr(recorders, name, None)
        entries += json.loads(dump())["entries"] if dump is not None else []
    waiting = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
    waiting.sort(key=lambda entry: entry["time_created_ns"])
    return [
        f"{entry['profiling_name']} number {entry['collective_seq_id']} of group '{' '.join(entry['process_group'])}', "
        f"sizes {entry['input_sizes']}, {entry['state']} {clock(entry['time_created_ns'] / 1e9)}"
        for entry in waiting[-LISTED:]
    ]


def clock(seconds: float) -> str:
    """A Unix time as people write it, with the time zone."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def read(run_dir: Path, world_size: int) -> dict[int, Answer]:
    """The ranks that have answered so far."""
    answers = {}
    for rank in range(world_size):
        try:
            with file(run_dir, rank).open(encoding="utf-8") as stream:
                found = json.loads(stream.readline())
            answers[rank] = Answer(found["phase"], found["step"], found["since"])
        except (OSError, ValueError, KeyError):
            continue
    return answers


def adopt_held(run_dir: Path, world_size: int, answers: dict[int, Answer]) -> set[int]:
    """Give the stacks of the ranks that are held inside a library the usual name; returns these ranks."""
    held = set()
    for rank in set(range(world_size)) - set(answers):
        try:
            stacks = held_file(run_dir, rank).read_text(encoding="utf-8", errors="replace")
            if stacks:
                held.add(rank)
                file(run_dir, rank).write_text(
                    f"rank {rank}: a library did not give the interpreter back\n\n{stacks}", encoding="utf-8"
                )
        except OSError:
            continue
    return held


def summary(answers: dict[int, Answer], world_size: int, held: set[int]) -> str:
    """One line: the phase each rank is in, and which of them is likely the cause."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank, answer in sorted(answers.items()):
        groups[answer.phase, answer.step].append(rank)
    parts = [f"{_ranks(ranks)} in '{phase}' at step {step}" for (phase, step), ranks in groups.items()]
    silent = [rank for rank in range(world_size) if rank not in answers]
    stopped = [rank for rank in silent if rank not in held]
    if held:
        parts.append(f"{_ranks(sorted(held))} held inside a library")
    if stopped:
        parts.append(f"{_ranks(stopped)} did not answer: stopped, or held inside a library")
    return f"{', '.join(parts)}; likely cause: {_cause(answers, groups, silent)}"


def _cause(answers: dict[int, Answer], groups: dict[tuple[str, int], list[int]], silent: list[int]) -> str:
    if silent:
        return _ranks(silent)
    if len(answers) == 1:
        return f"rank {next(iter(answers))} (alone)"
    odd = min(groups.values(), key=len)
    if len(groups) > 1 and len(odd) < max(map(len, groups.values())):
        return f"{_ranks(odd)} (not where the others are)"
    if len(groups) > 1 and len({step for _, step in groups}) == 1 and all(phase in STEP for phase, _ in groups):
        behind = min(groups, key=lambda place: STEP.index(place[0]))
        return f"{_ranks(groups[behind])} (behind the others)"
    longest = min(answers, key=lambda rank: answers[rank].since)
    return f"rank {longest} (still for longest)"


def _ranks(ranks: list[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-6", "ranks 1, 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    more = f" and {len(ranks) - LISTED} more" if len(ranks) > LISTED else ""
    return f"ranks {', '.join(map(str, ranks[:LISTED]))}{more}"
