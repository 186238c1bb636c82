"""Whether a manifest is sound in itself, before anything in it is relied on; numbers from JSON that may be anything."""

from __future__ import annotations

import math
import re
from typing import Any

from ardiff.data.shards import Manifest, ShardEntry

SHARD_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
RATE = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")  # Fraction() would work out "1e999999999"
MAX_COUNT = 1 << 48  # of bytes, samples and frames
MAX_TOKEN_NUMBERS = 1 << 24  # tokens times channels of a frame; keeps sizes far from overflow
MAX_DEPTH = 32  # of nested lists and objects
MAX_SIDE = 1 << 14  # of a picture, in pixels


def manifest_faults(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest in itself, whatever the shards are. Nothing in it was checked before."""
    if manifest.kind not in ("latents", "frames"):
        return [f"its kind {_short(manifest.kind)} is neither latents nor frames"]
    if too_deep(manifest.details):
        return ["it is nested too deeply"]
    faults = []
    classes = manifest.classes
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        faults.append("its classes are not a list of names")
    elif len(set(classes)) != len(classes):
        faults.append("two of its classes have the same name")
    check = _latents_faults if manifest.kind == "latents" else _frames_faults
    faults += check(manifest.details)
    if faults:
        return faults
    channels = manifest.details["channels"] if manifest.kind == "latents" else None
    faults += [fault for entry in manifest.shards for fault in _entry_faults(entry, channels)]
    files = [entry.file for entry in manifest.shards]
    if not files:
        faults.append("it lists no shards")
    elif not faults and len(set(files)) != len(files):
        faults.append("it lists a shard twice")
    return faults


def _latents_faults(details: dict[str, Any]) -> list[str]:
    faults = [f"{name} must be a whole number above 0" for name in ("tokens", "channels") if not _count(details, name)]
    if faults:
        return faults
    if details["tokens"] * details["channels"] > MAX_TOKEN_NUMBERS:
        faults.append(f"frames of {details['tokens']} x {details['channels']} numbers are absurd")
        return faults
    for name in ("mean", "std"):
        value = details.get(name)
        if value is None or not _numbers(value, details["channels"]) or (name == "std" and min(value) < 0):
            faults.append(f"{name} must be {details['channels']} numbers, one per channel")
    text_dim = details.get("text_dim")
    if text_dim is not None and not (_count(details, "text_dim") and text_dim <= MAX_TOKEN_NUMBERS):
        faults.append("text_dim must be a sensible whole number above 0")
    if details.get("text_tokens") is not None and not _count(details, "text_tokens"):
        faults.append("text_tokens must be a whole number above 0")
    arvae = details.get("arvae")
    if not (isinstance(arvae, dict) and isinstance(arvae.get("id"), str) and isinstance(arvae.get("path"), str)):
        faults.append("arvae must give the id and the path of the AR-VAE")
    return faults


def _frames_faults(details: dict[str, Any]) -> list[str]:
    if _count(details, "size") and details["size"] <= MAX_SIDE:
        return []
    return [f"size must be the side of the pictures, 1 to {MAX_SIDE} pixels"]


def _entry_faults(entry: ShardEntry, channels: int | None) -> list[str]:
    if not (isinstance(entry.file, str) and SHARD_FILE.fullmatch(entry.file)):
        return [f"the shard {_short(entry.file)} does not have a file name such as latents-000000.tar"]
    faults = []
    for name in ("bytes", "samples", "frames"):
        if not _count(vars(entry), name):
            faults.append(f"{name} of {entry.file} must be a whole number above 0")
    for name in ("sha256", "index_sha256"):
        value = getattr(entry, name)
        if not (isinstance(value, str) and DIGEST.fullmatch(value)):
            faults.append(f"{name} of {entry.file} must be 64 hexadecimal digits")
    sums = entry.statistics
    if channels is not None and not (
        isinstance(sums, dict)
        and _count(sums, "count")
        and _numbers(sums.get("total"), channels)
        and _numbers(sums.get("squares"), channels)
    ):
        faults.append(f"statistics of {entry.file} must be count, total and squares of {channels} channels")
    return faults


def _count(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    return type(value) is int and 0 < value <= MAX_COUNT


def _numbers(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(is_number(number) for number in value)


def _short(value: Any) -> str:
    """A value of a manifest in a message; of lists and the like the type only, as they may be nested without end."""
    text = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number that a float can hold."""
    if type(value) is int:
        return abs(value) < 1 << 63
    return type(value) is float and math.isfinite(value)


def frames_per_second(value: Any) -> float | None:
    """A frame rate as manifests and descriptions give it, "30000/1001" or 25.0; None if it is nothing of that kind."""
    if isinstance(value, str):
        found = RATE.fullmatch(value)
        value = int(found[1]) / int(found[2]) if found and int(found[2]) else None
    return float(value) if is_number(value) and value > 0 else None


def too_deep(value: Any) -> bool:
    """Whether a value from JSON is nested deeper than anything sensible, and than it could be written again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True
