"""Mutated data sets, tried in a process that must not crash, hang, grow, run code or write elsewhere."""

from __future__ import annotations

import io
import json
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ardiff.files
from ardiff.data.shards import index_tar, read_samples
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from data_tools import inspect_shards
from data_tools.inspection.repair import repair
from data_tools.inspection.shard_comparison import compare
from data_tools.inspection.shard_folders import open_parts
from data_tools.inspection.verification import verify
from mutations import Mutation, mutations
from mutations.reading import read_for_training
from mutations.sets import check_valid, reseal, samples_of, write_frame_set, write_latent_set

MEMORY = 1 << 30  # bytes of address space beyond what the process has at its start
SECONDS = 10  # for all that is done with one mutation
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
BESIDES = ("damaged_marker", "damaged_manifest", "odd_manifest", "leftover_file")  # leave tars and indexes alone
INDEXES = ("damaged_index", "hostile_index", "several")


class TooSlow(BaseException):
    """A mutation took too long. Not an Exception, which a decoder's caller would take for bad data."""


class Forbidden(BaseException):
    """Something was done that bytes in a shard must not bring about."""


class Trial:
    """Tries mutations of one data set, one after the other."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.original, self.copy, self.out = folder / "original", folder / "copy", folder / "out"
        self.trap = folder / "trap"
        (write_latent_set if kind == "latents" else write_frame_set)(self.original)
        self.samples = samples_of(self.original)
        self.originals = set(read_for_training(self.original, kind)[0])
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0

    def run(self, seed: int, count: int) -> None:
        """Try `count` mutations."""
        shutil.copytree(self.original, self.copy)
        for mutation in mutations(self.original, seed, count, self.trap):
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                self.one(mutation)
            except (Exception, TooSlow, Forbidden):
                self.failures.append(f"{mutation}:\n{traceback.format_exc()}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.restore(mutation)

    def restore(self, mutation: Mutation) -> None:
        """Undo a mutation and what was sealed after it."""
        for path in self.copy.iterdir():
            if not (self.original / path.name).exists():
                path.unlink()
        for path in self.original.iterdir():
            shutil.copyfile(path, self.copy / path.name)

    def one(self, mutation: Mutation) -> None:
        """Damage as it happens, then the same with checksums that fit it."""
        mutation.apply(self.copy)
        self.counts["tried"] += 1
        problems = verify(str(self.copy)).problems
        self.look(problems)
        if problems:
            self.counts["reported"] += 1
        else:
            assert mutation.kind in BESIDES and self.same_in_substance(), "not reported"
            self.counts["without consequence"] += 1
        self.readers()
        if mutation.number % 8 == 0:
            self.programs()
        self.training(honest=True)
        self.repaired(honest=True)
        if mutation.kind in BESIDES or not reseal(self.copy, keep_index=mutation.kind in INDEXES):
            return
        self.counts["sealed"] += 1
        problems = verify(str(self.copy)).problems
        self.look(problems)
        if problems:
            self.counts["sealed and reported"] += 1
        else:
            check_valid(self.copy, self.kind)
            self.counts["sealed and valid"] += 1
        self.readers()
        self.training(honest=False)
        self.repaired(honest=False)

    def look(self, problems: list[Any]) -> None:
        """What was found is one printable line each."""
        for problem in problems:
            line = str(problem)
            assert line.isprintable() and line.isascii() >= 0 and problem.reason
        assert not self.trap.exists(), "code was run"

    def readers(self) -> None:
        """The plain readers either read or refuse."""
        for path in sorted(self.copy.glob("*.tar")):
            for reader in (index_tar, lambda tar: list(read_samples(tar))):
                with suppress(ShardError):
                    reader(path)

    def programs(self) -> None:
        """Whatever is printed about it, the programs end as they should."""
        for command in (["list"], ["list", "--samples"], ["stats", "--workers", "0"]):
            with suppress(UserError), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                assert inspect_shards.main([*command, str(self.copy)]) in (0, 1)
        with suppress(UserError):
            differences, problems = compare(str(self.original), str(self.copy))
            self.look(problems)
            assert all(line.isprintable() for difference in differences for line in difference.lines())

    def training(self, honest: bool) -> None:
        """Training is refused, or every clip is what it was or replaced."""
        try:
            good, replaced = read_for_training(self.copy, self.kind)
        except UserError:
            self.counts["training refused"] += honest
            return
        self.counts["training samples replaced"] += replaced * honest
        if honest:
            assert self.originals.issuperset(good), "training reads something else"

    def repaired(self, honest: bool) -> None:
        """A repaired data set is sound. What came through honest damage is what it was."""
        shutil.rmtree(self.out, ignore_errors=True)
        try:
            result = repair(str(self.copy), self.out)[0]
        except UserError:
            assert self.refused()
            self.counts["repair refused"] += honest
            return
        self.look(result.dropped)
        assert not result.unwritten
        if not result.entries:
            self.counts["nothing left"] += honest
            assert result.dropped and not list(self.out.glob("*.tar"))
            return
        found = verify(str(self.out)).problems
        assert not found, f"repaired, yet {found[0]}"
        if honest:
            kept = samples_of(self.out)
            self.counts["samples"] += len(self.samples)
            self.counts["samples kept"] += len(kept)
            for key, members in kept.items():
                assert {**members, "json": b""} == {**self.samples[key], "json": b""}, f"{key} was changed"

    def refused(self) -> bool:
        """Whether the manifest cannot be used."""
        try:
            open_parts(str(self.copy))
        except UserError:
            return True
        return False

    def same_in_substance(self) -> bool:
        """Whether a manifest or marker was changed only where nothing else says what is right."""
        one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (self.original, self.copy))
        free = {"arvae", "fps", "flipped", "text_dim", "text_tokens", "mean", "std"}
        names = {name for name in {*one, *other} if one.get(name) != other.get(name)}
        return names - {*other} <= free and names & {*one} <= free


def _watch(folder: Path) -> None:
    """From now on code, processes, connections and files elsewhere are forbidden."""
    import os

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise Forbidden(event)
        if event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not Path(os.fsdecode(arguments[0])).is_relative_to(folder):
                raise Forbidden(f"writes {arguments[0]!r}")

    sys.addaudithook(hook)


def try_mutations(kind: str, folder: Path, seed: int, count: int, result: Path) -> None:
    """The life of the process: writes counts, failures, seconds and growth of memory to `result` as JSON."""

    def overdue(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlow

    folder.mkdir(exist_ok=True)
    ardiff.files.sync = lambda path: None  # thousands of small files need not reach the disk
    trial = Trial(kind, folder)
    signal.signal(signal.SIGALRM, overdue)
    _watch(folder.parent)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trial.run(seed, count)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"counts": trial.counts, "failures": trial.failures, "slowest": trial.slowest, "grown_mib": grown}
    result.write_text(json.dumps({**found, "trap": trial.trap.exists()}))
