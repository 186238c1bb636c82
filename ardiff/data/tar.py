"""Strict reading of shards: plain ustar archives of regular files named KEY.EXTENSION, and nothing else.

Python's tarfile is made to get something out of any archive. Training wants the opposite: a damaged header must not
end the archive early without a word, a size of exabytes must not be allocated, and links, devices, paths and
extended headers have no business in a shard. Nothing is ever extracted, so names are only compared.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ardiff.errors import UserError

BLOCK = 512
NAME = re.compile(rb"([A-Za-z0-9_-]{1,90})\.([A-Za-z0-9][A-Za-z0-9._]{0,30})\0*")
OCTAL = re.compile(rb" *([0-7]{1,11})[ \0]*")
MAX_MEMBER = 1 << 34  # 16 GiB: beyond any sample, within any disk
MAX_READ = 1 << 30  # of what is held in memory at once: the latents of a day of video are smaller


class ShardError(UserError):
    """Something in a shard that cannot be used: which file, at which byte, and why (one line)."""

    def __init__(self, path: Path | str, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")
        self.path, self.offset, self.reason = str(path), offset, reason


@dataclass(frozen=True)
class Member:
    """One file in a tar; `offset` is that of its first byte of data."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """As it stands in the tar."""
        return f"{self.key}.{self.extension}"


def read_members(stream: BinaryIO, path: Path) -> Iterator[Member]:
    """The members of the tar open in `stream` (seekable), in order; `path` is for messages.

    Raises ShardError at the first byte that a shard may not have, a missing end mark included. The caller may read
    from `stream` between members.
    """
    end = os.fstat(stream.fileno()).st_size
    position = 0
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if not header.strip(b"\0"):
            break
        if len(header) < BLOCK:
            raise ShardError(path, position, "the file ends inside a header")
        member = parse_header(header, position, path)
        position = member.offset + -(-member.size // BLOCK) * BLOCK
        if position > end:
            raise ShardError(path, member.offset, f"{member.name} has {member.size} bytes, more than the file")
        yield member
    stream.seek(position)
    rest = stream.read(64 * BLOCK)
    if len(rest) < 2 * BLOCK:
        raise ShardError(path, position, "the file ends without the end mark of a tar: it was cut off")
    if rest.strip(b"\0") or position + len(rest) != end:
        raise ShardError(path, position, "something follows the end mark")


def read_member(stream: BinaryIO, member: Member, path: Path) -> bytes:
    """The content of a member. Raises ShardError where it is too large to be held, or the file ends inside it."""
    if member.size > MAX_READ:
        limit = f"more than the {MAX_READ} that are read at once"
        raise ShardError(path, member.offset, f"{member.name} has {member.size} bytes, {limit}")
    stream.seek(member.offset)
    data = stream.read(member.size)
    if len(data) != member.size:
        raise ShardError(path, member.offset, f"the file ends inside {member.name}")
    return data


def parse_header(header: bytes, position: int, path: Path) -> Member:
    """The member whose header of BLOCK bytes stands at `position`. Raises ShardError for what a shard may not have."""
    expected = OCTAL.fullmatch(header[148:156])
    blanked = header[:148] + b" " * 8 + header[156:]
    if not expected or int(expected[1], 8) != sum(blanked):
        raise ShardError(path, position, "the header's checksum is wrong: damaged, or not a tar")
    name = NAME.fullmatch(header[:100])
    if not name or header[345:500].strip(b"\0"):
        raise ShardError(path, position, f"the name {header[:100].rstrip(bytes(1))!r} is not KEY.EXTENSION")
    if header[156:157] not in (b"0", b"\0"):
        raise ShardError(path, position, f"{name[0].rstrip(bytes(1)).decode()} is not a regular file")
    size = OCTAL.fullmatch(header[124:136])
    if not size or int(size[1], 8) > MAX_MEMBER:
        raise ShardError(path, position, f"{name[0].rstrip(bytes(1)).decode()} has no sensible size")
    return Member(name[1].decode(), name[2].decode(), position + BLOCK, int(size[1], 8))
