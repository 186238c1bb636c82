"""The pool of processes: crashes, hangs and errors cost one item only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_tools.pool import run_in_processes

REPOSITORY = Path(__file__).resolve().parents[2]


def behave(item: str, report) -> None:
    report(f"begins {item}")
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":
        time.sleep(1000)
    if item == "raise":
        raise OSError("no space left")
    report(f"ends {item}")


def test_only_the_bad_items_fail():
    items = ["a", "crash", "b", "hang", "raise", "c"]
    start = time.monotonic()
    events = list(run_in_processes(behave, items, workers=2, timeout=3))
    assert time.monotonic() - start < 40
    values = {item: [e.value for e in events if e.item == i and not e.done] for i, item in enumerate(items)}
    failures = {items[e.item]: e.failure for e in events if e.failure}
    for item in "abc":
        assert values[item] == [f"begins {item}", f"ends {item}"]
    for item in ("crash", "hang", "raise"):
        assert values[item] == [f"begins {item}"]
    assert failures == {
        "crash": "its process died (signal SIGSEGV)",
        "hang": "no answer within 3 s",
        "raise": "OSError: no space left",
    }
    assert sorted(e.item for e in events if e.done) == list(range(6))


def test_leaving_early_ends_the_processes():
    events = run_in_processes(report_pid, [0, 1], workers=2, timeout=60)
    pids = {next(events).value for _ in range(2)}
    events.close()
    assert len(pids) == 2
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def report_pid(_item: int, report) -> None:
    report(os.getpid())
    time.sleep(1000)


def test_processes_end_with_a_killed_parent(tmp_path):
    """Whether Ctrl-C is pressed, which reaches the whole group, or the parent alone is killed."""
    code = """
import sys
from data_tools.pool import run_in_processes
from tests.data_tools.test_worker_pool import report_pid
for event in run_in_processes(report_pid, [0, 1], workers=2, timeout=60):
    print(event.value, flush=True)
"""
    for interrupt in (True, False):
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        pids = [int(process.stdout.readline()) for _ in range(2)]
        if interrupt:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        errors = process.communicate(timeout=30)[1]
        assert errors.count("Traceback") == interrupt  # the parent's own
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
