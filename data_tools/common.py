"""What the programs of this folder share: checked output folders and the settings they were filled with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ardiff.errors import UserError
from ardiff.files import remove_leftovers, write_json

SETTINGS = "settings.json"


def output_folder(path: Path) -> Path:
    """Create a folder for results and clear it of what a killed run left. Raises UserError if impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder ({error.strerror})") from error
    remove_leftovers(path)
    return path


def claim_folder(folder: Path, settings: dict[str, Any], results: str) -> None:
    """Note in `folder` what it is being filled with, so that a later run cannot mix in something else.

    Raises UserError when there already are files that match the pattern `results`, made with other settings.
    """
    known = folder_settings(folder)
    existing = next(folder.glob(results), None)
    if existing is None:
        write_json(folder / SETTINGS, settings)
        return
    if known is None:
        raise UserError(f"--out {folder}: holds files of something else ({existing.name}); choose another --out")
    changed = [
        f"{key} {known.get(key)} -> {settings.get(key)}"
        for key in sorted({*known, *settings})
        if known.get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"--out {folder}: holds the results of other settings ({', '.join(changed)}); "
            "choose another --out or delete that folder"
        )


def folder_settings(folder: Path) -> dict[str, Any] | None:
    """The settings an earlier run noted in `folder`, or None."""
    file = folder / SETTINGS
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); choose another --out or delete it") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a record of settings; choose another --out or delete it")
    return value


def require(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise UserError unless low <= value <= high."""
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} {value}: must be {limits}")
