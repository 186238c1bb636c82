"""Start a program on several ranks of this machine: `python -m tests.end_to_end.ranks 2 launch/train.py ...`

Does what torchrun does, for tests in which the launcher is not the subject, in half of its time: everything heavy is
imported once, and the ranks are forks. The exit code is 0 where all ranks end with 0, and else 1.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

# All that the programs import, and nothing that starts threads.
import deepspeed  # noqa: F401
import torch._dynamo  # torch's optimizers load it
import torch.utils.tensorboard  # noqa: F401

from ardiff.ports import free_port
from ardiff.training import program  # noqa: F401
from ardiff.training.adamw import import_muon_uncompiled


def main() -> int:
    """The launcher; in a rank, the program."""
    number, (path, *options) = int(sys.argv[1]), sys.argv[2:]
    import_muon_uncompiled()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose threads"
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number))
    running = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = [path, *options]
            sys.path[0] = str(Path(path).resolve().parent)
            runpy.run_path(path, run_name="__main__")
            return 0
        running.append(child)
    return wait(running)


def wait(running: list[int]) -> int:
    """Until all have ended; as soon as one has failed the others are told to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the ranks are of the same process group, and hear it themselves
        signal.signal(number, lambda *_: None)
    failed = False
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
