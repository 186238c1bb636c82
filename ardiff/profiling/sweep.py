"""Which micro-batch, with or without activation checkpointing, is fastest and fits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ardiff.config import Config
from ardiff.monitor.estimates import memory_under
from ardiff.profiling.memory import peak_gb, reset_peak, room_gb
from ardiff.profiling.session import built, measure, session
from ardiff.training.distributed import World
from ardiff.training.job import Job
from ardiff.training.trainer import Trainer

MARGIN = 0.08  # of the memory is to stay free: fragmentation, NCCL's buffers, other batches
STEPS, WARMUP = 5, 2  # at most, of each candidate


@dataclass(frozen=True)
class Candidate:
    """One setting, and what became of it. peak_gb: of the rank with most; on CPUs, of the process so far."""

    micro_batch_size: int
    activation_checkpointing: bool
    clips_per_s: float | None = None
    step_ms: float | None = None
    peak_gb: float | None = None
    estimated_gb: float | None = None
    fits: bool = False  # with a margin
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For profile.json."""
        return asdict(self)

    @property
    def settings(self) -> str:
        """As options on a command line."""
        checkpointing = str(self.activation_checkpointing).lower()
        return f"--train.micro_batch_size {self.micro_batch_size} --model.activation_checkpointing {checkpointing}"


def default_sizes(config: Config, world_size: int) -> list[int]:
    """From a quarter of the configured micro-batch to four times as much, as far as it divides the global batch."""
    share = config.train.global_batch_size // world_size
    size = config.train.micro_batch_size
    found = {size * 2**power for power in range(3)} | {size // 2**power for power in range(1, 3)}
    return sorted(size for size in found if size >= 1 and share % size == 0)


def sweep(
    build_job: Callable[[Config], Job],
    config: Config,
    ds_settings: dict[str, Any],
    world: World,
    folder: Path,
    sizes: Sequence[int],
    checkpointing: Sequence[bool],
    steps: int,
    say: Callable[[str], None],
    num_context: int | None = None,
) -> list[Candidate]:
    """Train a few steps with every setting (collective). What runs out of memory is noted, and larger ones left out.

    num_context: tokens of text in front of the frames, for the estimate of memory.
    """
    found: list[Candidate] = []
    for recompute in checkpointing:
        full = False
        for size in sorted(sizes):
            asked = Candidate(size, recompute)
            if full:
                result = _noted(asked, "left out: a smaller one does not fit")
            elif config.train.global_batch_size % (size * world.size):
                result = _noted(asked, f"does not divide the global batch of {config.train.global_batch_size}")
            else:
                result = _try(build_job, _with(config, asked), ds_settings, world, folder, steps, asked, num_context)
                full = result.clips_per_s is None
            say(_line(result))
            found.append(result)
    return found


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits with a margin."""
    fitting = [candidate for candidate in found if candidate.fits and candidate.clips_per_s is not None]
    return max(fitting, key=lambda candidate: candidate.clips_per_s or 0.0, default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says so, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _noted(candidate: Candidate, note: str) -> Candidate:
    return Candidate(candidate.micro_batch_size, candidate.activation_checkpointing, note=note)


def _line(candidate: Candidate) -> str:
    checkpointing = "on" if candidate.activation_checkpointing else "off"
    name = f"micro-batch {candidate.micro_batch_size}, checkpointing {checkpointing}"
    if candidate.clips_per_s is None:
        return f"sweep: {name}: {candidate.note}"
    return f"sweep: {name}: {candidate.clips_per_s:.1f} clips/s, peak {candidate.peak_gb:.2f} GiB"


def _with(config: Config, candidate: Candidate) -> Config:
    changed = copy.deepcopy(config)
    changed.train.micro_batch_size = candidate.micro_batch_size
    changed.model.activation_checkpointing = candidate.activation_checkpointing
    return changed


def _try(
    build_job: Callable[[Config], Job],
    config: Config,
    ds_settings: dict[str, Any],
    world: World,
    folder: Path,
    steps: int,
    asked: Candidate,
    num_context: int | None,
) -> Candidate:
    on_gpu = world.device.type == "cuda"
    expected = memory_under(config, ds_settings, world.size, on_gpu, num_context)["total"]
    room = min(world.gather(room_gb(world.device, world.local_size) or float("inf")))
    if not on_gpu and expected > room:  # a host does not refuse memory: it ends the process
        note = f"not tried: about {expected:.1f} GiB are needed, and {room:.1f} are there"
        return Candidate(asked.micro_batch_size, asked.activation_checkpointing, estimated_gb=expected, note=note)
    milliseconds = None
    try:
        with session(built(build_job, config, world), folder, ds_settings, world) as trainer:
            # Only where a pass fits on all ranks do they begin steps in which they wait for each other.
            if all(world.gather(not on_gpu or _pass_fits(trainer))):
                reset_peak(world.device)  # the pass that was tried holds all gradients at once, training does not
                milliseconds = measure(trainer, min(steps, WARMUP), min(steps, STEPS)).median_ms
    except BaseException as error:
        if not out_of_memory(error):
            raise
    if milliseconds is None:
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
        note = "out of memory"
        return Candidate(asked.micro_batch_size, asked.activation_checkpointing, estimated_gb=expected, note=note)
    peak = max(world.gather(peak_gb(world.device)))
    return Candidate(
        asked.micro_batch_size,
        asked.activation_checkpointing,
        clips_per_s=1000 * config.train.global_batch_size / milliseconds,
        step_ms=milliseconds,
        peak_gb=peak,
        estimated_gb=expected,
        fits=peak <= (1 - MARGIN) * room,
        note="" if peak <= (1 - MARGIN) * room else f"leaves less than {MARGIN:.0%} of the memory free",
    )


def _pass_fits(trainer: Trainer) -> bool:
    """Whether a forward and backward pass of one micro-batch fits beside all states; no rank waits for another in it.

    The gradients of all parameters exist at once here, which ZeRO avoids: their room stands for that of its buckets.
    """
    batch = trainer.next_batch()
    assert batch is not None
    objective = trainer.engine.objective
    try:
        on_device = {name: part.to(trainer.world.device) for name, part in batch.micro_batches[0].items()}
        loss = objective(on_device)["loss"][0]
        torch.autograd.grad(loss, [p for p in objective.parameters() if p.requires_grad])
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
    torch.cuda.empty_cache()
    return True
