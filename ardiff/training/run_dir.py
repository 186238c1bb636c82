"""The folder of a run: what it was made for, what made it, and how it ended."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ardiff.config import Config, differences, load, to_yaml
from ardiff.errors import UserError
from ardiff.files import write_json, write_text
from ardiff.training.checkpoint import State

log = logging.getLogger("ardiff")
PACKAGES = ("ardiff", "torch", "deepspeed", "webdataset", "numpy", "flash-attn", "xformers")


def is_ours(run_dir: Path) -> bool:
    """True for the folder of a run, and for one that is empty or does not exist yet."""
    if not run_dir.exists():
        return True
    return run_dir.is_dir() and ((run_dir / "config.yaml").is_file() or not _contents(run_dir))


def _contents(run_dir: Path) -> list[Path]:
    """What lies in a folder besides the note of an earlier refusal."""
    return [path for path in run_dir.iterdir() if path.name != "exit.json"] if run_dir.is_dir() else []


def check(run_dir: Path, config: Config, section: str, resume: str) -> None:
    """Refuse a run_dir that cannot be continued with this configuration. Changes nothing.

    Raises UserError for `resume none` in a folder that is not empty, and for a run of another model.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run_dir {run_dir}: is not a folder")
    if not _contents(run_dir):
        return
    if resume == "none":
        raise UserError(f"--run_dir {run_dir}: not empty and --resume none; choose another folder or use --resume auto")
    if not is_ours(run_dir):
        raise UserError(f"--run_dir {run_dir}: not empty, and not the folder of a run (it has no config.yaml)")
    old = load(str(run_dir / "config.yaml"))
    changed = differences(getattr(old, section), getattr(config, section), f"{section}.")
    if changed:
        raise UserError(
            f"--run_dir {run_dir}: holds a run of another model ({'; '.join(changed)}); "
            "choose another --run_dir or give the settings of its config.yaml"
        )
    others = [line for line in differences(old, config) if line not in changed]
    if others:
        log.warning("settings changed since the run began: %s", "; ".join(others))


def check_state(state: State, checkpoint: Path, config: Config, data_identity: str) -> None:
    """Refuse to continue a checkpoint on other data or with another seed: the curve would not be the same run's."""
    for what, old, new, remedy in (
        ("data", state.data_identity, data_identity, "give the --data.shards it was trained on"),
        ("train.seed", state.seed, config.train.seed, f"use --train.seed {state.seed}"),
        ("data.order", state.order, config.data.order, f"use --data.order {state.order}"),
    ):
        if old != new:
            raise UserError(
                f"{checkpoint}: was trained with another {what} ({old} -> {new}); {remedy}, or a new --run_dir"
            )


def describe(run_dir: Path, config: Config, ds_config: dict[str, Any], world_size: int) -> None:
    """Write config.yaml, ds_config.json and environment.json."""
    write_text(run_dir / "config.yaml", to_yaml(config))
    write_json(run_dir / "ds_config.json", ds_config)
    write_json(run_dir / "environment.json", environment(world_size))


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


def write_exit(run_dir: Path, reason: str, code: int, step: int | None) -> None:
    """run_dir/exit.json: how the run ended (launchers replace exit codes by their own)."""
    write_json(run_dir / "exit.json", {"reason": reason, "code": code, "step": step})


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """What `write_exit` wrote, or None."""
    try:
        return json.loads((run_dir / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
