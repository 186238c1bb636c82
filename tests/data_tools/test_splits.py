"""Splits are decided by source video: what belongs together stays together."""

import hashlib

from data_tools.scanning.splits import SplitItem, assign_splits, draw_splits

DIGESTS = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(1000)]


def test_sizes_of_drawn_splits():
    def sizes(digests, validation, test):
        drawn = [*draw_splits(digests, validation, test).values()]
        return drawn.count("train"), drawn.count("validation"), drawn.count("test")

    train, validation, test = sizes(DIGESTS, 0.1, 0.2)
    assert 60 < validation < 140 and 150 < test < 250 and train + validation + test == 1000
    assert sizes(DIGESTS, 0, 0) == (1000, 0, 0)
    assert sizes(DIGESTS, 1, 0) == (0, 1000, 0) and sizes(DIGESTS, 0, 1) == (0, 0, 1000)
    assert sizes(DIGESTS[:3], 1e-9, 1e-9) == (1, 1, 1)  # no split is empty
    assert sizes(DIGESTS[:2], 1e-9, 0) == sizes(DIGESTS[:2], 0.999999, 0) == (1, 1, 0)
    assert sizes(DIGESTS[:1], 0.9, 0.05) == (1, 0, 0)
    assert sizes([], 0.5, 0.2) == (0, 0, 0)


def test_more_videos_move_none_of_the_earlier():
    few, many = draw_splits(DIGESTS[:500], 0.1, 0.1), draw_splits(DIGESTS, 0.1, 0.1)
    assert all(many[digest] == split for digest, split in few.items())
    assert draw_splits(DIGESTS[::-1], 0.1, 0.1) == many


def test_groups_equal_contents_and_alike_ones_stay_together():
    items = [SplitItem(digest, f"person {i % 100}") for i, digest in enumerate(DIGESTS)]
    splits = assign_splits(items, [], 0.3, 0.1)
    assert all(splits[i] == splits[i % 100] for i in range(1000))
    assert {splits.count(name) > 0 for name in ("train", "validation", "test")} == {True}
    fewer = assign_splits(items[:200], [], 0.3, 0.1)
    assert fewer == splits[:200]  # a group's split does not depend on how many videos it has

    single = [SplitItem(digest) for digest in DIGESTS]
    chain = [(i, i + 1) for i in range(0, 998)]
    assert len(set(assign_splits(single, chain, 0.5, 0.2)[:999])) == 1
    twice = assign_splits([*single, *single], [], 0.5, 0.2)
    assert twice[:1000] == twice[1000:] == assign_splits(single, [], 0.5, 0.2)


def test_given_splits():
    items = [SplitItem(digest, None, "test") for digest in DIGESTS[:5]]
    assert assign_splits(items, [], 0.5, 0) == ["test"] * 5
    items = [SplitItem(DIGESTS[0], "g", "train"), SplitItem(DIGESTS[1], "g"), SplitItem(DIGESTS[2], "g", "validation")]
    assert assign_splits(items, [], 1, 0) == ["train", "train", "validation"]
    # A drawn video goes with the given one that it is alike, and does not count among the drawn.
    items = [SplitItem(DIGESTS[0], None, "test"), SplitItem(DIGESTS[1]), SplitItem(DIGESTS[2])]
    assert assign_splits(items, [(0, 2)], 0, 0) == ["test", "train", "test"]
    assert assign_splits([], [], 0.1, 0) == []
