"""SLURM on the nodes of a cluster: munged and slurmctld on the first one, slurmd on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import Cluster, Program

TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
START_SECONDS = 30.0
REQUEUE_SECONDS = 5  # that a requeued job waits before it may start again: the least; 120 by default
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def why_not() -> str | None:
    """The reason why SLURM cannot run on this machine, beyond what a cluster needs; None where it can."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None}
    return f"SLURM needs the packages {' '.join(sorted(missing))}" if missing else None


class Slurm:
    """A SLURM of these nodes from entering to leaving the context; every file of it lies in the cluster's folder."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.controller = cluster.names[0]
        self.folder = cluster.folder / "slurm"
        self.variables = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[Program] = []

    def __enter__(self) -> Slurm:
        self._configure()
        try:
            key, socket = self.folder / "munge.key", self.folder / "munge.socket"
            places = ("--key-file", key, "--socket", socket, "--pid-file", self.folder / "munged.pid")
            logs = ("--log-file", self.folder / "munged.log", "--seed-file", self.folder / "munged.seed")
            # --force: pytest's folders are closed to other users
            self._daemon(self.controller, "munged", "--foreground", "--force", *places, *logs)
            self._wait_for(socket.exists, "munged")
            self._daemon(self.controller, "slurmctld", "-D", "-i")
            for node in self.cluster.names:
                self.boot(node)
            self._wait_for(self._all_idle, "slurmctld and slurmd")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            daemon.kill()  # what they have started ends with its node
        for daemon in self._daemons:
            daemon.wait()

    def run(self, *words: str | Path, node: str | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a program where jobs are submitted: the first node, or another one; as `Cluster.run`."""
        more["env"] = {**self.variables, **(more.get("env") or {})}
        return self.cluster.run(node or self.controller, words, **more)

    def boot(self, node: str) -> None:
        """Start slurmd on a node, at first and after `Cluster.kill`."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def ask(self, *words: str | Path) -> str:
        """The output of a SLURM command that must succeed."""
        done = self.run(*words, timeout=30)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Reason, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int, states: Sequence[str] = ENDED, restarts: int = 0, timeout: float = 180) -> str:
        """Until a job that was started again so often is in one of these states; returns it."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(number)
            state = job["JobState"]
            if state in states and int(job["Restarts"]) >= restarts:
                return state
            assert state not in ENDED and time.monotonic() < deadline, job
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of what the daemons told, for a test that fails."""
        files = sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def _daemon(self, node: str, *words: str | Path) -> None:
        with (self.folder / f"{words[0]}.{node}.out").open("w") as output:
            self._daemons.append(self.cluster.start(node, words, self.variables, output=output))

    def _all_idle(self) -> bool:
        done = self.run("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T", timeout=30)
        return done.stdout.split() == ["idle"] * len(self.cluster.names)

    def _wait_for(self, ready: Any, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"{what} did not start:\n{self.logs()}")
            time.sleep(0.05)

    def _configure(self) -> None:
        folder, names = self.folder, self.cluster.names
        folder.mkdir(mode=0o755)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        settings = {
            "ClusterName": "ardiff",
            "SlurmctldHost": self.controller,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire={REQUEUE_SECONDS}",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool.%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=1,sched_interval=1",
            "ReturnToService": 2,
            "KillWait": 5,
            "SlurmdTimeout": 120,  # seconds until a node that is silent is down
            "PreemptMode": "REQUEUE",
            "PreemptType": "preempt/partition_prio",
            "MailProg": "/bin/true",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [f"NodeName={name} NodeAddr={self.cluster.addresses[name]} CPUs=2 RealMemory=2000" for name in names]
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60")
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF")
        (folder / "slurm.conf").write_text("\n".join([*lines, ""]))
        # Version 2 is not to be found in a namespace, where /sys is mounted anew.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "state").mkdir(mode=0o700)
        for name in names:
            (folder / f"spool.{name}").mkdir()
