"""Which videos are for training, validation and testing: decided by source video, never by scene."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ardiff.data.corpus import SPLITS
from data_tools.scanning.near_duplicates import connect

TRAIN, VALIDATION, TEST = SPLITS


@dataclass(frozen=True)
class SplitItem:
    """A source video: its content and, if there are any, the group that it must stay with and the split it is given."""

    sha256: str
    group: str | None = None
    split: str | None = None


def assign_splits(
    items: Sequence[SplitItem], alike: Iterable[tuple[int, int]], validation: float, test: float
) -> list[str]:
    """The split of each video: the one that it is given, or else the one that follows from its content.

    Videos of one group or of equal content, and those that `alike` names as pairs of indices, get one split: where
    the split of one of them is given it is that of all (of the first, if several are given), except for those with a
    split of their own. The others are drawn by hash, so that adding videos moves none of the earlier ones unless it
    joins them with others. Fractions between 0 and 1 leave no split empty if there are enough videos.
    """
    pairs, first_with = list(alike), dict[tuple[str, str], int]()
    for number, item in enumerate(items):
        for key in (("content", item.sha256), ("group", item.group)):
            if key[1] is not None:
                pairs.append((first_with.setdefault((key[0], key[1]), number), number))
    joined = connect(len(items), pairs)
    given, digests = dict[int, str](), dict[int, str]()
    for first, item in zip(joined, items, strict=True):
        digest = item.sha256 if item.group is None else hashlib.sha256(item.group.encode()).hexdigest()
        digests[first] = min(digest, digests.get(first, digest))
        if item.split is not None:
            given.setdefault(first, item.split)
    drawn = draw_splits({digest for first, digest in digests.items() if first not in given}, validation, test)
    return [item.split or given.get(first) or drawn[digests[first]] for first, item in zip(joined, items, strict=True)]


def draw_splits(digests: Iterable[str], validation: float, test: float) -> dict[str, str]:
    """Digest (hex) -> split: the lowest go to validation, the next to test, about as many as the fractions say."""
    order = sorted(set(digests))
    places = [int(digest[:16], 16) / 2**64 for digest in order]
    first = sum(place < validation for place in places)
    second = sum(place < validation + test for place in places)
    spare = len(order) - (validation + test < 1)  # the rest are for training, of which there is at least one
    first = min(max(first, validation > 0), spare)
    second = min(max(second, first + (test > 0)), spare)
    return {
        digest: VALIDATION if number < first else TEST if number < second else TRAIN
        for number, digest in enumerate(order)
    }
