"""The folder of a run: what it was made for, what made it, and how it ended."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ardiff.config import Config, differences, load, to_yaml
from ardiff.data.urls import without_credentials
from ardiff.errors import UserError
from ardiff.files import write_json, write_text
from ardiff.training.checkpoint import ADVERSARY, State

log = logging.getLogger("ardiff")
RUNNING = "running"  # in exit.json until the run has ended: what a kill leaves
PACKAGES = ("ardiff", "torch", "deepspeed", "webdataset", "numpy", "flash-attn", "xformers")


def _trains(run_dir: Path) -> str | None:
    """What environment.json says that this run trains, if it says so."""
    try:
        return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["trains"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_ours(run_dir: Path) -> bool:
    """True for the folder of a run, and for one that is empty or does not exist yet."""
    if not run_dir.exists():
        return True
    return run_dir.is_dir() and ((run_dir / "config.yaml").is_file() or not _contents(run_dir))


def _contents(run_dir: Path) -> list[Path]:
    """What lies in a folder besides the notes of an earlier refusal."""
    notes = ("exit.json", ".lock", "logs", "restarts.jsonl")
    return [path for path in run_dir.iterdir() if path.name not in notes] if run_dir.is_dir() else []


def check(run_dir: Path, config: Config, name: str, fixed: tuple[str, ...], resume: str) -> None:
    """Refuse a run_dir that cannot be continued with this configuration. Changes nothing.

    name: what is to be trained. fixed: sections and settings that make a run what it is. Raises UserError for
    `resume none` in a folder that is not empty, and for a run of something else or with other fixed settings.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run_dir {run_dir}: is not a folder")
    if not _contents(run_dir):
        return
    if resume == "none":
        raise UserError(f"--run_dir {run_dir}: not empty and --resume none; choose another folder or use --resume auto")
    if not is_ours(run_dir):
        raise UserError(f"--run_dir {run_dir}: not empty, and not the folder of a run (it has no config.yaml)")
    trains = _trains(run_dir)
    if trains not in (None, name):
        raise UserError(f"--run_dir {run_dir}: holds a run of the {trains}, not of the {name}; choose another folder")
    old = load(str(run_dir / "config.yaml"))
    every = differences(without_credentials(old), without_credentials(config))
    changed = [line for line in every if line.startswith(fixed)]
    if changed:
        raise UserError(
            f"--run_dir {run_dir}: holds a run of another model ({'; '.join(changed)}); "
            "choose another --run_dir or give the settings of its config.yaml"
        )
    if every:
        log.warning("settings changed since the last start: %s", "; ".join(every))


def check_state(state: State, now: State, checkpoint: Path) -> None:
    """Refuse to continue a checkpoint from what it was not: the curve would not be the same run's. `now` is a fresh
    state of this start.

    Raises UserError for other data, seed, order, precision or parameters.
    """
    for what, old, new, remedy in (
        ("data", state.data_identity, now.data_identity, "give the --data.shards it was trained on"),
        ("train.seed", state.seed, now.seed, f"use --train.seed {state.seed}"),
        (
            "data.order",
            state.order,
            now.order,
            "use the data.order, data.lanes and data.lane_window it was trained with",
        ),
        ("precision", state.precision, now.precision, "use the --ds_config it was trained with"),
        ("latent space", _without_path(state), _without_path(now), "use the same data.normalize and AR-VAE"),
    ):
        if old != new:
            raise UserError(
                f"{checkpoint}: was trained with another {what} ({old} -> {new}); {remedy}, or a new --run_dir"
            )

    known = now.layout
    if not any(group[0][0].startswith(ADVERSARY) for group in state.layout):  # a stage with one was added: it is new
        known = [group for group in known if not group[0][0].startswith(ADVERSARY)]
    if known == now.layout and any(group[0][0].startswith(ADVERSARY) for group in state.layout + known):
        ours, theirs = ([g for g in layout if g[0][0].startswith(ADVERSARY)] for layout in (state.layout, known))
        if ours != theirs:
            raise UserError(
                f"{checkpoint}: holds a discriminator; keep a phase of stage adversarial in train.phases, and "
                "vae.discriminator_width and vae.discriminator_layers as they were"
            )
    before, after = ([entry for group in layout for entry in group] for layout in (state.layout, known))
    for old_entry, new_entry in zip_longest(before, after):
        if old_entry != new_entry:
            raise UserError(
                f"{checkpoint}: holds parameter {old_entry} where the model now has {new_entry}; "
                "continue with the version of ardiff that wrote it"
            )


def _without_path(state: State) -> dict[str, Any]:
    return {key: value for key, value in (state.latent_space or {}).items() if key != "arvae_path"}


def describe(run_dir: Path, config: Config, name: str, ds_config: dict[str, Any], world_size: int) -> None:
    """Write config.yaml (without credentials), ds_config.json and environment.json."""
    write_text(run_dir / "config.yaml", to_yaml(without_credentials(config)))
    write_json(run_dir / "ds_config.json", ds_config)
    write_json(run_dir / "environment.json", {"trains": name, **environment(world_size)})


def environment(world_size: int) -> dict[str, Any]:
    """Versions, git state and hardware."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices or [platform.processor() or platform.machine()],
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": _git("status", "--porcelain").splitlines()},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def lock(run_dir: Path) -> int:
    """Hold run_dir for this process until it ends. Raises UserError while another run has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise UserError(f"--run_dir {run_dir}: another run is writing there; stop it or choose another") from error
    return handle


def in_use(run_dir: Path) -> bool:
    """Whether a live run holds run_dir."""
    if not (run_dir / ".lock").is_file():
        return False
    try:
        os.close(lock(run_dir))
    except UserError:
        return True
    return False


def write_exit(run_dir: Path, reason: str, code: int | None, step: int | None) -> None:
    """run_dir/exit.json: how the run ended (launchers replace exit codes by their own)."""
    write_json(run_dir / "exit.json", {"reason": reason, "code": code, "step": step})


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """What `write_exit` wrote, or None."""
    try:
        return json.loads((run_dir / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
