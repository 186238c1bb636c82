"""The sbatch script of a job, and handing it to SLURM; what happens inside the job is `ardiff.launching.allocation`'s.

The script asks for whole nodes and one task on each, which launch/submit.py starts with srun. Nothing of the shell it
was submitted from reaches the job but the variables that the script itself exports.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ardiff import files
from ardiff.errors import UserError

SIGNAL_SECONDS = 600  # from the signal to the time limit, for a last step and a checkpoint of 10 GB or more
MOST_SECONDS = 65535  # that sbatch takes for --signal
KILL_SECONDS = 30  # of these, for ending all processes and asking SLURM to queue the job again
# Short forms of options that are ours to set or have an option of their own in launch/submit.py.
_SHORT = {
    **{"-N": "--nodes", "-n": "--ntasks", "-t": "--time", "-o": "--output", "-e": "--error", "-D": "--chdir"},
    **{"-p": "--partition", "-A": "--account", "-q": "--qos", "-J": "--job-name", "-c": "--cpus-per-task"},
    **{"-a": "--array", "-G": "--gpus", "-W": "--wait"},
}
_OURS = {
    **{"--nodes": "--nodes", "--time": "--time_limit", "--partition": "--partition", "--account": "--account"},
    **{"--qos": "--qos", "--gpus-per-node": "--gpus_per_node", "--cpus-per-task": "--cpus_per_node"},
    **{"--signal": "--signal_minutes"},
}
_REFUSED = (
    *("--ntasks", "--ntasks-per-node", "--output", "--error", "--open-mode", "--export", "--export-file", "--chdir"),
    *("--requeue", "--no-requeue", "--array", "--wrap", "--wait", "--get-user-env", "--propagate"),
)
# Variables that stand for options, are not called as these, and would change what the script asks for.
_VARIABLES = (
    "SBATCH_TIMELIMIT",
    "SBATCH_NO_REQUEUE",
    "SBATCH_ARRAY_INX",
    "SBATCH_ERROR",
    "SBATCH_MEM_PER_NODE",
    "SBATCH_WAIT",
)
_GPUS = ("--gres", "--gpus", "--gpus-per-task", "--gpus-per-socket")


@dataclass(frozen=True)
class Request:
    """What a job asks SLURM for."""

    nodes: int
    time_limit: str  # HH:MM:SS or D-HH:MM:SS
    gpus_per_node: int
    cpus_per_node: int | None = None  # None: all of the node, and nobody else's jobs there
    signal_minutes: float | None = None  # from the signal to the time limit; None: 10, and at most a quarter of it
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    extra: tuple[str, ...] = ()  # more options of sbatch

    def __post_init__(self) -> None:
        """Raises UserError for what SLURM would refuse, or take for something else."""
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: must be at least 1")
        if self.gpus_per_node < 0:
            raise UserError(f"--gpus_per_node {self.gpus_per_node}: must be at least 0")
        if self.cpus_per_node is not None and self.cpus_per_node < 1:
            raise UserError(f"--cpus_per_node {self.cpus_per_node}: must be at least 1")
        limit = seconds(self.time_limit)
        if self.signal_minutes is not None and not math.isfinite(self.signal_minutes):
            raise UserError(f"--signal_minutes {self.signal_minutes}: must be a number of minutes")
        ahead = self.signal_seconds
        if not 0 < ahead < limit:
            raise UserError(f"--signal_minutes {ahead / 60:g}: must be less than the --time_limit, and more than 0")
        if ahead > MOST_SECONDS:
            raise UserError(f"--signal_minutes {ahead / 60:g}: SLURM takes at most {MOST_SECONDS // 60}")
        for option, value in (("partition", self.partition), ("account", self.account), ("qos", self.qos)):
            if value is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise UserError(f"--{option} '{value}': is no name of SLURM's")
        for name in self._extra_names():
            if name in _OURS:
                raise UserError(f"--slurm_args {name}: give {_OURS[name]} instead")
            if name in _REFUSED:
                raise UserError(f"--slurm_args {name}: is set by this program and cannot be changed")

    @property
    def signal_seconds(self) -> int:
        """From the signal to the time limit."""
        if self.signal_minutes is not None:
            return round(60 * self.signal_minutes)
        return min(SIGNAL_SECONDS, seconds(self.time_limit) // 4)

    @property
    def stop_seconds(self) -> float:
        """What the ranks have of that for their last step and checkpoint."""
        return max(self.signal_seconds - KILL_SECONDS, self.signal_seconds / 2)

    def directives(self, name: str, log: Path) -> list[str]:
        """Options of sbatch, one to a line of the script."""
        given = self._extra_names()
        found = [f"--nodes={self.nodes}", "--ntasks-per-node=1", f"--time={self.time_limit}"]
        if "--job-name" not in given:
            found.insert(0, f"--job-name={re.sub(r'[^A-Za-z0-9_.-]', '_', name) or 'ardiff'}")
        if self.cpus_per_node is not None:
            found.append(f"--cpus-per-task={self.cpus_per_node}")
        elif "--exclusive" not in given:
            found.append("--exclusive")
        if self.cpus_per_node is None and not {"--mem", "--mem-per-cpu", "--mem-per-gpu"} & set(given):
            found.append("--mem=0")  # all of the node's
        if self.gpus_per_node and not set(_GPUS) & set(given):
            found.append(f"--gpus-per-node={self.gpus_per_node}")
        for option, value in (("partition", self.partition), ("account", self.account), ("qos", self.qos)):
            if value is not None:
                found.append(f"--{option}={value}")
        found += [f"--signal=B:USR1@{self.signal_seconds}", "--requeue", f"--output={_quoted(str(log))}"]
        # Limits of the submitting machine, above all that of locked memory, would stop InfiniBand on the nodes.
        found += ["--open-mode=append", "--export=NONE", "--propagate=NONE"]
        return found + ([" ".join(map(_quoted, self.extra))] if self.extra else [])

    def _extra_names(self) -> list[str]:
        """Long names of the options in `extra`."""
        names = [word.partition("=")[0] if word.startswith("--") else word[:2] for word in self.extra]
        return [_SHORT.get(name, name) for name in names if name.startswith("-")]


def seconds(time_limit: str) -> int:
    """Of a time limit. Raises UserError for other forms of SLURM's: "90" would be minutes, "1:30" too."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d{1,4}):([0-5]\d):([0-5]\d)", time_limit)
    total = 0
    if found:
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        total = ((24 * days + hours) * 60 + minutes) * 60 + rest
    if not total:
        raise UserError(f"--time_limit {time_limit}: must be HH:MM:SS or D-HH:MM:SS, as in 24:00:00")
    return total


def script(
    request: Request, name: str, log: Path, folder: Path, exports: Mapping[str, str], words: Sequence[str]
) -> str:
    """The batch script: its only process runs `words` in `folder` with these variables.

    name: of the job. log: with %j for the job's id. Raises UserError for text that a script cannot hold.
    """
    if any(character in str(log).replace("%j", "") for character in "%\\"):
        raise UserError(f"{log}: SLURM replaces % and \\ in the path of a log; choose another --run_dir")
    for text in (str(log), str(folder), *request.extra, *words, *exports.values()):
        if "\0" in text or "\r" in text:
            raise UserError(f"{text!r}: a batch script cannot hold this character")
    if any("\n" in text for text in (str(log), *request.extra)):
        raise UserError("a line break in --run_dir or --slurm_args: SLURM reads one line for each option")
    lines = ["#!/bin/bash", "# Written by launch/submit.py --slurm"]
    lines += [f"#SBATCH {line}" for line in request.directives(name, log)]
    lines += ["", f"cd -- {shlex.quote(str(folder))} || exit 2"]
    lines += [f"export {variable}={shlex.quote(value)}" for variable, value in sorted(exports.items())]
    beside = shutil.which("sbatch")
    if beside is not None:
        lines.append(f'export PATH="$PATH":{shlex.quote(str(Path(beside).parent))}  # srun, scontrol')
    # exec: the signal ahead of the time limit goes to the script's own process only.
    return "\n".join([*lines, f"exec {shlex.join(words)}", ""])


def submit(path: Path) -> str:
    """Hand a script to SLURM; returns the id of the job. Raises UserError where SLURM does not take it."""
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: sbatch is not in PATH; run this where SLURM's commands are, or look with --dry_run")
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False, env=_environment(path)
        )
    except OSError as error:
        raise UserError(f"--slurm: sbatch cannot be run ({error.strerror})") from None
    found = re.search(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        told = " ".join((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split())
        raise UserError(f"sbatch refused {path}: {told}")
    return found[1]


def write(path: Path, text: str) -> None:
    """Keep a script, for its owner only."""
    files.write_text(path, text)
    path.chmod(0o700)


def _environment(path: Path) -> dict[str, str]:
    """For sbatch: without variables that stand for options of the script, which they would override, and without those
    of a job that this one is submitted from.
    """
    given = re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    options = {"SBATCH_" + name.upper().replace("-", "_") for name in given} | set(_VARIABLES)
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in options and (name in kept or not name.startswith("SLURM_"))
    }


def _quoted(word: str) -> str:
    """A word for a line of options, which sbatch reads nearly as a shell would."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
