"""launch/submit.py --slurm: from its options to a job in SLURM's queue.

The job's batch script runs launch/submit.py again, with --carrier srun: restarts, verdicts and signals are those of any
other job on many hosts, and `ardiff.launching.allocation` has it queued again where that is right.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import sbatch, screening
from ardiff.launching.command import Launch, check_program, run_dir_of
from ardiff.launching.environment import Variables, collect
from ardiff.launching.fleet import check_hosts
from ardiff.launching.hostcheck import ROOT
from ardiff.launching.orphans import PATIENCE

PROGRAM = ROOT / "launch" / "submit.py"
_ALONE = ("time_limit", "gpus_per_node", "cpus_per_node", "signal_minutes", "partition", "account", "qos", "slurm_args")
_HOSTS = ("hostfile", "ssh_args", "spares", "host_minutes", "node_rank", "carried")  # SLURM chooses and replaces nodes
NOT_INSIDE = (*_HOSTS, "nodes")  # with --carrier srun
_NOT_HERE = (*_HOSTS, "carrier", "master_addr", "master_port")
# Options that the job's own launch/submit.py gets as they are.
_PASSED = ("launcher", "ranks", "max_restarts", "max_requeues", "min_nodes", "fail_minutes", "preflight")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The group of options that are about SLURM."""
    add = parser.add_argument_group("a job in SLURM's queue, on --nodes N with --ranks R each").add_argument
    add("--slurm", action="store_true", help="write a batch script and submit it, instead of starting anything here")
    add("--time_limit", metavar="HH:MM:SS", help="of one stay in the queue's nodes; the job is queued again after it")
    add("--partition", metavar="NAME", help="as in sbatch")
    add("--account", metavar="NAME", help="as in sbatch")
    add("--qos", metavar="NAME", help="as in sbatch")
    add("--gpus_per_node", type=int, metavar="G", help="default: as many as ranks; 0 for CPUs only")
    add("--cpus_per_node", type=int, metavar="C", help="share the nodes with other jobs (default: whole nodes)")
    add(
        "--signal_minutes",
        type=float,
        metavar="M",
        help="stop so long before the time limit, with a checkpoint (default 10, at most a quarter of the limit)",
    )
    add("--max_requeues", type=int, metavar="N", help="default: as often as training gets further in between")
    add("--slurm_args", metavar="WORDS", help="more options for sbatch, as in --slurm_args='--constraint=a800'")
    add("--script", type=Path, metavar="FILE", help="where the batch script is kept (default: RUN/logs/slurm.sh)")


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other."""
    if not options.slurm:
        for name in (*_ALONE, "script"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: needs --slurm")
        if options.max_requeues is not None and options.carrier != "srun":
            raise UserError("--max_requeues: needs --slurm")
        return
    for name in _NOT_HERE:
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: cannot be given with --slurm, where SLURM chooses the nodes")
    for name in ("nodes", "ranks", "time_limit"):
        if getattr(options, name) is None:
            example = "--slurm --nodes 2 --ranks 8 --time_limit 24:00:00"
            raise UserError(f"--slurm: needs --{name} too, as in {example}")
    if options.max_requeues is not None and options.max_requeues < 0:
        raise UserError(f"--max_requeues {options.max_requeues}: must be at least 0")


@dataclass(frozen=True)
class Batch:
    """A batch script, and where it and its log go."""

    request: sbatch.Request
    name: str
    path: Path
    log: Path  # with %j for the job's id
    text: str


def prepare(options: argparse.Namespace, command: Sequence[str], folder: Path) -> Batch:
    """The batch script for a command line. folder: the absolute one that it was given in. Changes nothing.

    Raises UserError for what cannot be submitted.
    """
    if not options.ranks.isdigit() or int(options.ranks) < 1:
        raise UserError(f"--ranks {options.ranks}: must be a whole number with --slurm, of processes on every node")
    ranks = int(options.ranks)
    request = sbatch.Request(
        options.nodes,
        options.time_limit,
        ranks if options.gpus_per_node is None else options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        signal_minutes=options.signal_minutes,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        extra=_words(options.slurm_args or ""),
    )
    check_program(command, options.nodes * ranks)
    check_hosts(options.launcher, options.nodes, options.min_nodes)
    Launch(options.launcher, (ranks,), tuple(command))  # that there is such a launcher
    if options.preflight:
        screening.words(command, options.nodes * ranks, "REPORT")  # that it has one
    for word in command:
        _require_public(word, "the command")
    run_dir = run_dir_of(command)
    name = (run_dir or Path(command[0])).resolve().name
    logs = folder / run_dir / "logs" if run_dir is not None else folder
    log = logs / "slurm-%j.log"
    path = options.script or logs / "slurm.sh"
    exports = _exports(collect(os.environ, options.pass_env, None))
    words = [sys.executable, "-u", str(PROGRAM), "--carrier", "srun", *_own(options, request), "--", *command]
    return Batch(request, name, folder / path, log, sbatch.script(request, name, log, folder, exports, words))


def run(options: argparse.Namespace, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Submit the job that the options describe, and tell how to follow and stop it. Raises UserError."""
    batch = prepare(options, command, Path.cwd())
    if options.dry_run:
        say(f"{batch.path}:\n{batch.text}\nsubmitted with: sbatch --parsable {shlex.quote(str(batch.path))}")
        return cli.EXIT_OK
    batch.log.parent.mkdir(parents=True, exist_ok=True)
    sbatch.write(batch.path, batch.text)
    job = sbatch.submit(batch.path)
    log = shlex.quote(str(batch.log).replace("%j", job))
    request = batch.request
    stays = f"{request.nodes} node(s) x {options.ranks} rank(s), {request.time_limit} at a time"
    lines = {
        f"job {job}": f"{batch.name}: {stays}",
        "script": shlex.quote(str(batch.path)),
        "state": f"squeue --jobs={job}",
        "log": f"tail -F {log}",
        "stop, with a checkpoint": f"scancel --signal=TERM --batch {job}",
        "checkpoint, and queue again": f"scancel --signal=USR1 --batch {job}",
        "end at once": f"scancel {job}",
    }
    width = max(map(len, lines))
    for what, how in lines.items():
        say(f"{what:{width}}  {how}")
    return cli.EXIT_OK


def _own(options: argparse.Namespace, request: sbatch.Request) -> list[str]:
    """What the job's launch/submit.py is told itself."""
    words: list[str] = []
    for name in _PASSED:
        value = getattr(options, name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    for variable in options.pass_env:
        words += ["--pass_env", variable]
    if options.env_file is not None:
        collect({}, [], options.env_file)  # that it can be read
        words += ["--env_file", str(options.env_file.absolute())]
    minutes = request.stop_seconds / 60
    if options.stop_minutes != PATIENCE / 60:
        if options.stop_minutes > request.signal_seconds / 60:
            raise UserError(
                f"--stop_minutes {options.stop_minutes:g}: the time limit comes {request.signal_seconds / 60:g} min "
                "after the signal; give a larger --signal_minutes"
            )
        minutes = options.stop_minutes
    return [*words, "--stop_minutes", f"{minutes:g}"]


def _exports(given: Variables) -> dict[str, str]:
    """What the script may say to everybody who can read SLURM's copy of it."""
    if given.secret:
        name = min(given.secret)
        raise UserError(
            f"{name}: looks like a secret, and SLURM keeps batch scripts: unset it, or put it into --env_file"
        )
    for name, value in given.values.items():
        _require_public(value, name)
    return dict(given.values)


def _require_public(text: str, where: str) -> None:
    """Raises UserError for a text with a URL that holds a password, token or signature."""
    if "://" not in text:
        return
    from ardiff.data.urls import split_credentials  # takes longer to load than all the rest

    for url in re.findall(r"(?=\b(\w+://[^\s'\"]*))", text):  # also within a mixture
        shown, credentials = split_credentials(url)
        if any(credentials):
            raise UserError(
                f"{where}: {shown} comes with a password, token or query, and SLURM keeps batch scripts: leave it out, "
                "and put the store's own variables into --env_file, or use --carrier srun inside salloc"
            )


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--slurm_args {text}: {error}") from None
