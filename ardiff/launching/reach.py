"""Send a signal to a job on the host that this runs on, or end all that is left of it there.

    python -m ardiff.launching.reach JOB SIGNAL

The job's processes are those with its mark in their environment, so it is found however it was started. A signal goes
to the topmost one, which passes it on; SIGKILL goes to all, until none is left.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from ardiff.launching import processes
from ardiff.launching.carriers import JOB
from ardiff.launching.processes import Identity

PATIENCE = 10.0  # seconds until SIGKILL must have worked


def members(job: str) -> list[Identity]:
    """The living processes of a job on this machine that are ours to signal."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    marked = [number for number in numbers if processes.environment(number).get(JOB) == job]
    return [who for number in marked if number != os.getpid() and (who := processes.identity(number)) is not None]


def send(job: str, number: int) -> int:
    """Pass a signal to the topmost processes of a job; returns how many there are."""
    found = members(job)
    numbers = {who.process for who in found}
    topmost = [who for who in found if processes.parent(who) not in numbers]
    for who in topmost:
        processes.send(who, number)
    return len(topmost)


def end(job: str) -> list[Identity]:
    """SIGKILL for all processes of a job; returns those that are left."""
    until = time.monotonic() + PATIENCE
    while (found := members(job)) and time.monotonic() < until:
        for who in found:
            processes.send(who, signal.SIGKILL)
        time.sleep(0.1)
    return found


def main() -> int:
    """The command line. Exit code 1: nobody is there to hear it, or (named) does not end."""
    job, number = sys.argv[1], int(sys.argv[2])
    if number != signal.SIGKILL:
        return 0 if send(job, number) else 1
    left = end(job)
    if left:
        print(", ".join(map(processes.describe, left)))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
