"""What SLURM's variables say to a program that srun started as one task of many: `srun python launch/train.py ...`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ardiff.errors import UserError

PORTS = range(10000, 30000)  # below those that Linux gives out by itself


def rank_variables(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task; None where srun started
    no more than this one.

    Raises UserError in a batch script that was given several tasks, where srun is missing.
    """
    # The shell of an interactive job is a step of one task too, whatever its SLURM_NTASKS.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" not in environment or tasks == "1":
        return None
    if "SLURM_STEP_ID" not in environment:
        raise UserError(
            f"SLURM_NTASKS = {tasks}, but this is the batch script itself, which runs once: start the program with "
            "srun or launch/submit.py --carrier srun, or unset SLURM_NTASKS for one process"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    shape = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(shape)[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(port(environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"])),
    }


def first_host(nodes: str) -> str:
    """The first name of a list such as "gpu[07-12,20],login": gpu07; of "rack[1-2]n[3-4]" it is rack1n3."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def tasks_per_node(shape: str) -> list[int]:
    """Tasks of every node: "8(x2),4" means 8 on each of two nodes and 4 on the third."""
    found: list[int] = []
    for part in shape.split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        found += [int(tasks)] * int(times or 1)
    return found


def port(job: str, step: str) -> int:
    """A port that all ranks of a step derive for themselves, another one for every job and step."""
    numbers = [int(text) if text.isdigit() else 0 for text in (job, step)]
    return PORTS[(37 * numbers[0] + numbers[1]) % len(PORTS)]
