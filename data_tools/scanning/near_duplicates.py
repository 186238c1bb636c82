"""Scenes that look nearly identical: re-encoded, scaled or slightly cropped copies of one another.

A scene is described by a few of its frames: an average hash of each (imagehash, 64 bits), and its colours in a grid
of 4 x 4. Scenes that agree in a random choice of bits, one choice per table, are compared by their colours: those must
agree, and so must the way they change from frame to frame, which tells apart different clips of one place. That does
not compare all pairs: a million scenes take minutes. Copies with other colours, mirrored ones, and pieces of a longer
scene are not found.
"""

from __future__ import annotations

import base64
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

FRAMES = 8  # of a scene, evenly spaced
HASH_BITS = 64
SIDE = 16  # pixels of the small pictures that frames are described from
GRID = 4
COLOURS = FRAMES * GRID * GRID * 3
MAX_PICTURES = 8192  # kept per video (6 MiB); of a longer one every second, every fourth, ...

FLAT = 4.0  # standard deviation of the brightness below which a frame shows nothing that could be compared
MAX_DIFFERENCE = 8.0  # root mean square over all colours of all frames, 0 to 255
MAX_MOTION_DIFFERENCE = 0.4  # the same after subtracting each scene's mean picture, relative to its motion
MIN_MOTION = 2.0  # motion below this (root mean square) is taken for that: it may be nothing but noise

TABLES, BITS_PER_TABLE = 24, 32
NEIGHBOURS = 8  # that a scene is compared with in a table, so that many alike do not take for ever
PAIRS_AT_A_TIME = 20_000


@dataclass(frozen=True)
class Signature:
    """What a scene looks like. `hashes`: 16 hex digits per frame, all 0 for a flat one; `colours`: in base64."""

    hashes: str
    colours: str

    def brightness(self) -> float:
        """The mean of all colours of the brightest of its frames, 0 to 255."""
        return float(_colours(self.colours).reshape(FRAMES, -1).mean(1).max())


class Pictures:
    """Small pictures of a video's frames, from which the scenes are described once they are known."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._stride, self._seen = 1, 0

    def see(self, thumbnail: np.ndarray) -> None:
        """Take the next frame: uint8 RGB [H, W, 3]."""
        import cv2

        if self._seen % self._stride == 0:
            if len(self._kept) == MAX_PICTURES:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self._kept.append(cv2.resize(thumbnail, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        self._seen += 1

    def signature(self, first_frame: int, num_frames: int) -> Signature:
        """Describe the scene of these frames."""
        places = [(first_frame + (2 * i + 1) * num_frames // (2 * FRAMES)) // self._stride for i in range(FRAMES)]
        begin = min(-(-first_frame // self._stride), len(self._kept) - 1)  # so as not to show the scene before
        pictures = [self._kept[max(place, begin)] for place in places]
        cell = SIDE // GRID
        grids = np.stack(pictures).reshape(FRAMES, GRID, cell, GRID, cell, 3).mean((2, 4))
        colours = base64.b64encode(grids.round().astype(np.uint8).tobytes()).decode()
        return Signature("".join(map(_average_hash, pictures)), colours)


def _average_hash(picture: np.ndarray) -> str:
    import imagehash

    image = Image.fromarray(picture)
    if np.asarray(image.convert("L")).std() < FLAT:
        return "0" * (HASH_BITS // 4)
    return str(imagehash.average_hash(image))


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found, per scene, as indices into the given scenes."""

    original: list[int | None]  # the first scene that this one is nearly identical to; None: it is an original
    group: list[int]  # the first of all scenes that it is connected with through copies of copies


def find_duplicates(signatures: Sequence[Signature], contents: Sequence[Hashable]) -> Duplicates:
    """Find the scenes that are nearly identical to an earlier one; equal `contents` are identical in any case.

    Equal input gives equal results. The originals are chosen in the given order.
    """
    first_with = dict[Hashable, int]()
    same = [first_with.setdefault(content, number) for number, content in enumerate(contents)]
    distinct = np.array(sorted(first_with.values()), dtype=np.int64)
    hashes = np.array([_words(signatures[i].hashes) for i in distinct], dtype=np.uint64).reshape(-1, FRAMES)
    colours = np.array([_colours(signatures[i].colours) for i in distinct], dtype=np.uint8).reshape(-1, COLOURS)
    # A scene that is black for the most part would be like every other such scene.
    shows_something = (hashes != 0).sum(1) * 2 >= FRAMES
    hashes, colours, distinct = (part[shows_something] for part in (hashes, colours, distinct))

    means = colours.reshape(-1, FRAMES, COLOURS // FRAMES).mean(1, dtype=np.float32)
    pairs = [pair for table in _candidates(hashes) for pair in _alike(colours, means, *table)]
    group = connect(len(distinct), pairs)
    original = _originals(colours, group)
    original_of: dict[int, int] = {
        int(distinct[i]): int(distinct[found]) for i, found in enumerate(original) if found is not None
    }
    group_of = {int(distinct[i]): int(distinct[first]) for i, first in enumerate(group)}
    originals: list[int | None] = []
    for number, first in enumerate(same):
        found = original_of.get(first, first)
        originals.append(None if found == number else found)
    return Duplicates(originals, [group_of.get(first, first) for first in same])


def connect(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Join the numbers 0 ... count - 1 by pairs; for each number the lowest one that it is joined with."""
    lowest = list(range(count))

    def find(number: int) -> int:
        while lowest[number] != number:
            lowest[number] = lowest[lowest[number]]
            number = lowest[number]
        return number

    for one, other in pairs:
        first, second = sorted((find(one), find(other)))
        lowest[second] = first
    return [find(number) for number in range(count)]


def _words(hashes: str) -> list[int]:
    size = HASH_BITS // 4
    return [int(hashes[i : i + size], 16) for i in range(0, FRAMES * size, size)]


def _colours(encoded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded), np.uint8)


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of scenes (indices, the lower first) whose hashes, uint64 [N, FRAMES], agree in all bits of a table.

    Of very many that agree each is paired with its NEIGHBOURS only, and with the first.
    """
    rng = np.random.default_rng(0)
    one = np.uint64(1)
    for _ in range(TABLES):
        key = np.zeros(len(hashes), dtype=np.uint64)
        for place in rng.choice(FRAMES * HASH_BITS, BITS_PER_TABLE, replace=False):
            frame, bit = divmod(int(place), HASH_BITS)
            key = (key << one) | ((hashes[:, frame] >> np.uint64(bit)) & one)
        order = np.argsort(key, kind="stable")
        key = key[order]
        begins = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else np.zeros(0, np.int64)
        sizes = np.diff(np.append(begins, len(key)))
        first = np.repeat(order[begins], sizes)
        yield first[first != order], order[first != order]
        for step in range(1, NEIGHBOURS + 1):
            equal = key[step:] == key[:-step]
            yield order[:-step][equal], order[step:][equal]


def _alike(colours: np.ndarray, means: np.ndarray, ones: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs that are alike; `means` [N, colours of a frame] are the mean pictures of the scenes."""
    for start in range(0, len(ones), PAIRS_AT_A_TIME):
        some, more = ones[start : start + PAIRS_AT_A_TIME], others[start : start + PAIRS_AT_A_TIME]
        # Mean pictures never differ by more than the scenes do, so most pairs are settled by them.
        close = np.square(means[some] - means[more]).mean(1) <= MAX_DIFFERENCE**2 * 1.001
        some, more = some[close], more[close]
        found = are_alike(colours[some], colours[more])
        yield from zip(some[found].tolist(), more[found].tolist(), strict=True)


def are_alike(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether scenes are nearly identical by their colours: two times uint8 [N, COLOURS] -> bool [N]."""

    def mean_square(values: np.ndarray) -> np.ndarray:
        return np.square(values).mean((1, 2))

    one, other = (part.reshape(-1, FRAMES, COLOURS // FRAMES).astype(np.float32) for part in (ones, others))
    close = mean_square(one - other) <= MAX_DIFFERENCE**2
    motion, other_motion = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    less = np.minimum(mean_square(motion), mean_square(other_motion))
    limit = MAX_MOTION_DIFFERENCE**2 * np.maximum(less, MIN_MOTION**2)
    return close & (mean_square(motion - other_motion) <= limit)


def _originals(colours: np.ndarray, group: list[int]) -> list[int | None]:
    """For each scene the first original of its group that it is alike; None makes it one."""
    originals = dict[int, list[int]]()
    sizes = np.bincount(np.array(group, dtype=np.int64), minlength=1)
    result: list[int | None] = []
    for number, first in enumerate(group):
        earlier = originals.setdefault(first, []) if sizes[first] > 1 else []
        match = None
        if earlier:
            this = np.broadcast_to(colours[number], (len(earlier), COLOURS))
            found = np.flatnonzero(are_alike(this, colours[earlier]))
            match = earlier[int(found[0])] if len(found) else None
        if match is None:
            earlier.append(number)
        result.append(match)
    return result
