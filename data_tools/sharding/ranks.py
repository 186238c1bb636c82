"""The processes that share an extraction: none waits for one that has failed, and their progress adds up.

Only the host-side backend gloo is used, and nothing at all by a process that is alone.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ardiff.cli import as_user_error
from ardiff.errors import UserError
from ardiff.training.distributed import World, launcher_environment
from data_tools.sharding.progress import Progress

T = TypeVar("T")
MEETING = datetime.timedelta(minutes=30)  # for all processes to start
LONGEST = datetime.timedelta(days=20)  # that one may wait for the slowest; about the most that gloo can count
FRAMES, FAILED = "frames", "failed"


class RankGone(Exception):  # noqa: N818 (it is not an error of this process)
    """Another process has ended without a word, so there is nobody to wait for."""


@dataclass
class Ranks:
    """This process among all; `world` and `store` are None where it is alone."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    world: World | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """True on the process that prints and writes what all share."""
        return self.rank == 0

    def agree(self, mistake: UserError | None) -> None:
        """If any process made a mistake, all of them raise it (collective); rank 0 tells it."""
        if self.world is not None:
            self.world.agree(mistake)
        elif mistake is not None:
            raise mistake

    def from_main(self, compute: Callable[[], T]) -> T:
        """Run `compute` on rank 0 and give everyone its result; if it fails, it fails everywhere."""
        if self.world is None:
            return compute()

        def checked() -> T:  # a full disk is the user's to mend, and must be told in one line by all
            try:
                return compute()
            except OSError as error:
                raise as_user_error(error) or error from error

        return self.world.from_main(checked)

    def gather(self, value: T, meanwhile: Callable[[], object] = lambda: None) -> list[T]:
        """One value from every process, on every process; `meanwhile` is called every second until they are there.

        Raises RankGone when one of them will never come.
        """
        if self.world is None:
            return [value]
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.world.gather, value)
            while True:
                try:
                    return coming.result(timeout=1)
                except NotYet:
                    meanwhile()
                except RuntimeError as error:
                    raise RankGone(str(error)) from error

    def add_frames(self, frames: int) -> int:
        """Count frames that this process has done; returns how many all have done together."""
        return frames if self.store is None else self.store.add(FRAMES, frames)

    def fail(self) -> None:
        """Let the others know that this process cannot go on: they stop and come to `gather`."""
        if self.store is not None:
            self.store.set(FAILED, "yes")

    def others_failed(self) -> bool:
        """Whether any process has called `fail`."""
        return self.store is not None and self.store.check([FAILED])


class FrameCounter:
    """Adds up the frames of all ranks, about once per second, for the progress that rank 0 shows."""

    def __init__(self, progress: Progress, ranks: Ranks) -> None:
        self._progress, self._ranks, self._untold, self._told = progress, ranks, 0, 0
        self._before = progress.done

    def add(self, frames: int) -> None:
        """This process has done so many more."""
        self._untold += frames
        if self._ranks.size == 1:
            self._tell()

    def tell_and_ask(self) -> bool:
        """Tell what was done since the last time; returns whether another rank has failed."""
        self._tell()
        return self._ranks.others_failed()

    def _tell(self) -> None:
        self._told += self._untold
        together = self._ranks.add_frames(self._untold) if self._ranks.size > 1 else self._told
        self._untold = 0
        self._progress.set(self._before + together)


def join() -> Ranks:
    """Meet the other processes that torchrun, deepspeed, srun or mpirun started, if there are any."""
    before = dict(os.environ)
    launcher_environment()
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = _local_size()
    if size == 1:
        os.environ.clear()
        os.environ.update(before)  # nothing that the caller starts shall take itself for a part of this
        return Ranks(rank, size, local_rank, local_size)
    base, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    dist.init_process_group("gloo", store=base, rank=rank, world_size=size, timeout=MEETING)
    control = dist.new_group(backend="gloo", timeout=LONGEST)
    world = World(rank, size, local_rank, local_size, torch.device("cpu"), control)
    return Ranks(rank, size, local_rank, local_size, world, dist.PrefixStore("extract_latents", base))


def leave() -> None:
    """Leave the others in peace."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of_cores(ranks: Ranks) -> int:
    """Cores for this process: an equal share of those that it may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_size)


def _local_size() -> int:
    """Processes of this program that share this machine's cores; srun gives each its own."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1
