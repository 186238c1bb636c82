"""The command line and environment that start a program on this machine's ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ardiff.errors import UserError
from ardiff.launching.orphans import SUPERVISOR, supervisor_variable

LAUNCHERS = ("python", "torchrun", "deepspeed")
# What a launcher around this program may have set for a rank; it would be taken for the new job's.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_FOREIGN = (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Launch:
    """A program with its options, and how to start it on `ranks` processes."""

    launcher: str  # one of LAUNCHERS
    ranks: int
    command: tuple[str, ...]  # a Python file and its options

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be started."""
        if self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: must be at least 1")
        if self.launcher == "python" and self.ranks > 1:
            raise UserError(f"--launcher python: starts 1 rank, not {self.ranks}; use torchrun or deepspeed")
        if not Path(self.command[0]).is_file():
            raise UserError(f"{self.command[0]}: no such program; name a file as in -- launch/train.py --config ...")
        self._executable()

    @property
    def run_dir(self) -> Path:
        """Where the program was told to keep its run. Raises UserError where it was not."""
        found = None
        words: list[str | None] = [*self.command[1:], None]
        for word, value in pairwise(words):
            assert word is not None
            name, equals, after = word.partition("=")
            if name == "--run_dir":
                found = after if equals else value
        if not found:
            raise UserError("the command behind -- has no --run_dir: add --run_dir FOLDER")
        return Path(found)

    def arguments(self) -> list[str]:
        """The command line; with another free port each time."""
        program, ranks = self._executable(), str(self.ranks)
        if self.launcher == "python":
            return [program, "-u", *self.command]
        address = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
        if self.launcher == "torchrun":  # the -- keeps it from taking options of the program for its own
            return [program, "--nproc_per_node", ranks, *address, "--", *self.command]
        return [program, "--num_gpus", ranks, *address, *self.command]  # "GPUs" are processes on a CPU

    def environment(self) -> dict[str, str]:
        """That of this process, without what is about a rank."""
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        return {**kept, SUPERVISOR: supervisor_variable()}

    def describe(self) -> str:
        """What would be run, for a shell."""
        ours = self.environment()
        removed = [f"-u {name}" for name in _FOREIGN if name in os.environ]
        added = [f"{name}={shlex.quote(value)}" for name, value in ours.items() if os.environ.get(name) != value]
        return f"{' '.join(['env', *removed, *added])} {shlex.join(self.arguments())}"

    def _executable(self) -> str:
        if self.launcher == "python":
            return sys.executable
        beside = Path(sys.executable).with_name(self.launcher)
        found = str(beside) if beside.is_file() else shutil.which(self.launcher)
        if found is None:
            raise UserError(f"--launcher {self.launcher}: not found beside {sys.executable} nor in PATH; install it")
        return found


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and behind the first "--"."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
