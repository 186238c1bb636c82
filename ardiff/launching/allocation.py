"""Inside a SLURM job: its nodes, srun as the carrier of commands to them, and whether SLURM is to queue it again.

A node is lost, the time limit comes near, or another job needs the nodes: the same job then waits for nodes again, and
goes on from its newest checkpoint. SLURM does that by itself where it notices first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import processes, records
from ardiff.launching.hostfile import Host
from ardiff.launching.job import StopRequest, Tell

SAME_CHECKPOINT = 3  # so often a job is queued again from one checkpoint: then its time is too short, or a node is bad
ANSWER_SECONDS = 60.0  # that SLURM's controller, or a node, has for an answer
ASK_AGAIN, ASK_SECONDS = 5.0, 60.0  # between questions to a controller that refuses, and for how long
SIMULTANEOUS = 64


class NoAnswerError(UserError):
    """SLURM does not answer, which is no mistake of the user's."""


@dataclass(frozen=True)
class Srun:
    """srun inside the job: one step for each command, which shares the node with the steps that run there already."""

    cpus_per_task: str | None = None
    bind: bool = False  # whether this SLURM would tie the only task of a step to one core
    stop_seconds: float = 30.0  # that ranks have for their last step and checkpoint
    name: str = "srun"
    forwards_stdin: bool = True

    def command(self, host: str, line: str) -> list[str]:
        """srun ... sh -c LINE. --export=ALL: the job itself was submitted with NONE, which steps would inherit."""
        words = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--export=ALL", "--mpi=none"]
        if self.cpus_per_task is not None:  # since 22.05 srun does not take it over from the job
            words.append(f"--cpus-per-task={self.cpus_per_task}")
        if self.bind:
            words.append("--cpu-bind=none")
        return [*words, "sh", "-c", line]

    def environment(self) -> dict[str, str]:
        """A signal from SLURM goes to every process of a step, torchrun too, which would give its ranks 30 s."""
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{self.stop_seconds:.0f}"}

    def lost(self, code: int) -> bool:
        """The programs of ours end with other codes; srun has 128 and the signal where SLURM ended a step."""
        return code < 0 or code > cli.EXIT_INTERRUPTED

    def reaches(self, host: str) -> bool:
        """Whether a node still starts what it is told to."""
        try:
            done = subprocess.run(
                self.command(host, "true"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=ANSWER_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


@dataclass(frozen=True)
class Allocation:
    """The nodes of the SLURM job that this process is in."""

    job: str
    hosts: tuple[str, ...]
    restarts: int  # how often SLURM has started it again
    is_batch: bool  # this is its script: SLURM can queue it again

    @classmethod
    def here(cls, stop: StopRequest) -> Allocation:
        """The job that this process is in. Raises UserError outside of one, NoAnswerError."""
        job, nodes = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
        if not job or not nodes:
            raise UserError(
                "--carrier srun: this is not inside a SLURM job; --slurm submits one, salloc starts one here"
            )
        for program in ("srun", "scontrol"):
            if shutil.which(program) is None:
                raise UserError(f"--carrier srun: {program} is not in PATH on {os.uname().nodename}")
        processes.adopt_orphans()  # what an srun leaves that is killed
        hosts = tuple(_ask(stop, "show", "hostnames", nodes).split())
        is_batch = "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" not in os.environ
        return cls(job, hosts, int(os.environ.get("SLURM_RESTART_COUNT", "0")), is_batch)

    def with_ranks(self, ranks: Sequence[int]) -> list[Host]:
        """Its nodes and their ranks: one number for all, or one for each. Raises UserError for other numbers."""
        if len(ranks) not in (1, len(self.hosts)):
            raise UserError(f"--ranks: {len(ranks)} numbers for {len(self.hosts)} node(s); give one, or one for each")
        if min(ranks) < 1:
            raise UserError(f"--ranks {min(ranks)}: must be at least 1")
        each = ranks if len(ranks) == len(self.hosts) else [ranks[0]] * len(self.hosts)
        return [Host(name, slots) for name, slots in zip(self.hosts, each, strict=True)]

    def carrier(self, stop_seconds: float, stop: StopRequest) -> Srun:
        """srun, with what this SLURM needs. Raises NoAnswerError."""
        found = re.search(r"^TaskPlugin\s*=\s*(.*)$", _ask(stop, "show", "config"), re.MULTILINE)
        binds = bool(found and "affinity" in found[1])
        return Srun(os.environ.get("SLURM_CPUS_PER_TASK"), binds, stop_seconds)

    def silent(self) -> list[str]:
        """The nodes that start nothing any more, whether SLURM has noticed or not."""
        carrier = Srun()
        with ThreadPoolExecutor(SIMULTANEOUS) as pool:
            answers = list(pool.map(carrier.reaches, self.hosts))
        return [host for host, answered in zip(self.hosts, answers, strict=True) if not answered]

    def taken(self, stop: StopRequest) -> str | None:
        """Why SLURM itself takes the nodes away and sends SIGTERM, if it does."""
        about = self._about(stop)
        if about.get("PreemptTime", "None") != "None":
            return "preempted"
        return "the time limit" if about.get("Reason") == "TimeLimit" else None

    def conclude(
        self,
        code: int,
        stop: StopRequest,
        record: records.Record | None,
        run_dir: Path,
        max_requeues: int | None,
        tell: Tell,
    ) -> int:
        """Have the job queued again where that is right; returns the exit code for this stay in the queue's nodes.

        code: of the job. stop: what this process has heard, and still hears. record: what the ranks wrote in exit.json
        since the start.
        """
        silent = self.silent if code in (cli.EXIT_FAILURE, cli.EXIT_HUNG) else list
        heard: frozenset[int] | None = None
        why: str | None = None
        while stop.numbers != heard:  # a signal may come while nodes are asked
            heard = stop.numbers
            why = why_again(code, heard, record, lambda: self.taken(stop), silent)
        if why is None:
            return code
        return self._queue_again(why, code, stop, run_dir, max_requeues, tell)

    def _queue_again(
        self, why: str, code: int, stop: StopRequest, run_dir: Path, max_requeues: int | None, tell: Tell
    ) -> int:
        if not self.is_batch or self._about(stop).get("Requeue", "1") != "1":
            tell(f"{why}: not queued again, as this is no batch job that SLURM requeues; the same command goes on")
            return code
        if max_requeues is not None and self.restarts >= max_requeues:
            tell(f"{why}: not queued again, all {max_requeues} requeues are used up; submitting it again goes on")
            return cli.EXIT_FAILURE
        newest = records.newest_checkpoint(run_dir)
        if self._in_vain(run_dir, newest):
            tell(
                f"{why}: not queued again, {SAME_CHECKPOINT} times it got no further than {newest or 'the beginning'}: "
                "the time limit is too short (save more often: train.save_every), or a node is bad"
            )
            return cli.EXIT_FAILURE
        entry = {"requeue": self.restarts + 1, "job": self.job, "reason": why, "resumes_from": newest}
        try:
            records.note_restart(run_dir, entry)
        except OSError as error:
            tell(f"{run_dir}: the requeue cannot be noted ({error.strerror})")
        tell(f"{why}: job {self.job} is queued again, and goes on from {newest or 'the beginning'}")
        # An srun that still waits for a lost node, or the child that cleans up after it, would end the step of the same
        # number in the job's next stay.
        for who in processes.below(os.getpid()):
            processes.send(who, signal.SIGKILL)
        done = _patiently(stop, "requeue", self.job)  # SLURM ends this process now
        if done.returncode:
            tell(f"SLURM does not queue it again: {_complaint(done)}; submitting it again goes on")
            return cli.EXIT_FAILURE
        return cli.EXIT_OK

    def _in_vain(self, run_dir: Path, newest: str | None) -> bool:
        """Whether the last requeues of this job were all from this same checkpoint."""
        try:
            lines = (run_dir / "restarts.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # there is no run yet: nothing could be noted
            return newest is None and self.restarts >= SAME_CHECKPOINT
        of_job = [note.get("resumes_from") for note in map(_parsed, lines) if note.get("job") == self.job]
        return of_job[-SAME_CHECKPOINT:] == [newest] * SAME_CHECKPOINT

    def _about(self, stop: StopRequest) -> dict[str, str]:
        done = _patiently(stop, "--oneliner", "show", "job", self.job)
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def why_again(
    code: int,
    heard: Collection[int],
    record: records.Record | None,
    taken: Callable[[], str | None],
    silent: Callable[[], list[str]],
) -> str | None:
    """Why a job has to be queued again, None where it has to end.

    SIGUSR1 comes ahead of the time limit. SIGTERM is a stop for good, also after SIGUSR1, unless SLURM sends it to a
    job whose nodes it takes. A run that has finished, a user's mistake and Ctrl-C are ends, and so are failures on
    nodes that still answer. Ranks that lose their connection write SIGTERM too: alone it counts where all went well.
    """
    reason = record.reason if record else None
    finished = code == cli.EXIT_OK and reason == records.FINISHED
    if finished or code == cli.EXIT_USER_ERROR or signal.SIGINT in heard:
        return None
    terminated = signal.SIGTERM in heard
    if (terminated or reason == "SIGTERM") and (why := taken()):
        return why
    if terminated:
        return None
    if signal.SIGUSR1 in heard or reason == "SIGUSR1":
        return "SIGUSR1, as ahead of the time limit"
    if code == cli.EXIT_OK and reason in ("SIGTERM", "SIGINT"):
        return None
    lost = silent()
    return f"lost {', '.join(lost)}" if lost else None


def _ask(stop: StopRequest, *words: str) -> str:
    done = _patiently(stop, *words)
    if done.returncode:
        raise NoAnswerError(f"scontrol {' '.join(words)}: {_complaint(done)}")
    return done.stdout


def _patiently(stop: StopRequest, *words: str) -> subprocess.CompletedProcess[str]:
    """The answer of scontrol, asked again while it fails: a controller may be starting, or busy. Ctrl-C ends that."""
    until = time.monotonic() + ASK_SECONDS
    while True:
        done = _scontrol(*words)
        if done.returncode == 0 or signal.SIGINT in stop.numbers or time.monotonic() + ASK_AGAIN > until:
            return done
        time.sleep(ASK_AGAIN)


def _parsed(line: str) -> dict[str, Any]:
    """A line of restarts.jsonl; nothing where a full disk or a kill has cut it short."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split())


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
