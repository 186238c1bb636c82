"""The shard that tests mutate, taken apart, and tars that say anything at all."""

from __future__ import annotations

import io
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BLOCK = 512
Files = dict[str, bytes | None]  # new content by name; None: deleted


@dataclass
class Target:
    """The shard to be mutated, whole, and a source of chance."""

    rng: np.random.Generator
    name: str  # of the shard, without suffix
    tar: bytes
    index: bytes
    marker: bytes
    manifest: bytes
    trap: Path  # what a hostile pickle creates
    members: list[tuple[str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with tarfile.open(fileobj=io.BytesIO(self.tar)) as tar:
            self.members = [(member.name, read(tar, member)) for member in tar]

    def pick(self, *options):
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def place(self, size: int) -> int:
        """A number below `size`."""
        return int(self.rng.integers(max(1, size)))

    def member(self, *suffixes: str) -> int:
        """The number of a member whose name ends so."""
        return self.pick(*(i for i, (name, _) in enumerate(self.members) if name.endswith(suffixes)))

    def payload(self) -> int:
        """The number of a member that is not a description."""
        return self.member(".npy", ".jpg", ".png", ".webp")

    def with_members(self, members: list[tuple[str, bytes]], detail: str) -> tuple[str, Files]:
        """The tar of other members."""
        return detail, {f"{self.name}.tar": make_tar(members)}

    def replaced(self, number: int, data: bytes, what: str) -> tuple[str, Files]:
        """The tar with other content of one member."""
        name = self.members[number][0]
        members = [*self.members[:number], (name, data), *self.members[number + 1 :]]
        return self.with_members(members, f"{name} is {what}")

    def raw(self, number: int, block: bytes, detail: str) -> tuple[str, Files]:
        """The tar with other bytes before member `number` of those that are kept as they are."""
        head, tail = make_tar(self.members[:number], end=False), make_tar(self.members[number:])
        return detail, {f"{self.name}.tar": head + block + tail}


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"", prefix: bytes = b"") -> bytes:
    """A tar header with a right checksum, whatever it says."""
    block = bytearray(BLOCK)
    block[: len(name[:100])] = name[:100]
    block[100:108] = b"0000444\0"
    block[124 : 124 + len(size)] = size
    block[156:157], block[157 : 157 + len(link)] = kind, link
    block[257:265], block[345 : 345 + len(prefix)] = b"ustar\00000", prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def make_tar(members: list[tuple[str, bytes]], end: bool = True) -> bytes:
    """A plain tar, its headers sound."""
    parts = [header(name.encode(), b"%011o\0" % len(data)) + padded(data) for name, data in members]
    return b"".join(parts) + bytes(20 * BLOCK if end else 0)


class Trap:
    """What a hostile pickle does when it is loaded: it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_header(text: str, version: bytes = b"\x01\x00") -> bytes:
    """An array file whose header says anything at all."""
    body = text.encode() + b"\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(body))
    return b"\x93NUMPY" + version + length + body
