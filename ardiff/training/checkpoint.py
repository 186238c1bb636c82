"""Checkpoints: a directory that appears whole or not at all, is verified before use, and fits any world size.

    step_00001000/
      state_rank{r}.safetensors   rank r's canonical slice of master weights, Adam moments and EMAs (see flat.py)
      state.json                  counters, seeds, data identity, parameter layout, versions
      config.yaml                 the configuration
      probe.safetensors           what the network predicted for a fixed input (see probe.py)
      MANIFEST.json               bytes and sha256 of every other file

It is written under a temporary name and renamed when every rank has finished (saving.py); `latest` is replaced last and
is only a hint: the newest directory that verifies wins. No pickle is written or read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ardiff.errors import UserError
from ardiff.files import json_problem, sha256
from ardiff.training.ema import MAIN, ShardedEMA, ema_name
from ardiff.training.flat import FlatState

log = logging.getLogger("ardiff")
FORMAT_VERSION = 1
PROBE = "probe.safetensors"
READERS = 8  # files that are verified at a time
ADVERSARY = "discriminator."  # what names of its parameters begin with; its groups come last and have no average


@dataclass
class State:
    """state.json: everything about a checkpoint that is not a large vector."""

    step: int
    samples: int  # consumed, over all ranks: the position in the order of the data
    skipped_steps: int
    adam_steps: list[int]
    ema_updates: list[int]  # per group
    seed: int
    order: str
    data_identity: str
    precision: str
    world_size: int
    layout: list[list[tuple[str, list[int]]]]  # per group: name and shape of every parameter, in order
    phase: int = 0  # of train.phases, that of the step before
    latent_space: dict[str, Any] | None = None  # see LatentSpace; None for an AR-VAE
    mixture: list[list[Any]] = field(default_factory=list)  # [position, weights] of every change of weights
    bad_samples: list[list[Any]] = field(default_factory=list)  # [position, shard, offset, reason]: replaced ones
    skipped: list[list[Any]] = field(default_factory=list)  # [start, end, reason]: positions that were left out
    recent_losses: list[float] = field(default_factory=list)  # what the detector of spikes remembers
    ema_decays: list[float] = field(default_factory=list)  # of the averages, the main one first; old files do not say
    slices: list[list[tuple[int, int]]] = field(default_factory=list)  # per rank and group: canonical [start, end)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def unfinished(final: Path) -> Path:
    """The name under which a checkpoint is written, and deleted."""
    return final.with_name(f".{final.name}.tmp")


def rank_file(rank: int) -> str:
    """The file of one rank."""
    return f"state_rank{rank}.safetensors"


def prune(newest: Path, keep: int, keep_every: int) -> None:
    """Keep the last `keep` up to `newest`, which is valid, and for good those of steps that are a multiple of
    `keep_every` (0: none). What claims to be newer is not of this run's course: it is set aside, not counted.
    """
    _set_newer_aside(newest)
    found = [path for path in _directories(newest.parent) if path.name <= newest.name]
    for old in found[:-keep]:
        if not keep_every or _step_of(old) % keep_every:
            remove(old)
    remove_unfinished(newest.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; if the process is killed meanwhile, no part of it is left under its name."""
    doomed = unfinished(checkpoint)
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _set_newer_aside(checkpoint: Path) -> None:
    """Rename what is newer than a checkpoint to `damaged_step_...`, so that the run goes on from this one."""
    for newer in (path for path in _directories(checkpoint.parent) if path.name > checkpoint.name):
        newer.rename(newer.with_name(f"damaged_{newer.name}_{time.time_ns()}"))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing. Nothing may be writing there."""
    for folder_left in folder.glob(".step_*.tmp"):
        shutil.rmtree(folder_left, ignore_errors=True)
    for file_left in folder.glob(".latest.tmp.*"):
        file_left.unlink(missing_ok=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _directories(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; whatever else a user keeps there is left alone."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def exists_in(run_dir: Path) -> bool:
    """Whether a run has any checkpoint, valid or not."""
    return bool(_directories(run_dir / "checkpoints"))


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when it is complete and every file is as its manifest says."""
    try:
        return _contradiction(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or 'a file').name} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    except (LookupError, TypeError, AttributeError):
        return "MANIFEST.json or state.json does not hold what it should"


def _contradiction(checkpoint: Path) -> str | None:
    """What in a checkpoint is not as its manifest says."""
    files = _read_json(checkpoint / "MANIFEST.json")["files"]
    for name in files:
        if Path(name).name != name:
            return f"MANIFEST.json names {name!r}, which is not a file of this folder"
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:  # hashing needs no interpreter
        for problem in readers.map(lambda name: _problem_with_file(checkpoint / name, files[name]), files):
            if problem is not None:
                return problem
    world_size = _read_json(checkpoint / "state.json")["world_size"]
    for name in chain(("state.json", "config.yaml"), map(rank_file, range(world_size))):
        if name not in files:
            return f"MANIFEST.json does not list {name}"
    return None


def _read_json(path: Path) -> Any:
    """Raises ValueError that says what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: {json_problem(error)}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name}: it is not JSON") from error


def _problem_with_file(path: Path, expected: dict[str, Any]) -> str | None:
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    return None if sha256(path) == expected["sha256"] else f"{path.name} does not have its checksum"


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged newer ones are reported and passed over."""
    candidates = _directories(run_dir / "checkpoints")[::-1]
    for checkpoint in candidates:
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("DAMAGED CHECKPOINT %s (%s): falling back to the one before", checkpoint, problem)
    if candidates:
        raise UserError(
            f"{run_dir / 'checkpoints'}: none of {len(candidates)} checkpoints is intact; "
            "restore one from a copy or choose another --run_dir"
        )
    return None


def read_state(checkpoint: Path) -> State:
    """state.json of a verified checkpoint. Raises UserError where it is not one of this format."""
    try:
        value = _read_json(checkpoint / "state.json")
        if not isinstance(value, dict):
            raise TypeError("not a JSON object")
        if value.get("format") != FORMAT_VERSION:
            raise UserError(f"{checkpoint}: format {value.get('format')}, this version reads format {FORMAT_VERSION}")
        value["layout"] = [[(str(name), list(shape)) for name, shape in group] for group in value["layout"]]
        if isinstance(value.get("ema_updates"), int):  # of before groups could be frozen
            value["ema_updates"] = [value["ema_updates"]] * len(value["layout"])
        value["slices"] = [[(int(start), int(end)) for start, end in groups] for groups in value["slices"]]
        if [len(groups) for groups in value["slices"]] != [len(value["layout"])] * value["world_size"]:
            raise TypeError("its slices are not those of all ranks and groups")
        return State(**value)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{checkpoint / 'state.json'}: not what this version of ardiff writes"
        raise UserError(f"{what} ({type(error).__name__}: {error}); use the version that wrote it") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file for reading, as from `safe_open`. Raises UserError, naming it, for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not what it should be ({error}); delete this checkpoint") from error


def range_reader(checkpoint: Path, state: State) -> Callable[[str, int, int], Tensor]:
    """A function (name, start, end) -> canonical range of a vector, cut from whichever rank files hold it."""

    def read(name: str, start: int, end: int) -> Tensor:
        group = int(name.partition(".")[0].removeprefix("group"))
        parts = []
        for rank, slices in enumerate(state.slices):
            low, high = max(start, slices[group][0]), min(end, slices[group][1])
            if low < high:
                path, offset = checkpoint / rank_file(rank), slices[group][0]
                with opened(path) as file:
                    part = file.get_slice(name)[low - offset : high - offset]
                if part.shape != (high - low,) or part.dtype != torch.float32:
                    raise UserError(f"{path}: {name} has another size than state.json says; delete this checkpoint")
                parts.append(part)
        whole = torch.cat(parts) if parts else torch.empty(0)
        if len(whole) != end - start:
            raise UserError(f"{checkpoint}: {name} has gaps between its ranks; delete this checkpoint")
        return whole

    return read


def stored_average(state: State, wanted: Sequence[float], decay: float) -> str:
    """The vector of a checkpoint from which the average of `decay`, one of `wanted` (the first: main), goes on."""
    names = {stored: MAIN if number == 0 else ema_name(stored) for number, stored in enumerate(state.ema_decays)}
    if decay in names:
        return names[decay]
    if state.ema_decays or decay != wanted[0]:  # old checkpoints do not say the decay of their only average
        log.info("the average of decay %r is not in the checkpoint: it starts from the main one there", decay)
    return MAIN


def load(checkpoint: Path, state: State, flat: FlatState, ema: ShardedEMA, objective: torch.nn.Module) -> None:
    """Restore this rank's share of a checkpoint, which may have been written by another number of ranks.

    Averages go by their decay: one that is not stored starts from the main one, one that is not wanted is dropped.
    """
    read = range_reader(checkpoint, state)
    flat.load(read, state.adam_steps)  # the caller then updates the weights of the model, which is collective
    for decay, averages in zip(ema.decays, ema.vectors().values(), strict=True):
        source = stored_average(state, ema.decays, decay)
        for group, average in enumerate(averages):
            flat.fill(group, average, read(f"group{group}.{source}", *flat.ranges()[group]))
    dropped = [decay for decay in state.ema_decays if decay not in ema.decays]
    if dropped:
        log.warning(
            "no longer kept: the average of decay %s (train.extra_ema_decays); older checkpoints still have it",
            ", ".join(map(repr, dropped)),
        )
    ema.num_updates = list(state.ema_updates)
    buffers = dict(objective.named_buffers())
    path = checkpoint / rank_file(0)
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            if not key.startswith("buffer."):
                continue
            stored, buffer = file.get_tensor(key), buffers.get(key.removeprefix("buffer."))
            if buffer is None or buffer.shape != stored.shape:
                raise UserError(f"{path}: {key} is not of this model; continue with the version that wrote it")
            buffer.copy_(stored)


def read_probe(checkpoint: Path) -> Tensor | None:
    """What the network predicted when this checkpoint was written (see probe.py); None for one of before that."""
    path = checkpoint / PROBE
    if not path.exists():
        return None
    with opened(path) as file:
        prediction: Tensor = file.get_tensor("prediction")
    return prediction


def full_weights(checkpoint: Path, vector: str = "ema") -> dict[str, Tensor]:
    """Parameter name -> fp32 tensor, put together from all slices; `vector` is `ema` or `master`.

    Without those of a discriminator: it serves training only.
    """
    state = read_state(checkpoint)
    read = range_reader(checkpoint, state)
    weights: dict[str, Tensor] = {}
    for group, layout in enumerate(state.layout):
        if layout[0][0].startswith(ADVERSARY):
            continue
        offset = 0
        for name, shape in layout:
            numel = int(torch.Size(shape).numel())
            weights[name] = read(f"group{group}.{vector}", offset, offset + numel).reshape(shape)
            offset += numel
    return weights
