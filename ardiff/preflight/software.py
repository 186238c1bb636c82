"""Equal software and settings on all ranks: versions, source, git state, environment, configuration, ds_config."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ardiff.config import load, to_yaml
from ardiff.errors import UserError
from ardiff.launching.hostcheck import ROOT, source
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import unlike_most
from ardiff.training.engine import accumulation_steps, read_ds_config
from ardiff.training.program import default_ds_config
from ardiff.training.run_dir import versions

# Settings of communication that should be alike; interfaces (NCCL_SOCKET_IFNAME, ...) may have other names elsewhere.
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "DS_")
_DRIVER = Path("/proc/driver/nvidia/version")
GIT_SECONDS = 20.0
_VERSION = "version "  # begins the names of figures


def check_versions(_: Context) -> Finding:
    """Python, packages, CUDA, NCCL, driver; the source as it lies there, and its commit."""
    figures: dict[str, Any] = {"python": platform.python_version(), **versions(), "torch": torch.__version__}
    if torch.version.cuda:
        figures["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        figures["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if _DRIVER.is_file():
        figures["driver"] = driver_version(_DRIVER.read_text())
    named = {f"{_VERSION}{name}": value for name, value in figures.items()}
    return Finding({**named, "source": source(), **git_state(ROOT), "environment": _environment()})


def driver_version(text: str) -> str:
    """The number in what NVIDIA's driver says of itself, in whichever of its two forms."""
    found = re.search(r"\b\d+(\.\d+)+\b", text)
    return found[0] if found else "unknown"


def compare_versions(reports: Sequence[Report]) -> list[Remark]:
    """What is not the same everywhere."""
    remarks: list[Remark] = []
    names = {name: None for report in reports for found in report.findings.values() for name in found.figures}
    for name in (name for name in names if name.startswith(_VERSION)):
        missing = tuple(report.rank for report in reports if report.figure(name) is None)
        package = name.removeprefix(_VERSION)
        if missing and len(missing) < len(reports):
            remarks.append(
                Remark(f"{package} is not installed here, but elsewhere; install the same everywhere", missing)
            )
        remarks += unlike_most(reports, name, f"{package}'s version", "install the same everywhere")
    same = "copy the same clone everywhere"
    sources = unlike_most(reports, "source", "the source (a digest of all program files)", same)
    commits = unlike_most(reports, "commit", "the git commit", f"{same} (git checkout)", warning=not sources)
    changes = [] if commits else unlike_most(reports, "changes", "the digest of uncommitted changes", same, not sources)
    remarks += sources + commits + changes
    remarks += _compare_environments(reports)
    return remarks


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}


def _compare_environments(reports: Sequence[Report]) -> list[Remark]:
    names = sorted({name for report in reports for name in report.figure("environment") or {}})
    remarks: list[Remark] = []
    for name in names:

        def value(report: Report, name: str = name) -> str:
            return (report.figure("environment") or {}).get(name, "not set")

        remarks += unlike_most(reports, value, f"the variable {name}", "pass the same to all hosts", warning=True)
    return remarks


def git_state(root: Path) -> dict[str, str]:
    """Commit, and a digest of what has been changed since; nothing where this is no clone."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = _git(root, "diff", "HEAD") or b""
    return {
        "commit": commit.decode().strip()[:16],
        "changes": hashlib.sha256(changes).hexdigest()[:16] if changes else "none",
    }


def _git(root: Path, *arguments: str) -> bytes | None:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def check_configuration(context: Context) -> Finding:
    """Whether the configuration and ds_config load, fit one another and divide by the ranks; sets them in `context`."""
    options = context.options
    config = load(options.config, context.overrides)
    settings = read_ds_config(options.ds_config or default_ds_config())
    accumulation = accumulation_steps(config, context.run_size)
    _accepted(settings, config.train.micro_batch_size, accumulation)
    context.config, context.ds_settings = config, settings
    return Finding(
        {
            "configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
            "ds_config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
            "accumulation": accumulation,
        }
    )


def _accepted(settings: dict[str, Any], micro_batch: int, accumulation: int) -> None:
    """Whether DeepSpeed takes the ds_config. Raises UserError."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    owned = ("train_batch_size", "optimizer", "scheduler")
    batches = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    others = {name: value for name, value in settings.items() if name not in owned and value != "auto"}
    try:
        DeepSpeedConfig({**others, **batches})
    except (pydantic.ValidationError, DeepSpeedConfigError, AssertionError) as error:
        raise UserError(f"--ds_config: DeepSpeed refuses it ({' '.join(str(error).split())})") from error


def compare_configurations(reports: Sequence[Report]) -> list[Remark]:
    """Settings that are not the same on all ranks."""
    same = "start all ranks with the same options and files"
    config = unlike_most(reports, "configuration", "the configuration (digest)", same)
    return config + unlike_most(reports, "ds_config", "the ds_config (digest)", same)
