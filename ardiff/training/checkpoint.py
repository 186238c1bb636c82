"""Checkpoints: a directory that appears whole or not at all, is verified before use, and fits any world size.

    step_00001000/
      state_rank{r}.safetensors   rank r's canonical slice of master weights, Adam moments and EMA (see flat.py)
      state.json                  counters, seeds, data identity, parameter layout, versions
      config.yaml                 the configuration
      MANIFEST.json               bytes and sha256 of every other file

It is written under a temporary name and renamed when every rank has finished; `latest` is replaced last and is only a
hint: the newest directory that verifies wins. No pickle is written or read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ardiff.config import Config, to_yaml
from ardiff.errors import UserError
from ardiff.files import sha256, sync, write_json, write_text
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.flat import FlatState

log = logging.getLogger("ardiff")
FORMAT_VERSION = 1
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
    slices: list[list[tuple[int, int]]] = field(default_factory=list)  # per rank and group: canonical [start, end)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save(
    run_dir: Path,
    state: State,
    flat: FlatState,
    ema: ShardedEMA,
    objective: torch.nn.Module,
    config: Config,
    world: World,
) -> Path:
    """Write one checkpoint (collective). Raises UserError on every rank if any rank could not write its part."""
    final = step_directory(run_dir, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    name = f"state_rank{world.rank}.safetensors"
    entry: dict[str, Any] = {"name": name, "slices": flat.ranges()}
    try:
        tensors = flat.export()
        for group, average in enumerate(ema.partitions):
            tensors[f"group{group}.ema"] = flat.strip(group, average)
        if world.is_main:
            tensors.update({f"buffer.{key}": value.cpu() for key, value in objective.named_buffers()})
        save_file(tensors, temporary / name)
        sync(temporary / name)
        entry |= _describe(temporary / name)
    except (OSError, SafetensorError) as error:
        entry["error"] = f"rank {world.rank}: {error}"
    entries = world.gather(entry)
    world.from_main(lambda: _finish(temporary, final, entries, state, config))
    return final


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _finish(temporary: Path, final: Path, entries: list[dict[str, Any]], state: State, config: Config) -> None:
    errors = [entry["error"] for entry in entries if "error" in entry]
    try:
        if errors:
            raise OSError(errors[0])
        state.slices = [entry["slices"] for entry in entries]
        write_json(temporary / "state.json", asdict(state))
        write_text(temporary / "config.yaml", to_yaml(config))
        files = {entry["name"]: {key: entry[key] for key in ("bytes", "sha256")} for entry in entries}
        files |= {name: _describe(temporary / name) for name in ("state.json", "config.yaml")}
        write_json(temporary / "MANIFEST.json", {"format": FORMAT_VERSION, "files": files})
        if final.exists():  # a checkpoint of the same step that did not verify
            shutil.rmtree(final)
        temporary.rename(final)
        sync(final.parent)
        write_text(final.parent / "latest", final.name + "\n")
        _prune(final, config.train.keep_checkpoints)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint could not be written ({error}); "
            "earlier ones are intact, make room and start again"
        ) from error


def _prune(newest: Path, keep: int) -> None:
    """Keep the last `keep` up to `newest`. What claims to be newer did not verify: it is set aside, not counted."""
    found = _directories(newest.parent)
    for damaged in (path for path in found if path.name > newest.name):
        damaged.rename(damaged.with_name(f"damaged_{damaged.name}_{time.time_ns()}"))
    for old in [path for path in found if path.name <= newest.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in newest.parent.glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _directories(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; whatever else a user keeps there is left alone."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def exists_in(run_dir: Path) -> bool:
    """Whether a run has any checkpoint, valid or not."""
    return bool(_directories(run_dir / "checkpoints"))


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file is as its manifest says."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


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
    """state.json of a verified checkpoint."""
    value = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if value.get("format") != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: format {value.get('format')}, this version reads format {FORMAT_VERSION}")
    value["layout"] = [[(name, list(shape)) for name, shape in group] for group in value["layout"]]
    if isinstance(value.get("ema_updates"), int):  # of before groups could be frozen
        value["ema_updates"] = [value["ema_updates"]] * len(value["layout"])
    value["slices"] = [[(start, end) for start, end in groups] for groups in value["slices"]]
    try:
        return State(**value)
    except TypeError as error:
        raise UserError(f"{checkpoint}: written by another version of ardiff ({error})") from error


def range_reader(checkpoint: Path, state: State) -> Callable[[str, int, int], Tensor]:
    """A function (name, start, end) -> canonical range of a vector, cut from whichever rank files hold it."""

    def read(name: str, start: int, end: int) -> Tensor:
        group = int(name.partition(".")[0].removeprefix("group"))
        parts = []
        for rank, slices in enumerate(state.slices):
            low, high = max(start, slices[group][0]), min(end, slices[group][1])
            if low < high:
                path, offset = checkpoint / f"state_rank{rank}.safetensors", slices[group][0]
                try:
                    with safe_open(path, framework="pt") as file:
                        parts.append(file.get_slice(name)[low - offset : high - offset])
                except SafetensorError as error:
                    raise UserError(f"{path}: not what it should be ({error}); delete this checkpoint") from error
        return torch.cat(parts) if parts else torch.empty(0)

    return read


def load(checkpoint: Path, state: State, flat: FlatState, ema: ShardedEMA, objective: torch.nn.Module) -> None:
    """Restore this rank's share of a checkpoint, which may have been written by another number of ranks."""
    read = range_reader(checkpoint, state)
    flat.load(read, state.adam_steps)  # the caller then updates the weights of the model, which is collective
    for group, average in enumerate(ema.partitions):
        flat.fill(group, average, read(f"group{group}.ema", *flat.ranges()[group]))
    ema.num_updates = list(state.ema_updates)
    buffers = dict(objective.named_buffers())
    with safe_open(checkpoint / "state_rank0.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            if key.startswith("buffer."):
                buffers[key.removeprefix("buffer.")].copy_(file.get_tensor(key))


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
