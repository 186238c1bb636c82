"""Asking every host, at the same time, whether the job can run there, and taking spares for those where it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardiff.launching import hostcheck
from ardiff.launching.carriers import CONNECT_SECONDS, Carrier, shell_line
from ardiff.launching.hostfile import Host, in_place_of, names

MODULE = "ardiff.launching"
PATIENCE = CONNECT_SECONDS + 60.0  # seconds for an answer: a cold network disk takes a while to load a program
MEETING = 10.0  # seconds in which all hosts have to reach the first one
_SIMULTANEOUS = 64
Facts = Mapping[str, Any]  # hostcheck.facts


@dataclass(frozen=True)
class Answer:
    """What came back from a host: facts, or a problem (one line)."""

    facts: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Choice:
    """The hosts that a job can run on, what they said, and for people what was changed, and what is wrong."""

    hosts: list[Host]
    facts: dict[str, Mapping[str, Any]]
    changes: list[str]
    problems: list[str]  # of `missing`, one line each
    missing: list[Host]  # the job's hosts that cannot be used and have no spare
    spares: list[str]  # problems of spare hosts


class Hosts:
    """A way to ask hosts."""

    def __init__(self, carrier: Carrier, shared: Path | None) -> None:
        """shared: a folder that all hosts have to see as this one does."""
        self.carrier = carrier
        self.shared = shared
        self.meeting = MEETING

    def ask(self, host: Host, module: str, *words: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Run a module of this package on a host, and wait. Exit code 255: the host cannot be reached."""
        line = shell_line(
            hostcheck.ROOT,
            [sys.executable, "-m", f"{MODULE}.{module}", *words],
            {"PYTHONPATH": str(hostcheck.ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        return run_quietly(self.carrier, host.name, line, patience)

    def survey(self, hosts: Sequence[Host]) -> dict[str, Answer]:
        """Facts of all hosts, and what is wrong with them; by name."""
        with token(self.shared) as (folder, secret), ThreadPoolExecutor(_SIMULTANEOUS) as pool:
            words = ["--token", secret, "--folder", str(Path.cwd()), *(["--shared", str(folder)] if folder else [])]
            answers = pool.map(lambda host: self._answer(host, "facts", *words), hosts)
            found = dict(zip(names(hosts), answers, strict=True))
        ours = hostcheck.facts(None, "")
        some_gpus = any(answer.facts.get("gpus") for answer in found.values())
        return {host.name: _judged(host, found[host.name], ours, self.shared, some_gpus) for host in hosts}

    def choose(self, hosts: Sequence[Host], spares: Sequence[Host], excluded: Mapping[str, str]) -> Choice:
        """The hosts in their order, a spare in place of each that has a problem. excluded: known problems, by name."""
        answers = self.survey([host for host in [*hosts, *spares] if host.name not in excluded])
        answers |= {name: Answer({}, problem) for name, problem in excluded.items()}
        found: list[Host] = []
        changes: list[str] = []
        missing: list[Host] = []
        left = [spare for spare in spares if answers[spare.name].problem is None]
        for host in hosts:
            problem = answers[host.name].problem
            spare = in_place_of(host, left) if problem else None
            if problem is None:
                found.append(host)
            elif spare is None:
                missing.append(host)
            else:
                left = [other for other in left if other.name != spare.name]
                found.append(spare)
                changes.append(f"{problem}; {spare.name} takes its place")
        problems = [answers[host.name].problem or "" for host in missing]
        idle = [answers[spare.name].problem for spare in spares]
        facts = {name: answer.facts for name, answer in answers.items()}
        return Choice(found, facts, changes, problems, missing, [f"spare {problem}" for problem in idle if problem])

    def meet(self, hosts: Sequence[Host], port: int, addresses: Sequence[str]) -> tuple[str, dict[str, str]]:
        """Whether all hosts reach the first one at that port, and at which of its names and addresses.

        Returns the address that most of them reach, and what is wrong with hosts, by name.
        """
        secret = secrets.token_hex(8)
        words = ("--token", secret, "--port", str(port), "--seconds", str(self.meeting))
        first, others = hosts[0], hosts[1:]
        with ThreadPoolExecutor(len(hosts)) as pool:  # the first one does not listen for long
            listening = pool.submit(self._answer, first, "listen", *words, "--visitors", str(len(others)))
            visits = list(pool.map(lambda host: self._answer(host, "visit", *words, "--names", *addresses), others))
            listened = listening.result()
        if listened.problem or "error" in listened.facts:
            return "", {
                first.name: listened.problem or f"{first.name}: {listened.facts['error']}; is --master_port taken?"
            }
        problems = {}
        for host, visit in zip(others, visits, strict=True):
            if visit.problem or "error" in visit.facts:
                why = f"{host.name}: does not reach {first.name} at port {port} ({visit.facts.get('error')})"
                problems[host.name] = visit.problem or f"{why}: give --master_addr, or open the ports between the hosts"
        reached = [visit.facts["reached"] for visit in visits if "reached" in visit.facts]
        for_all = [address for address in reached if not hostcheck.is_loopback(address)] or reached
        return (Counter(for_all).most_common(1)[0][0] if reached else ""), problems

    def _answer(self, host: Host, question: str, *words: str) -> Answer:
        try:
            result = self.ask(host, "hostcheck", question, *words)
        except subprocess.TimeoutExpired:
            return Answer({}, f"{host.name}: did not answer within {PATIENCE:g} s")
        last = (result.stderr.strip().splitlines() or ["without a word"])[-1].strip()
        if self.carrier.lost(result.returncode):
            how = "without a password" if "ermission denied" in last else f"by {self.carrier.name}"
            return Answer({}, f"{host.name}: cannot be reached {how} ({last})")
        for line in reversed(result.stdout.splitlines()):
            if line.startswith(hostcheck.ANSWER):
                return Answer(json.loads(line.removeprefix(hostcheck.ANSWER)))
        where = f"{hostcheck.ROOT} and {sys.executable} have to be there, as they are here"
        return Answer({}, f"{host.name}: {last} (exit code {result.returncode}); {where}")


def run_quietly(carrier: Carrier, host: str, line: str, patience: float) -> subprocess.CompletedProcess[str]:
    """Run a line on a host and collect its output; out of reach of a terminal's Ctrl-C. Raises TimeoutExpired."""
    return subprocess.run(
        carrier.command(host, line),
        env={**os.environ, **carrier.environment()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=patience,
        start_new_session=True,
    )


def shared_folder(run_dir: Path | None) -> Path | None:
    """Where run_dir is, or will be: itself if a run or a disk is there, else the nearest folder above that exists."""
    if run_dir is None:
        return None
    run_dir = run_dir.absolute()
    if (run_dir / "config.yaml").is_file() or run_dir.is_mount():
        return run_dir
    return next(folder for folder in run_dir.parents if folder.is_dir())  # run_dir itself is to stay as it is


@contextlib.contextmanager
def token(shared: Path | None) -> Iterator[tuple[Path | None, str]]:
    """A folder in `shared` with a file that only this process knows the contents of."""
    secret = secrets.token_hex(8)
    if shared is None:
        yield None, secret
        return
    folder = shared / f".ardiff-{secret}"
    folder.mkdir(mode=0o700)
    try:
        (folder / hostcheck.TOKEN).write_text(secret)
        yield folder, secret
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warnings(hosts: Sequence[Host], facts: Mapping[str, Facts], variables: Mapping[str, str]) -> list[str]:
    """What may keep the ranks from working together although the hosts do."""
    found: list[str] = []
    machines: dict[str, list[str]] = {}
    for host in hosts:
        about = facts[host.name]
        machines.setdefault(f"{about['host']} {about['interfaces']}", []).append(host.name)
        resolved = about["resolves_to"]
        if "GLOO_SOCKET_IFNAME" not in variables and all(map(hostcheck.is_loopback, resolved)):
            to = ", ".join(resolved) or "nothing"
            found.append(
                f"warning: {host.name}: its own name {about['host']} resolves to {to}, where other hosts cannot reach "
                f"it: mend /etc/hosts there, or set GLOO_SOCKET_IFNAME (one of {', '.join(about['interfaces'])})"
            )
    for same in machines.values():
        if len(same) > 1:
            found.append(f"warning: {', '.join(same)} are the same machine; their ranks share its GPUs and cores")
    first = facts[hosts[0].name]["interfaces"]
    if len(first) > 1 and not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & set(variables):
        listed = ", ".join(f"{name} {address}" for name, address in first.items())
        found.append(
            f"warning: {hosts[0].name} has several networks ({listed}): set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
            "if the ranks should take a certain one"
        )
    return found if len(hosts) > 1 else []


def addresses_of(host: Host, facts: Mapping[str, Any]) -> list[str]:
    """Names and addresses under which others may reach a host, the likeliest first."""
    name = host.name.rpartition("@")[2]
    found = [name, facts["address"], *facts["interfaces"].values(), facts["host"]]
    return [word for word in dict.fromkeys(found) if word and not hostcheck.is_loopback(word)]


def _judged(host: Host, answer: Answer, ours: Mapping[str, Any], shared: Path | None, some_gpus: bool) -> Answer:
    """The answer with the first problem that is in its facts."""
    facts = answer.facts
    if answer.problem:
        return answer
    problem = None
    if facts["python"] != ours["python"]:
        problem = f"Python {facts['python']}, here {ours['python']}"
    elif facts["packages"] != ours["packages"]:
        problem = f"has {_listed(facts['packages'])}; here {_listed(ours['packages'])}"
    elif facts["source"] != ours["source"]:
        commits = f"commit {facts['commit'] or 'unknown'} there, {ours['commit'] or 'unknown'} here"
        commits = "changed since the commit" if facts["commit"] == ours["commit"] else commits
        problem = f"{hostcheck.ROOT} holds other program files than here ({commits}); make them equal"
    elif not facts["shared"]:
        problem = f"does not see this host's {shared}; --run_dir has to be on storage that all hosts share"
    elif not facts["folder"]:
        problem = f"has no folder {Path.cwd()}, where this is started; start it from one that all hosts have"
    elif some_gpus and facts["gpus"] < host.slots:  # without any, ranks are processes on CPUs
        problem = f"slots={host.slots}, but it has {facts['gpus']} GPU(s)"
    return Answer(facts, f"{host.name}: {problem}" if problem else None)


def _listed(packages: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
