"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.end_to_end.processes import EXACT, metrics

MAY_DIFFER = ("versions",)  # of state.json


def differences(run_dir: Path, other: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs in metrics.jsonl (the fields EXACT) and in the newest checkpoints."""
    found = _of_metrics(metrics(run_dir), metrics(other))
    newest, expected = (sorted((path / "checkpoints").glob("step_*"))[-1] for path in (run_dir, other))
    if newest.name != expected.name:
        return [*found, f"the newest checkpoint is {newest.name}, not {expected.name}"]
    return found + _of_states(newest, expected, (*MAY_DIFFER, *ignore)) + tensors_that_differ(newest, expected)


def _of_metrics(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    if len(lines) != len(expected):
        return [f"metrics.jsonl has {len(lines)} lines, not {len(expected)}"]
    return [
        f"line {number} of metrics.jsonl: {key} is {line[key]!r}, not {wanted[key]!r}"
        for number, (line, wanted) in enumerate(zip(lines, expected, strict=True), 1)
        for key in EXACT
        if line[key] != wanted[key]
    ]


def _of_states(newest: Path, expected: Path, ignore: tuple[str, ...]) -> list[str]:
    ours, theirs = (json.loads((path / "state.json").read_text()) for path in (newest, expected))
    return [
        f"{newest / 'state.json'}: {key} is {ours.get(key)!r}, not {theirs.get(key)!r}"[:300]
        for key in sorted(ours.keys() | theirs.keys())
        if key not in ignore and ours.get(key) != theirs.get(key)
    ]


def tensors_that_differ(newest: Path, expected: Path, names: str = "") -> list[str]:
    """Tensors of two checkpoints that are not the same bits; only those whose name has `names` in it."""
    files, wanted = ({path.name for path in folder.glob("*.safetensors")} for folder in (newest, expected))
    if files != wanted or not files:
        return [f"{newest} holds {sorted(files)}, not {sorted(wanted)}"]
    found = []
    for name in sorted(files):
        ours, theirs = load_file(newest / name), load_file(expected / name)
        if ours.keys() != theirs.keys():
            found.append(f"{newest / name}: holds other tensors")
            continue
        found += [f"{newest / name}: {key}" for key in ours if names in key and not _same_bits(ours[key], theirs[key])]
    return found


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        if one.ndim
        else (one.item() == other.item())
    )
