"""The command line and environment that start a program on this machine's ranks."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ardiff.errors import UserError
from ardiff.launching.carriers import JOB
from ardiff.launching.orphans import SUPERVISOR, supervisor_variable
from ardiff.ports import free_port

LAUNCHERS = ("python", "torchrun", "deepspeed")
HOSTFILE = "hostfile"  # what deepspeed reads the shape of the job from
# What a launcher around this program may have set for a rank; it would be taken for the new job's.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_FOREIGN = (*_RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_RUN_ID")
_TRAINING = ("train.py", "train_vae.py")
# Programs of ours that keep no run, whatever options they have, and those of them that know nothing of ranks.
_WITHOUT_RUN = ("preflight.py", "profile_throughput.py", "sample.py", "evaluate.py", "export.py", "convert.py")
_ONE_PROCESS = ("sample.py", "evaluate.py", "export.py", "convert.py", "demo.py", "submit.py")


@dataclass(frozen=True)
class Launch:
    """A program with its options, and how to start this node's share of its processes."""

    launcher: str  # one of LAUNCHERS
    ranks: tuple[int, ...]  # processes on every node of the job, or one number for each of them
    command: tuple[str, ...]  # a Python file, or -m and a module, and its options
    nodes: int = 1
    node_rank: int = 0  # this one's
    master_addr: str | None = None  # where rank 0 is, for several nodes
    master_port: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be started."""
        self._check_nodes()
        if min(self.ranks) < 1:
            raise UserError(f"--ranks {min(self.ranks)}: must be at least 1")
        if self.launcher == "python" and self.world_size > 1:
            raise UserError(
                f"--launcher python: starts 1 rank, not {self.world_size}; use torchrun or deepspeed, or --ranks 1"
            )
        check_program(self.command, self.world_size)
        self._executable()

    @property
    def ranks_by_node(self) -> tuple[int, ...]:
        """Processes of each node."""
        return self.ranks * self.nodes if len(self.ranks) == 1 else self.ranks

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return sum(self.ranks_by_node)

    @property
    def run_dir(self) -> Path | None:
        """Where the program keeps its run, None for programs that keep none. Raises UserError where one is missing."""
        return run_dir_of(self.command)

    def arguments(self, scratch: Path) -> list[str]:
        """The command line; on a single node with another free port each time. scratch: where `files` will be."""
        program, (first, *rest) = self._executable(), self.command
        is_module = first == "-m"
        if self.launcher == "python":
            return [program, "-u", *self.command]
        ranks = str(self.ranks_by_node[self.node_rank])
        address = ("--master_addr", self._address(), "--master_port", str(self.master_port or free_port()))
        if self.launcher == "torchrun":  # the -- keeps it from taking options of the program for its own
            nodes = ("--nnodes", str(self.nodes), "--node_rank", str(self.node_rank)) if self.nodes > 1 else ()
            words = [program, *nodes, "--nproc_per_node", ranks, *address, *(["-m"] if is_module else [])]
            return [*words, "--", *(rest if is_module else self.command)]
        if self.nodes > 1:
            shape = ["--hostfile", str(scratch / HOSTFILE), "--no_ssh", "--node_rank", str(self.node_rank)]
        else:
            shape = ["--num_gpus", ranks]  # "GPUs" are processes on a CPU
        return [program, *shape, *address, *(["--module", *rest] if is_module else self.command)]

    def files(self) -> dict[str, str]:
        """What the launcher reads: name -> contents."""
        if self.launcher != "deepspeed" or self.nodes == 1:
            return {}
        lines = [f"node{node} slots={ranks}\n" for node, ranks in enumerate(self.ranks_by_node)]
        return {HOSTFILE: "".join(lines)}  # with --no_ssh the names mean nothing, their order is that of the nodes

    def environment(self) -> dict[str, str]:
        """That of this process, without what is about a rank; and the marks of a job."""
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        return {JOB: new_job(), **kept, SUPERVISOR: supervisor_variable()}

    def describe(self) -> str:
        """What would be run, for a shell, and the files it reads."""
        removed = [f"-u {name}" for name in (*_FOREIGN, SUPERVISOR) if name in os.environ]
        start = " ".join(["env", *removed, f"{JOB}=..."])
        scratch = Path("/tmp/ardiff-...")
        files = [f"{scratch / name}:\n{text}" for name, text in self.files().items()]
        return "\n".join([*files, f"{start} {shlex.join(self.arguments(scratch))}"])

    def _address(self) -> str:
        return self.master_addr if self.nodes > 1 and self.master_addr else "127.0.0.1"

    def _check_nodes(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: must be at least 1")
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(
                f"--node_rank {self.node_rank}: must be from 0 to {self.nodes - 1} with --nodes {self.nodes}"
            )
        if len(self.ranks) not in (1, self.nodes):
            raise UserError(f"--ranks: {len(self.ranks)} numbers for {self.nodes} node(s); give one, or one for each")
        if self.nodes > 1 and not (self.master_addr and self.master_port):
            raise UserError(
                f"--nodes {self.nodes}: every node needs --master_addr HOST (the first one's) and --master_port PORT, "
                "the same everywhere, and its own --node_rank"
            )
        if self.master_port is not None:
            check_port(self.master_port)

    def _executable(self) -> str:
        if self.launcher == "python":
            return sys.executable
        beside = Path(sys.executable).with_name(self.launcher)
        found = str(beside) if beside.is_file() else shutil.which(self.launcher)
        if found is None:
            raise UserError(f"--launcher {self.launcher}: not found beside {sys.executable} nor in PATH; install it")
        return found


def new_job() -> str:
    """A mark for the processes of a job."""
    return secrets.token_hex(8)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and behind the first "--"."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def attach(words: Sequence[str], *names: str) -> list[str]:
    """The words with the value of these options in the same word: a value that begins with - is one all the same."""
    found: list[str] = []
    for word in words:
        if found and found[-1] in names:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def check_port(port: int) -> None:
    """Raises UserError for what is no TCP port."""
    if not 0 < port < 65536:
        raise UserError(f"--master_port {port}: must be from 1 to 65535")


def check_program(command: Sequence[str], world_size: int) -> None:
    """Raises UserError where the words behind -- start no program, or one that does not share work among ranks."""
    name = command[0]
    path = Path(name)
    if name == "-m":
        module = command[1] if len(command) > 1 else ""
        path = Path(*module.split("."))
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            raise UserError(f"-m {module}: no such module here; name one as in -- -m data_tools.extract_latents ...")
    elif not path.is_file():
        raise UserError(f"{name}: no such program; name a file as in -- launch/train.py --config ...")
    if world_size > 1 and path.name in _ONE_PROCESS and path.parent.name == "launch":
        raise UserError(f"{name}: works in one process, not {world_size}; give --launcher python --ranks 1")


def run_dir_of(command: Sequence[str]) -> Path | None:
    """Where a program keeps its run. Raises UserError for a training program that was not told."""
    found = option(command, "--run_dir")
    name = Path(command[0]).name
    if name in _TRAINING and not found:
        raise UserError("the command behind -- has no --run_dir: add --run_dir FOLDER")
    return Path(found) if found and name not in _WITHOUT_RUN and command[0] != "-m" else None


def option(command: Sequence[str], wanted: str) -> str | None:
    """The last value of an option on a command line."""
    found = None
    words: list[str | None] = [*command[1:], None]
    for word, value in pairwise(words):
        assert word is not None
        name, equals, after = word.partition("=")
        if name == wanted:
            found = after if equals else value
    return found
