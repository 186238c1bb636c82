"""Running programs as a user would, and reading what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ardiff.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# The fields of metrics.jsonl that are a function of the step alone.
EXACT = (
    "step",
    "samples",
    "loss",
    "grad_norm",
    "lr",
    "skipped_steps",
    "bad_samples",
    "loss_by_decile",
    "loss_by_frame",
)

# A DiT for latents of 2 x 4 numbers: a step takes milliseconds, so start-up dominates.
SMALL = [
    *("--config", "tiny", "--model.hidden_size", "32", "--model.num_heads", "2", "--model.depth", "2"),
    *("--model.tokens_per_frame", "2", "--model.num_frames", "4", "--train.sample_every", "0"),
    *("--train.log_every", "1", "--train.num_threads", "1"),
]


def launcher(kind: str, ranks: int) -> list[str]:
    if kind == "python":
        assert ranks == 1
        return [sys.executable]
    if kind == "ranks":
        return [sys.executable, "-m", "tests.end_to_end.ranks", str(ranks)]
    if kind == "torchrun":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    if kind == "submit":
        own = ("--launcher", "torchrun", "--ranks", str(ranks), "--max_restarts", "3")
        return [sys.executable, "launch/submit.py", *own, "--"]
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]


def environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    # Tests run side by side: threads that wait for work must not keep the cores busy, and forks have none (ranks.py).
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
    return {**kept, **quiet, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PATH": path}


def start(command: list[str], output: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    """A process group of its own, so that all of it can be signalled."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(command: list[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and output; the whole group is killed on a time-out."""
    process = start(command)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill_group(process)
    return process.returncode, output


def run_each(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit codes and outputs of Python programs that are short: mistakes and the like, started together (each.py)."""
    assert all(command[0] == sys.executable for command in commands)
    given, results = folder / "commands.json", folder / "results.json"
    given.write_text(json.dumps([command[1:] for command in commands]))
    code, output = run([sys.executable, "-m", "tests.end_to_end.each", str(given), str(results)])
    assert code == 0, output
    return [(code, output) for code, output in json.loads(results.read_text())]


def kill_group(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Signal a process and its group; SIGKILL takes all that descends from it: ranks under torchrun leave the group."""
    below = descendants(process.pid) if number == signal.SIGKILL else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Children of a process, their children and so on."""
    children: dict[int, list[int]] = {}
    for child, words in _proc("stat"):
        parent = words.rpartition(b")")[2].split()[1]
        children.setdefault(int(parent), []).append(child)
    found = list(children.get(pid, []))
    for child in found:  # grows while it is walked
        found += children.get(child, [])
    return found


def processes_of(run_dir: Path) -> dict[int, int | None]:
    """Live processes with this run_dir on their command line: process id -> rank, None for launchers."""
    found: dict[int, int | None] = {}
    for pid, line in _proc("cmdline"):
        if os.fsencode(run_dir) not in line.split(b"\0"):
            continue
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(value[5:]) for value in variables if value.startswith(b"RANK=")]
            found[pid] = ranks[0] if ranks else None
    return found


def _proc(name: str) -> Iterator[tuple[int, bytes]]:
    """What the kernel says under that name of every process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended in the meantime
                yield int(folder.name), (folder / name).read_bytes()


def train(run_dir: Path, shards: Path, *extra: str, kind: str = "ranks", ranks: int = 2) -> list[str]:
    return [
        *launcher(kind, ranks),
        *("launch/train.py", "--ds_config", "ds_configs/zero2_cpu.json", *SMALL),
        *("--data.shards", str(shards), "--run_dir", str(run_dir), *extra),
    ]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact(run_dir: Path) -> list[list]:
    return [[line[key] for key in EXACT] for line in metrics(run_dir)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until metrics.jsonl holds that step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = run_dir / "metrics.jsonl"
        if file.is_file() and file.read_bytes().count(b"\n") >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached within {timeout} s")


def exit_record(run_dir: Path) -> dict:
    return json.loads((run_dir / "exit.json").read_text())


def with_other_shards(command: list[str], shards: Path) -> list[str]:
    """A training command whose second rank finds its data elsewhere, through a program beside these shards."""
    program = shards.parent / "rank1.py"
    program.write_text(
        "import os, sys, runpy\n"
        "if os.environ['RANK'] == '1':\n"
        f"    sys.argv[sys.argv.index('--data.shards') + 1] = {str(shards)!r}\n"
        "sys.argv[0] = 'launch/train.py'\n"
        "runpy.run_path('launch/train.py', run_name='__main__')\n"
    )
    return [str(program) if word == "launch/train.py" else word for word in command]
