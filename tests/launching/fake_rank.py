"""Stands in for a training program: writes exit.json as it does, and does what --plan says at each start.

--plan: comma-separated, one for each start (the last one again): finish, fail, mistake, hang, die, train,
orphan (train, and stop with the launcher), silent.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--run_dir", type=Path, required=True)
parser.add_argument("--plan", default="finish")
parser.add_argument("--stop_seconds", type=float, default=0.3)
options, _ = parser.parse_known_args()
folder = options.run_dir
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").touch()
rank = os.environ.get("RANK", "0")


def record(reason: str, code: int | None, step: int | None) -> None:
    if rank == "0":
        temporary = folder / ".exit"
        temporary.write_text(json.dumps({"reason": reason, "code": code, "step": step}))
        temporary.replace(folder / "exit.json")


starts = folder / f"starts{rank}"
with starts.open("a") as file:
    file.write(f"{os.getpid()}\n")
plan = options.plan.split(",")
what = plan[min(len(starts.read_text().splitlines()), len(plan)) - 1]
if what == "silent":
    time.sleep(60)
if what == "mistake":
    record("user error: no such thing", 2, None)
    sys.exit(2)

received: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: received.append(number))
record("running", None, 3)
(folder / f"training{rank}").touch()
if what == "fail":
    record("RuntimeError: lost", 1, None)
    sys.exit(1)
if what == "hang":
    record("hang: rank 1", 3, 7)
    sys.exit(3)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "orphan":
    from ardiff.launching.orphans import stop_with_launcher

    assert stop_with_launcher()
while what in ("train", "orphan") and not received:
    time.sleep(0.02)
if received:
    time.sleep(options.stop_seconds)  # the checkpoint
    record(signal.Signals(received[0]).name, 0, 9)
else:
    record("finished", 0, 20)
