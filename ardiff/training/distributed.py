"""Processes: who we are, and collectives on the host that never touch the device.

The same program runs under `deepspeed`, `torchrun`, `srun`, `mpirun` and plain `python`; the differences end here.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ardiff.errors import EchoedError, UserError
from ardiff.launching import slurm_step
from ardiff.ports import free_port

log = logging.getLogger("ardiff")
T = TypeVar("T")

# What mpirun calls RANK, WORLD_SIZE and LOCAL_RANK.
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclass
class World:
    """This process among all, and the group of host-side (gloo) collectives."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """True on the process that prints and writes the shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        dist.barrier(group=self.control)

    def meet(self, name: str, meanwhile: Callable[[], None]) -> None:
        """Wait for all ranks, however long some of them work: without a collective, which would time out.

        name: of this meeting, never used before. meanwhile: called several times a second, and signals are heard.
        """
        self.tally(name, 1)
        while self.tally(name) < self.size:
            meanwhile()
            time.sleep(0.1)

    def tally(self, name: str, amount: int = 0) -> int:
        """Add to a number that all ranks share, and read it; not a collective, so any rank may ask at any time."""
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store().add(f"ardiff/{name}", amount)

    def gather(self, value: T) -> list[T]:
        """One (pickled in memory, never stored) object from every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, compute: Callable[[], T]) -> T:
        """Run `compute` on rank 0 and give everyone its result; if it fails, it fails on every rank."""
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                box[0] = compute()
            except Exception as error:
                failure = error
                box[1] = (isinstance(error, UserError), f"{error}")
        dist.broadcast_object_list(box, src=0, group=self.control)
        if failure is not None:
            raise failure
        if box[1] is not None:
            is_users, message = box[1]
            raise EchoedError(message) if is_users else RuntimeError(f"rank 0 failed: {message}")
        return box[0]

    def agree(self, mistake: UserError | None) -> None:
        """If any rank made a mistake, every rank raises it (collective): none waits for one that has gone."""
        mistakes = self.gather(None if mistake is None else str(mistake))
        found = [(rank, text) for rank, text in enumerate(mistakes) if text is not None]
        if found:
            rank, text = found[0]
            everywhere = len({text for _, text in found}) == 1 and len(found) == self.size
            message = text if everywhere or self.size == 1 else f"rank {rank}: {text}"
            raise UserError(message) if self.is_main else EchoedError(message)

    def require_equal(self, what: dict[str, str]) -> None:
        """Refuse to go on unless all ranks say the same of everything in `what` (collective)."""
        answers = self.gather(what)
        for key in what:
            others = [rank for rank, answer in enumerate(answers) if answer[key] != answers[0][key]]
            if others:
                ranks = ", ".join(map(str, others[:8]))
                message = (
                    f"{key} of rank 0 is {answers[0][key]}, but of rank {ranks} {answers[others[0]][key]}: all ranks "
                    "need the same files and settings"
                )
                raise UserError(message) if self.is_main else EchoedError(message)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a small host tensor over all ranks."""
        dist.all_reduce(values, group=self.control)
        return values


def launcher_environment() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from whatever started this process."""
    if "RANK" not in os.environ:
        if all(name in os.environ for name in _MPI):
            if "MASTER_ADDR" in os.environ:
                for own, foreign in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), _MPI, strict=True):
                    os.environ[own] = os.environ[foreign]
                os.environ.setdefault("MASTER_PORT", "29500")
                return
            if int(os.environ[_MPI[1]]) > 1:
                raise UserError(f"{_MPI[1]} = {os.environ[_MPI[1]]} tasks, but MASTER_ADDR is not set: export it")
        elif task := slurm_step.rank_variables(os.environ):
            os.environ.update(task)
            return
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(free_port())
        os.environ.update(alone)
        return
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but {', '.join(missing)} is not: use a launcher, or unset RANK for one process")


def start(num_threads: int, timeout_minutes: float) -> World:
    """Join the other ranks through DeepSpeed; nccl on GPUs, gloo on CPUs.

    num_threads: CPU threads of this rank, 0 for an equal share of the cores.
    """
    launcher_environment()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    # torch 2.13 renamed the collective that DeepSpeed 0.19 calls; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    _set_default_timeout(timeout)
    on_cpu = deepspeed.accelerator.get_accelerator().device_name() == "cpu"
    if on_cpu:
        # Otherwise a C++ extension that training never uses is compiled: minutes, and a crash without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    device = torch.device("cpu")
    if not on_cpu:
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            remedy = "start fewer ranks, or let each see all GPUs of its node (srun without --gpus-per-task)"
            raise UserError(f"local rank {local_rank}, but there are {num_gpus} GPUs: {remedy}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device, control)


def finish() -> None:
    """Leave the group; a rank that just exits makes its peers complain of a lost connection."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_default_timeout(timeout: datetime.timedelta) -> None:
    """ZeRO's collectives run in a clone of the world group that ignores init_distributed's timeout."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    if getattr(distributed_c10d, "default_pg_nccl_timeout", None) is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout
