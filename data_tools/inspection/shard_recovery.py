"""Samples out of a damaged tar by means of its index.

The index says where the numbers or pictures of every sample lie and what their checksum is, so good ones can be told
from bad although headers in the tar are damaged: names and .npy headers say nothing that does not follow from index
and manifest. Only KEY.json is in the tar alone. It is looked for in the stretches that the index does not list.
"""

from __future__ import annotations

import bisect
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ardiff.data.shards import FRAME_MEMBER, MEMBERS, Sample, encode_array, parse_array
from ardiff.data.tar import BLOCK, MAX_READ, Member, ShardError, parse_header
from data_tools.inspection.index_checks import impossible_rows
from data_tools.inspection.sample_checks import ARRAY_AXES, JSON_MEMBER, MAX_JSON, check_sample, parse_description
from data_tools.inspection.shard_checks import Kept, problems_of
from data_tools.inspection.shard_folders import Problem, Rules

KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
MAX_NAMELESS = 1 << 16  # bytes of a description whose header is damaged; bounds the search for it
NAMES = {number: name for name, number in MEMBERS.items()}
MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class _Text:
    """A description that was found: where it lies and whose it is."""

    offset: int
    size: int
    key: str


@dataclass
class _Slot:
    """The rows of one sample in the order of the tar and the members whose headers stand before them (None: none)."""

    rows: list[np.void]
    members: list[Member | None]
    whole: bool  # False: a row is missing here because it cannot be right

    @property
    def keys(self) -> set[str]:
        """What the headers say; one key if they agree."""
        return {member.key for member in self.members if member is not None}


def recover_samples(path: Path, rows: np.ndarray, rules: Rules) -> Iterator[Kept | list[Problem]]:
    """Every sample that the index lists, in order: itself, or why it cannot be had.

    `rows` may be those of a damaged index as well: what they list counts only where its checksum fits.
    """
    with path.open("rb") as stream:
        survey = _Survey(stream, path, rows, rules)
        for number in np.unique(rows["sample"]).tolist():
            yield survey.recover(number)


class _Survey:
    """What lies where in a tar, as far as it can be made out."""

    def __init__(self, stream: BinaryIO, path: Path, rows: np.ndarray, rules: Rules) -> None:
        self.stream, self.path, self.rules = stream, path, rules
        self.size = path.stat().st_size
        rows = rows[np.argsort(rows["offset"], kind="stable")]
        impossible = impossible_rows(rows, self.size, rules) | (rows["bytes"] > MAX_READ)
        self.lost = {int(row["sample"]): int(row["offset"]) for row in rows[impossible]}
        self.rows = rows[~impossible]
        self.starts = (self.rows["offset"] // BLOCK * BLOCK).tolist()  # of the members' data
        self.ends = [_blocks(int(row["offset"] + row["bytes"])) for row in self.rows]
        self.headers: dict[int, Member] = {}  # by the start of the data
        self.texts: list[_Text] = []
        self.others: list[Member] = []  # of other programs
        self._scan()
        self.slots: dict[int, _Slot] = {}
        for row, start in zip(self.rows, self.starts, strict=True):
            slot = self.slots.setdefault(int(row["sample"]), _Slot([], [], int(row["sample"]) not in self.lost))
            slot.rows.append(row)
            slot.members.append(self.headers.get(start))
        self.owned = set[str]().union(*(slot.keys for slot in self.slots.values()))

    def _scan(self) -> None:
        """Go through what is not data of a listed row: sound headers, and stretches that are neither."""
        position, following, gap = 0, 0, 0
        while position < self.size:
            while following < len(self.starts) and self.starts[following] < position:
                following += 1
            limit = self.starts[following] if following < len(self.starts) else self.size
            if position == limit:
                self._search(gap, position)
                position = gap = max(position + BLOCK, self.ends[following])
                continue
            member = self._header_at(position, limit)
            if member is None:
                position += BLOCK
                continue
            self._search(gap, position)
            if member.offset == limit:
                self.headers[limit] = member
                position = gap = limit
            else:
                self._note(member)
                position = gap = _blocks(member.offset + member.size)
        self._search(gap, self.size)

    def _header_at(self, position: int, limit: int) -> Member | None:
        """The member whose header is here, if it is sound and ends before the next listed data (or is that)."""
        try:
            member = parse_header(self._read(position, BLOCK).ljust(BLOCK, b"\0"), position, self.path)
        except ShardError:
            return None
        return member if member.offset == limit or _blocks(member.offset + member.size) <= limit else None

    def _note(self, member: Member) -> None:
        if member.extension == JSON_MEMBER and member.size <= MAX_JSON:
            self.texts.append(_Text(member.offset, member.size, member.key))
        elif member.extension not in MEMBERS and not FRAME_MEMBER.match(member.extension):
            self.others.append(member)

    def _search(self, start: int, end: int) -> None:
        """Look for descriptions whose headers are damaged: they say themselves which sample they are of."""
        for position in range(start, end, BLOCK):
            if self._read(position, 1) != b"{":
                continue
            data = self._read(position, min(end - position, MAX_NAMELESS)).split(b"\0", 1)[0]
            try:
                key = parse_description(data).get("id")
            except ValueError:
                continue
            if isinstance(key, str) and KEY.fullmatch(key):
                self.texts.append(_Text(position, len(data), key))

    def _read(self, offset: int, length: int) -> bytes:
        self.stream.seek(offset)
        return self.stream.read(length)

    def recover(self, number: int) -> Kept | list[Problem]:
        """Sample `number`, or why it cannot be had."""
        slot = self.slots.get(number)
        if slot is None or not slot.whole:
            reason = "beyond the end of the tar, or its row of the index is damaged"
            return [Problem(str(self.path), f"sample number {number}: {reason}", self.lost[number])]
        offset = int(slot.rows[0]["offset"])
        between = range(self._before(slot), self._after(slot))
        key = self._key(slot, between)
        if key is None:
            return [Problem(str(self.path), f"sample number {number}: its name is damaged", offset)]
        members: dict[str, bytes] = {}
        places: list[Member] = []
        for position, row in enumerate(slot.rows):
            data = self._read(int(row["offset"]), int(row["bytes"]))
            if zlib.crc32(data) != row["crc32"]:
                return [Problem(str(self.path), "not what its checksum in the index says", int(row["offset"]), key)]
            name, content = self._rebuilt(row, data, slot.members[position], position)
            members[name] = content
            places.append(Member(key, name, int(row["offset"]), len(content)))
        for member in self.others:
            if member.key == key and member.offset in between and member.size <= MAX_READ:
                members[member.extension] = self._read(member.offset, member.size)
        text = next((text for text in self.texts if text.key == key and text.offset in between), None)
        if text is not None:
            members[JSON_MEMBER] = self._read(text.offset, text.size)
            places.append(Member(key, JSON_MEMBER, text.offset, text.size))
        return self._checked(key, members, places, int(slot.rows[0]["label"]))

    def _checked(self, key: str, members: dict[str, bytes], places: list[Member], label: int) -> Kept | list[Problem]:
        checked = check_sample(key, members, self.rules)
        if checked.faults:
            return problems_of(self.path, places, checked.faults)
        info: dict[str, Any] = checked.info
        if info.get("class") != (None if label < 0 else label):
            return [Problem(str(self.path), "its class is not the one in the index", places[-1].offset, key)]
        del members[JSON_MEMBER]
        return Kept(Sample(key, info, members), checked)

    def _before(self, slot: _Slot) -> int:
        """Where the data of the sample before ends: nothing of this one lies before that."""
        first = bisect.bisect_left(self.starts, int(slot.rows[0]["offset"]) // BLOCK * BLOCK)
        return self.ends[first - 1] if first else 0

    def _after(self, slot: _Slot) -> int:
        last = bisect.bisect_right(self.starts, int(slot.rows[-1]["offset"]) // BLOCK * BLOCK)
        return self.starts[last] if last < len(self.starts) else self.size

    def _key(self, slot: _Slot, between: range) -> str | None:
        """By the headers; if all are damaged, by the one description here that belongs to no other sample."""
        found = slot.keys or {text.key for text in self.texts if text.offset in between} - self.owned
        return found.pop() if len(found) == 1 else None

    def _rebuilt(self, row: np.void, data: bytes, member: Member | None, position: int) -> tuple[str, bytes]:
        """Name and content of a member: as they stand in the tar, or made anew where its header is damaged."""
        if self.rules.kind == "frames":
            extension = next((kind for magic, kind in MAGIC if data.startswith(magic)), "jpg")
            return f"{position:05d}.{extension}", data  # pictures are read in the order of the index
        name = NAMES[int(row["member"])]
        if member is not None and member.extension == name and member.offset + member.size == row["offset"] + len(data):
            content = self._read(member.offset, member.size)
            with suppress(ValueError):
                if member.offset + parse_array(content, ARRAY_AXES[name])[0] == row["offset"]:
                    return name, content
        frames = int(row["frames"])
        axes = (frames, self.rules.tokens, self.rules.channels) if ARRAY_AXES[name] == 3 else (frames, -1)
        return name, encode_array(np.frombuffer(data, dtype="<f2").reshape(axes))


def _blocks(position: int) -> int:
    """The end of the block that ends at or after `position`."""
    return -(-position // BLOCK) * BLOCK
