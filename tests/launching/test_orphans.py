"""Processes that lose their parent."""

import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardiff.launching import orphans, processes
from ardiff.launching.orphans import SUPERVISOR
from ardiff.launching.processes import Identity

ROOT = Path(__file__).resolve().parents[2]
# Says where it is, then whether it has something to watch, and what it gets.
CHILD = """
import os, signal, sys, time
from ardiff.launching import orphans
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
print(os.getpid(), orphans.stop_with_launcher(patience=1.0), flush=True)
while True:
    time.sleep(0.05)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}


def start(variables: dict[str, str]) -> tuple[subprocess.Popen[str], Identity, bool]:
    """A parent and its child, which has begun to watch (or not)."""
    command = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    process, watches = parent.stdout.readline().split()
    who = processes.identity(int(process))
    assert who in processes.below(parent.pid)
    return parent, who, watches == "True"


def ends_within(who: Identity, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while processes.is_running(who):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_rank_asks_itself_to_stop_and_is_ended_where_it_does_not(variables):
    parent, rank, watches = start(variables)
    assert watches
    parent.kill()
    assert parent.stdout.readline() == "SIGTERM\n"
    assert processes.is_running(rank)  # as after any SIGTERM: it may write its checkpoint
    assert ends_within(rank, 20)


def test_a_process_started_by_hand_outlives_its_shell():
    parent, process, watches = start({})
    assert not watches
    parent.kill()
    assert not ends_within(process, 2)
    processes.send(process, 9)
    assert ends_within(process, 5)


def test_the_end_of_submit_counts_even_under_plain_python():
    supervisor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = processes.identity(supervisor.pid)
    parent, rank, watches = start({SUPERVISOR: f"{who.process}:{who.started}"})
    assert watches
    supervisor.kill()
    supervisor.wait()
    assert parent.stdout.readline() == "SIGTERM\n"
    assert ends_within(rank, 20)
    parent.wait(timeout=5)


@pytest.mark.parametrize("value", ["", "1", "x:y", f"{2**22 + 1}:5", "1:1"])
def test_a_supervisor_that_is_not_of_this_machine_is_nobody(value):
    parent, process, watches = start({SUPERVISOR: value})
    assert not watches
    processes.send(process, 9)
    parent.wait(timeout=5)


def test_helpers_of_ranks_are_no_ranks():
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    launcher = (
        "import os, subprocess, sys\n"
        f"ranks = [subprocess.Popen([sys.executable, '-c', {sleeper!r}], env={{**os.environ, 'RANK': str(rank)}},"
        " stdin=subprocess.PIPE) for rank in range(2)]\n"
        "print(*(rank.pid for rank in ranks), flush=True)\n"
        "[rank.wait() for rank in ranks]\n"
    )
    top = subprocess.Popen([sys.executable, "-c", launcher], env={}, stdout=subprocess.PIPE, text=True)
    expected = {int(word) for word in top.stdout.readline().split()}
    until = time.monotonic() + 20
    while len(processes.below(top.pid)) < 4:  # 2 ranks, each with a helper
        assert time.monotonic() < until
        time.sleep(0.05)
    living = processes.below(top.pid)
    assert {who.process for who in processes.ranks(living)} == expected
    for who in living:
        processes.send(who, 9)
    top.wait(timeout=5)
    assert not any(map(processes.is_running, living))


def test_a_rank_has_as_long_for_its_checkpoint_as_under_submit():
    default = inspect.signature(orphans.stop_with_launcher).parameters["patience"].default
    command = [sys.executable, "launch/submit.py", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert default == 600 and f"is killed (default {default / 60:g})" in " ".join(told.split())
