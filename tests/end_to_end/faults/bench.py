"""Runs that are disturbed, and the undisturbed ones that they are compared with."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ardiff.training.checkpoint import problem_with
from tests.end_to_end import processes
from tests.end_to_end.faults.comparing import differences
from tests.end_to_end.faults.data import validation_shards, write_data

LIMIT = 180.0  # seconds that one start may take
INJECT = Path(__file__).with_name("inject.py")


class DeviationError(AssertionError):
    """Something is not as it must be after a fault."""


class NotPossibleError(Exception):
    """This machine does not allow a scenario, such as mounting a small disk."""


@dataclass
class Tally:
    """What a scenario did."""

    rounds: int = 0  # disturbances
    hits: int | None = None  # of them in the middle of writing a checkpoint; None: not counted
    starts: int = 0  # of the command, until it had finished
    notes: list[str] = field(default_factory=list)


def require(condition: object, what: str) -> None:
    """Raise DeviationError unless the condition holds."""
    if not condition:
        raise DeviationError(what)


@dataclass(frozen=True)
class Setting:
    """A training command: what is the same in a disturbed run and its reference.

    extra: what comes after the words of `processes.train`; VALIDATION stands for the held-out shards. faults: as in
    `inject.py`; they are part of the command. FOLDER in them stands for the folder of the run.
    """

    extra: tuple[str, ...]
    ranks: int = 2
    kind: str = "torchrun"
    faults: tuple[tuple[Any, ...], ...] = ()

    def command(self, run_dir: Path, shards: Path) -> list[str]:
        """The words; the launcher's port is another one each time, for the last one may not be free yet."""
        extra = [str(validation_shards(shards)) if word == "VALIDATION" else word for word in self.extra]
        words = processes.train(run_dir, shards, *extra, kind=self.kind, ranks=self.ranks)
        if not self.faults:
            return words
        program = words.index("launch/train.py")
        faults = json.dumps(self.faults).replace("FOLDER", str(run_dir.parent))
        return [*words[:program], str(INJECT), faults, *words[program:]]


class Run:
    """One run_dir and the command that fills it, start after start."""

    def __init__(self, folder: Path, setting: Setting, shards: Path) -> None:
        self.folder, self.setting, self._shards = folder, setting, shards
        self.run_dir = folder / "run"
        self.starts = 0
        self.process: subprocess.Popen[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What the newest start printed."""
        return self.folder / f"start_{self.starts:02d}.log"

    @property
    def output(self) -> str:
        """Its text."""
        return self.log.read_text(errors="replace")

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.run_dir / "checkpoints"

    def start(self) -> None:
        """Give the command once more."""
        left = processes.processes_of(self.run_dir)
        require(not left, f"processes of the start before are still there: {left}")
        self.starts += 1
        with self.log.open("w") as log:
            self.process = processes.start(self.setting.command(self.run_dir, self._shards), log)

    def ended(self) -> bool:
        """Whether the newest start has."""
        assert self.process is not None
        return self.process.poll() is not None

    def wait(self, limit: float = LIMIT) -> int:
        """Until the command ends by itself; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DeviationError(f"start {self.starts} had not ended after {limit:g} s: {self.log}") from None

    def wait_until(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Until the condition holds; its value. Raises DeviationError where the command ends before it does."""
        deadline = time.monotonic() + limit
        while not (value := condition()):
            if self.ended():
                if value := condition():
                    return value
                raise DeviationError(f"start {self.starts} ended before {what}: {self.log}")
            require(time.monotonic() < deadline, f"{what}: not within {limit:g} s: {self.log}")
            time.sleep(0.002)
        return value

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl holds that step."""
        self.wait_until(lambda: self.last_step() >= step, f"step {step}")

    def last_step(self) -> int:
        """Of the complete lines of metrics.jsonl: what has been reported; 0 before any."""
        lines = self.run_dir / "metrics.jsonl"
        return lines.read_bytes().count(b"\n") if lines.is_file() else 0

    def rank_process(self, rank: int) -> int | None:
        """Its process id, if it lives."""
        found = processes.processes_of(self.run_dir)
        return next((pid for pid, number in found.items() if number == rank), None)

    def being_written(self) -> Path | None:
        """The checkpoint that is being written at this moment."""
        return next(iter(self.checkpoints.glob(".step_*.tmp")), None)

    def kill(self) -> None:
        """All processes at once, the launcher first, as when the power goes."""
        assert self.process is not None
        while left := processes.processes_of(self.run_dir):
            for pid in sorted(left, key=lambda pid: left[pid] is not None):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process.poll() is not None:
                time.sleep(0.01)
        self.process.wait(10)

    def finish(self, limit: float = LIMIT) -> None:
        """Start once more; it must go to the end."""
        self.start()
        code = self.wait(limit)
        require(code == 0, f"start {self.starts} ended with code {code} instead of finishing: {self.log}")
        record = self.exit_record()
        require(record["reason"] == "finished" and record["code"] == 0, f"exit.json: {record}")
        left = [path.name for path in self.checkpoints.glob(".*")]
        require(not left, f"left over in {self.checkpoints}: {left}")

    def exit_record(self) -> dict[str, Any]:
        """exit.json."""
        return processes.exit_record(self.run_dir)

    def check_checkpoints(self) -> list[Path]:
        """What has a final name must be whole, at any moment; returns those directories, oldest first."""
        found = sorted(self.checkpoints.glob("step_*"))
        for path in found:
            problem = problem_with(path)
            require(problem is None, f"{path} has its final name, but: {problem}")
        latest = self.checkpoints / "latest"
        if latest.is_file():
            name = latest.read_text().strip()
            require((self.checkpoints / name).is_dir(), f"{latest} names {name}, which does not exist")
        return found

    def check_tells_mistake(self, code: int, *words: str) -> None:
        """One line that tells a user's mistake, exit code 2 and no traceback of ours (torchrun prints its own)."""
        errors = [line for line in self.output.splitlines() if line.startswith("error:")]
        require(len(errors) == 1, f"{len(errors)} lines begin with error: instead of one: {self.log}")
        missing = [word for word in words if word not in errors[0]]
        require(not missing, f"the error does not say {missing}: {errors[0]!r}")
        ours = "Traceback" if self.setting.kind == "python" else str(processes.ROOT / "ardiff")
        require(ours not in self.output, f"a traceback: {self.log}")
        require(code == (2 if self.setting.kind == "python" else 1), f"exit code {code}: {self.log}")


class Bench:
    """The folder of a session, its data and its undisturbed runs."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.shards = write_data(folder / "data")
        self._references: dict[Setting, Run] = {}
        self._seconds: dict[Setting, float] = {}
        self._lock = threading.RLock()
        self._folders: dict[Setting, Path] = {}

    def random(self, name: str) -> random.Random:
        """Of a scenario: the same numbers whatever runs besides."""
        return random.Random(f"{self.seed} {name}")

    def new_run(self, scenario: str, name: str, setting: Setting) -> Run:
        """In a folder of its own."""
        return Run(self.folder / scenario / name, setting, self.shards)

    def _folder_of_reference(self, setting: Setting) -> Path:
        with self._lock:
            return self._folders.setdefault(setting, self.folder / "undisturbed" / f"{len(self._folders):02d}")

    def reference_with_file(self, setting: Setting, name: str) -> Run:
        """The same, with a file in FOLDER that keeps a fault from happening."""
        folder = self._folder_of_reference(setting)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        return self.reference(setting)

    def reference(self, setting: Setting) -> Run:
        """The undisturbed run of a setting; made once."""
        with self._lock:
            if setting not in self._references:
                run = Run(self._folder_of_reference(setting), setting, self.shards)
                begin = time.monotonic()
                run.finish()
                self._seconds[setting] = time.monotonic() - begin
                self._references[setting] = run
            return self._references[setting]

    def seconds(self, setting: Setting) -> float:
        """How long the undisturbed run took."""
        self.reference(setting)
        return self._seconds[setting]

    def cut_back(self, run: Run, step: int) -> None:
        """Make it a copy of the undisturbed run as if that had been killed shortly after the checkpoint of a step."""
        reference = self.reference(run.setting)
        shutil.copytree(reference.run_dir, run.run_dir, dirs_exist_ok=True)
        for path in run.checkpoints.glob("step_*"):
            if path.name > f"step_{step:08d}":
                shutil.rmtree(path)
        (run.checkpoints / "latest").write_text(f"step_{step:08d}\n")
        lines = (reference.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[: step + 2]
        (run.run_dir / "metrics.jsonl").write_text("".join(lines)[:-20])

    def compare(self, run: Run, ignore: tuple[str, ...] = ()) -> None:
        """A run that has finished must be the undisturbed one, bit for bit. ignore: fields of state.json."""
        run.check_checkpoints()
        found = differences(run.run_dir, self.reference(run.setting).run_dir, ignore)
        require(not found, f"{run.run_dir} deviates: {'; '.join(found[:5])}")
