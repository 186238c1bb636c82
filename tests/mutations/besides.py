"""Damage to, and attacks through, the files beside a tar: index, done marker and manifest."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np

from ardiff.data.shards import INDEX_DTYPE
from mutations.accidents import damaged_header, flipped_bits, overwritten, truncated
from mutations.target import Files, Target, Trap, npy, npy_header


def damaged_index(target: Target) -> tuple[str, Files]:
    data, how = bytearray(target.index), target.pick("bit", "bit", "cut", "longer", "zeros")
    place = target.place(len(data))
    if how == "bit":
        data[place] ^= 1 << target.place(8)
    elif how == "cut":
        del data[place:]
    elif how == "longer":
        data += target.rng.bytes(40)
    else:
        data[place : place + 40] = bytes(len(data[place : place + 40]))
    return f"{how} at {place}", {f"{target.name}.index.npy": bytes(data)}


def hostile_index(target: Target) -> tuple[str, Files]:
    rows = np.load(io.BytesIO(target.index))
    row, name = target.place(len(rows)), target.pick(*(INDEX_DTYPE.names or ()))
    limits = np.iinfo(INDEX_DTYPE[name])
    values = (limits.min, limits.max, 0, 1, int(rows[name][row]) + 1, max(limits.min, int(rows[name][row]) - 1))
    rows[name][row] = target.pick(*values)
    dtype = INDEX_DTYPE.descr
    absurd = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': ({target.pick(10**15, -1, 10**40)},), }}"
    data = target.pick(
        *[npy(rows)] * 12, npy(rows[::-1]), npy(rows[:0]), npy(np.concatenate([rows] * 50)),
        pickle.dumps(Trap(target.trap)),
        npy(np.array([Trap(target.trap)], dtype=object), allow_pickle=True), npy_header(absurd) + target.index[128:],
        npy_header("(" * 5000), npy(np.zeros(3)), b"", npy(rows.reshape(-1, 1)), b"PK\x03\x04" + target.index,
    )  # fmt: skip
    return f"{name} of row {row}, or all of it", {f"{target.name}.index.npy": data}


def damaged_text(content: bytes, target: Target) -> bytes:
    data, place = bytearray(content), target.place(len(content))
    how = target.pick("bit", "bit", "cut", "zeros")
    if how == "bit":
        data[place] ^= 1 << target.place(8)
    elif how == "cut":
        del data[place:]
    else:
        data[place : place + 20] = bytes(len(data[place : place + 20]))
    return bytes(data)


def damaged_marker(target: Target) -> tuple[str, Files]:
    data = target.pick(
        *[damaged_text(target.marker, target)] * 6, b"[" * 200_000, b"null", b"{}", b"\xff", target.manifest,
        pickle.dumps(Trap(target.trap)), b"9" * 5000,
    )  # fmt: skip
    return f"{data[:40]!r}", {f"{target.name}.done.json": data}


def damaged_manifest(target: Target) -> tuple[str, Files]:
    data = target.pick(
        *[damaged_text(target.manifest, target)] * 6, b"[" * 200_000, b"", b"{}", b"\xff", b'{"format": 2}',
        pickle.dumps(Trap(target.trap)), b"9" * 5000,
    )  # fmt: skip
    return f"{data[:40]!r}", {"manifest.json": data}


def odd_manifest(target: Target) -> tuple[str, Files]:
    """A value of the manifest that somebody has chosen."""
    value, again = json.loads(target.manifest), json.loads(target.manifest)
    entry = value["shards"][0]
    where, name = target.pick(*((value, name) for name in value), *((entry, name) for name in entry))
    where[name] = target.pick(
        -1, 0, 10**18, 10**30, 1.5, "x", None, [], {}, True, [[]], {"a": 1}, "../../etc/passwd", "/etc/passwd", "..",
        "a\nb.tar",
        float("nan"), [0] * 4, [1e300] * 4, [float("inf")] * 4, [10**400] * 4, "0" * 64, "\x1b[2J",
        again["shards"] * 2, again["shards"][:1],
    )  # fmt: skip
    return f"{name} is {str(where[name])[:60]}", {"manifest.json": json.dumps(value).encode()}


def missing_file(target: Target) -> tuple[str, Files]:
    name = target.pick(f"{target.name}.tar", f"{target.name}.index.npy")
    return f"{name} is missing", {name: None}


def leftover_file(target: Target) -> tuple[str, Files]:
    name = target.pick(".x.tar.tmp.host.1", "other.tar", "other.done.json", "other.index.npy")
    return name, {name: target.pick(b"", target.tar, target.marker)}


def several(target: Target) -> tuple[str, Files]:
    """Tar and index are both damaged."""
    one, files = target.pick(flipped_bits, damaged_header, truncated, overwritten)(target)
    other, more = damaged_index(target)
    return f"{one}; index: {other}", {**files, **more}
