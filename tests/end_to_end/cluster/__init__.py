"""Several machines on one: nodes with addresses, processes and ssh of their own, which share the disk as by NFS.

Everything lies in namespaces (network, processes, mounts, host name, shared memory) that live as long as one process,
the hub. The hub ends when the program that entered `Cluster` ends, in whatever way, and takes all of it along: nothing
of this machine is changed, and any number of clusters run side by side with the same names and addresses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest
from processes import ROOT, environment

from ardiff.launching.processes import below, send

HERE = Path(__file__).resolve().parent
START_SECONDS = 30.0
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
# In .ci/run nothing may be left out silently.
REQUIRED = "ARDIFF_REQUIRE_CLUSTER"
_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")


@functools.cache
def why_not() -> str | None:
    """The reason why no cluster can be made on this machine; None where one can."""
    if not sys.platform.startswith("linux"):
        return "a cluster of namespaces needs Linux"
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=_paths()) is None}
    if missing:
        return f"a cluster of namespaces needs the packages {' '.join(sorted(missing))}"
    probe = "ip link add name probe type bridge && mount -t tmpfs tmpfs /run"
    command = ["unshare", *_NAMESPACES, "sh", "-c", probe]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return f"no permission for namespaces: {done.stderr.strip()}" if done.returncode else None


def need(reason: str | None) -> None:
    """Skip the test for that reason, if there is one; fail where the environment says that it must run."""
    if reason is not None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)


class Program(subprocess.Popen[str]):
    """A program on a node; signals reach the program itself, not the process that waits for it outside."""

    def send_signal(self, sig: int) -> None:
        inside = below(self.pid)[:1]
        if inside:
            send(inside[0], sig)
        else:
            super().send_signal(sig)


class Cluster:
    """Nodes node1, node2, ... from entering to leaving the context.

    `names` and `addresses` (of every name) are ready at once; `home` is the home folder of the nodes' root, the same
    one on all of them. A program that a node starts sees a terminal's environment, with the virtual environment active;
    one that comes by ssh sees a bare one.
    """

    def __init__(self, nodes: int = 2) -> None:
        assert 1 <= nodes <= 200
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, 1)}
        self._hub: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="ardiff-cluster-"))
        self.home = self.folder / "home"
        try:
            _write_settings(self.folder, self.home, self.addresses)
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._hub is not None:
            assert self._hub.stdin is not None and self._hub.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._hub.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._hub.wait(timeout=10)
            self._hub.kill()
            self._hub.wait()
            self._hub.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        log = self.folder / "hub.log"
        words = ["unshare", *_NAMESPACES, "bash", str(HERE / "hub.sh"), str(len(self.names)), str(self.folder)]
        pipe = subprocess.PIPE
        with log.open("w") as errors:
            self._hub = subprocess.Popen(
                words, env=_environment(), stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True
            )
        assert self._hub.stdout is not None
        ready, _, _ = select.select([self._hub.stdout], [], [], START_SECONDS)
        if not ready or self._hub.stdout.readline() != "ready\n":
            logs = [path.read_text() for path in sorted(self.folder.glob("*.log"))]
            raise RuntimeError("the cluster did not start:\n" + "\n".join(logs))
        self._first: dict[str, int] = {}
        for who in below(self._hub.pid):
            match _words(who.process):
                case ["bash", script, *_] if script.endswith("hub.sh"):
                    self._first["hub"] = who.process
                case ["bash", script, number, *_] if script.endswith("node.sh"):
                    self._first[f"node{number}"] = who.process
        assert set(self._first) == {"hub", *self.names}, self._first

    def hostfile(self, slots: int = 1, names: Sequence[str] | None = None) -> Path:
        """A hostfile of these nodes, or of all, with that many slots each."""
        chosen = self.names if names is None else names
        path = self.folder / f"hostfile-{'-'.join(chosen)}-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in chosen))
        return path

    def start(
        self,
        node: str,
        words: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        output: int | IO[str] = subprocess.PIPE,
    ) -> Program:
        """Start a program on a node; stdout and stderr go to `output` together."""
        inside = ["env", "-C", str(cwd), *(str(word) for word in words)]
        variables = {**_environment(), **self._variables, **(env or {})}
        command = self._enter(node, "--net", "--uts", "--ipc", "--pid", "--mount")
        return Program(
            [*command, *inside],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        node: str,
        words: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a node to its end; stdout holds stderr too. On a time-out all below it is killed."""
        program = self.start(node, words, env, cwd)
        try:
            output, _ = program.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            for who in below(program.pid):
                send(who, 9)
            output, _ = program.communicate()
            raise AssertionError(f"{words} on {node} did not end within {timeout} s:\n{output}") from late
        return subprocess.CompletedProcess(list(words), program.returncode, output)

    def cut(self, node: str) -> None:
        """Pull the cable of a node: no packet goes in or out, and nobody is told."""
        self._switch("ip", "link", "set", _port(node), "down")

    def mend(self, node: str) -> None:
        """Plug the cable in again."""
        self._switch("ip", "link", "set", _port(node), "up")

    def slow(self, node: str, rate: str = "10mbit") -> None:
        """Let a node's link carry that much in either direction, in tc's units, from now on."""
        limit = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        self._switch("tc", "qdisc", "replace", "dev", _port(node), *limit)
        _check([*self._enter(node, "--net"), "tc", "qdisc", "replace", "dev", "eth0", *limit])

    def kill(self, node: str) -> None:
        """Kill every process of a node at once, sshd too; peers see closed connections, `boot` brings it back."""
        _check([*self._enter(node, "--pid", "--mount"), "bash", "-c", "kill -KILL -1"])

    def boot(self, node: str) -> None:
        """Start sshd on a node again after `kill`."""
        log = self.folder / f"{node}.log"
        _check([*self._enter(node, "--net", "--uts", "--ipc", "--pid", "--mount"), "/usr/sbin/sshd", "-E", str(log)])
        address = f"/dev/tcp/{self.addresses[node]}/22"
        self._switch("timeout", "10", "bash", "-c", f"until (: <{address}) 2>/dev/null; do sleep 0.05; done")

    def processes(self, node: str, marker: str = "") -> dict[int, list[str]]:
        """Processes of a node, the first one aside, with that text in their words or variables: id outside -> words."""
        first = self._first[node]
        space, found = Path(f"/proc/{first}/ns/pid").readlink(), {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == first:
                continue
            with contextlib.suppress(OSError):  # it has ended in the meantime, or is the kernel's own
                if (folder / "ns" / "pid").readlink() == space:
                    texts = [(folder / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
                    if any(marker in text.replace("\0", " ") for text in texts):
                        found[int(folder.name)] = texts[0].split("\0")[:-1]
        return found

    @property
    def _variables(self) -> dict[str, str]:
        return {"HOME": str(self.home), "USER": "root", "LOGNAME": "root", "TMPDIR": "/run/tmp", "OMP_NUM_THREADS": "1"}

    def _enter(self, who: str, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self._first[who]), *namespaces, "--"]

    def _switch(self, *words: str) -> None:
        _check([*self._enter("hub", "--net"), *words])


def _write_settings(folder: Path, home: Path, addresses: Mapping[str, str]) -> None:
    """What lies over /etc on every node; root gets a home of its own, so that this machine's keys stay out of it."""
    etc, ssh = folder / "etc", folder / "etc" / "ssh"
    folder.chmod(0o755)
    ssh.mkdir(parents=True)
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    hosts = [f"{address} {name}" for name, address in addresses.items()]
    (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *others, ""]))
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # not locked: sshd would refuse it
    key, host_key = home / ".ssh" / "id_ed25519", ssh / "host_key"
    for path in (key, host_key):
        _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])
    (home / ".ssh" / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    server = {
        "HostKey": "/etc/ssh/host_key",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "MaxStartups": "100",
        # Nodes without a GPU, and room on this machine for what runs beside them
        "SetEnv": "CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TMPDIR=/run/tmp",
    }
    client = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
    for name, settings in {"sshd_config": server, "ssh_config": client}.items():
        (ssh / name).write_text("".join(f"{option} {value}\n" for option, value in settings.items()))


def _paths() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _environment() -> dict[str, str]:
    variables = environment()
    return {**variables, "PATH": os.pathsep.join([variables["PATH"], "/usr/sbin", "/sbin"])}


def _check(command: list[str]) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _port(node: str) -> str:
    return node.replace("node", "port")


def _words(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
