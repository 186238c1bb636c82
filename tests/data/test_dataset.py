import json

import numpy as np
import pytest
from data_helpers import LENGTHS, all_latents, class_of, decoded, picture, write_frames, write_latents

from ardiff.data import dataset
from ardiff.data.dataset import ShardSet, open_shards
from ardiff.data.shards import INDEX_DTYPE
from ardiff.errors import UserError

SHARD = "latents-000001.tar"


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path)
    return tmp_path


def edit_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_video_is_found_with_its_label(folder):
    shards = open_shards(folder, "latents")
    lengths = [length for part in LENGTHS for length in part]
    assert len(shards) == len(lengths)
    assert shards.frames.tolist() == lengths
    expected = [-1 if class_of(video) is None else class_of(video) for video in range(len(lengths))]
    assert shards.labels.tolist() == expected


def test_any_frames_of_any_video_are_read(folder):
    shards = open_shards(folder, "latents")
    for video, latents in enumerate(all_latents()):
        length = len(latents)
        for stride in (1, 2, 5):
            for first in {0, length // 2, length - 1}:
                for count in {1, 2, (length - first + stride - 1) // stride}:
                    if first + (count - 1) * stride >= length:
                        continue
                    found = shards.read_latents(video, first, count, stride)
                    expected = latents[[first + i * stride for i in range(count)]]
                    assert found.dtype == np.float16
                    assert np.array_equal(found, expected), (video, first, count, stride)


def test_videos_are_read_in_any_order_with_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(dataset, "OPEN_FILES", 1)
    shards = open_shards(folder, "latents")
    latents = all_latents()
    for video in [*range(len(latents)), *reversed(range(len(latents))), 0, 8, 4, 0]:
        assert np.array_equal(shards.read_latents(video, 0, len(latents[video])), latents[video])
        assert len(shards._files) <= 1


def test_pictures_are_read(tmp_path):
    lengths = ((3, 1), (6,))
    write_frames(tmp_path, lengths, size=16)
    shards = open_shards(tmp_path, "frames")
    assert shards.frames.tolist() == [3, 1, 6]
    assert shards.labels.tolist() == [0, 1, 2]
    for video, first, count, stride in [(0, 0, 3, 1), (1, 0, 1, 1), (2, 2, 4, 1), (2, 1, 3, 2), (2, 5, 1, 7)]:
        found = shards.read_frames(video, first, count, stride)
        expected = [decoded(picture(video, first + i * stride, 16)) for i in range(count)]
        assert found.dtype == np.uint8
        assert np.array_equal(found, np.stack(expected))


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("", [0, 1, 2]),
        ("manifest.json", [0, 1, 2]),
        ("latents-{000000..000002}.tar", [0, 1, 2]),
        ("latents-{000001..000002}.tar", [1, 2]),
        ("latents-{000002,000000}.tar", [2, 0]),  # in the order of the pattern
        ("latents-*.tar", [0, 1, 2]),
        ("latents-00000[02].tar", [0, 2]),
        ("{latents-000000,latents-*2}.tar", [0, 2]),
        ("latents-000001.tar", [1]),
    ],
)
def test_sources(folder, pattern, chosen):
    shards = open_shards(f"{folder}/{pattern}", "latents")
    files = [f"latents-{number:06d}.tar" for number in chosen]
    assert [shard.file for shard in shards.manifest.shards] == files
    assert shards.frames.tolist() == [length for number in chosen for length in LENGTHS[number]]
    first_video = sum(len(part) for part in LENGTHS[: chosen[0]])
    assert np.array_equal(shards.read_latents(0, 0, 1), all_latents()[first_video][:1])


def test_a_path_may_be_a_path_object(folder):
    assert len(open_shards(folder / SHARD, "latents")) == 2


def test_identity_changes_with_the_content_and_the_choice(tmp_path):
    lengths = [list(part) for part in LENGTHS]
    write_latents(tmp_path / "one", lengths)
    write_latents(tmp_path / "same", lengths)
    write_latents(tmp_path / "other", [[*lengths[0][:2], 17], *lengths[1:]])
    identity = open_shards(tmp_path / "one", "latents").identity
    assert open_shards(tmp_path / "same", "latents").identity == identity
    assert open_shards(tmp_path / "other", "latents").identity != identity
    assert open_shards(tmp_path / "one" / "latents-00000[01].tar", "latents").identity != identity


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("latents-{000001..000003}.tar", "latents-000003.tar"),
        ("other-000000.tar", "other-000000.tar"),
        ("other-*.tar", "other-*.tar"),
        ("none/latents-*.tar", "none"),
        ("none", "none"),
        ("none/manifest.json", "none"),
        ("../typo", "../typo"),  # not only the manifest that would be beside it
        ("latents-{000000..000002.tar", "latents-{000000..000002.tar"),
    ],
)
def test_sources_that_do_not_exist_are_named(folder, pattern, named):
    with pytest.raises(UserError) as caught:
        open_shards(folder / pattern, "latents")
    assert str(folder / named) in str(caught.value)


def test_the_wrong_kind_names_its_maker(folder):
    with pytest.raises(UserError, match=r"shard_videos") as caught:
        open_shards(folder, "frames")
    assert str(folder) in str(caught.value)


def test_an_empty_manifest_is_refused(folder):
    edit_manifest(folder, shards=[])
    with pytest.raises(UserError, match=str(folder)):
        open_shards(folder, "latents")


def test_another_format_version_is_refused(folder):
    edit_manifest(folder, format=3)
    with pytest.raises(UserError, match=str(folder / "manifest.json")):
        open_shards(folder, "latents")


def index_of(folder, number):
    return folder / f"latents-{number:06d}.index.npy"


def rewritten(folder, number, change):
    """Save one index anew after a change."""
    rows = np.load(index_of(folder, number))
    change(rows)
    np.save(index_of(folder, number), rows)


DAMAGES = {
    "missing shard": (SHARD, lambda folder: (folder / SHARD).unlink()),
    "truncated shard": (SHARD, lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-512])),
    "empty shard": (SHARD, lambda folder: (folder / SHARD).write_bytes(b"")),
    "grown shard": (SHARD, lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"\0")),
    "missing index": ("latents-000001.index.npy", lambda folder: index_of(folder, 1).unlink()),
    "empty index": ("latents-000001.index.npy", lambda folder: index_of(folder, 1).write_bytes(b"")),
    "half an index": (
        "latents-000001.index.npy",
        lambda folder: index_of(folder, 1).write_bytes(index_of(folder, 1).read_bytes()[:-10]),
    ),
    "index of another shard": (
        "latents-000001.index.npy",
        lambda folder: index_of(folder, 1).write_bytes(index_of(folder, 0).read_bytes()),
    ),
    "index of other columns": (
        "latents-000001.index.npy",
        lambda folder: np.save(index_of(folder, 1), np.zeros(2, dtype=INDEX_DTYPE.descr[:3])),
    ),
    "index of plain numbers": (
        "latents-000001.index.npy",
        lambda folder: np.save(index_of(folder, 1), np.zeros((2, 6))),
    ),
    "pickled index": (
        "latents-000001.index.npy",
        lambda folder: np.save(index_of(folder, 1), np.array([{}], dtype=object), allow_pickle=True),
    ),
    "index beyond the end": (
        "latents-000001.index.npy",
        lambda folder: rewritten(folder, 1, lambda rows: rows["offset"].__iadd__(10**6)),
    ),
    "index before the start": (
        "latents-000001.index.npy",
        lambda folder: rewritten(folder, 1, lambda rows: rows["offset"].__isub__(10**6)),
    ),
    "index of too many samples": (
        "latents-000001.index.npy",
        lambda folder: rewritten(folder, 1, lambda rows: rows["sample"].__iadd__(5)),
    ),
    "index with wrong sizes": (
        "latents-000001.index.npy",
        lambda folder: rewritten(folder, 1, lambda rows: rows["bytes"].__isub__(16)),
    ),
    "index with swapped lengths": (
        "latents-000001.index.npy",
        lambda folder: rewritten(folder, 1, lambda rows: rows["frames"].__setitem__(slice(None), [7, 20])),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_on_opening_and_named(folder, damage):
    named, harm = DAMAGES[damage]
    harm(folder)
    with pytest.raises(UserError) as caught:
        open_shards(folder, "latents")
    assert str(folder / named) in str(caught.value)


def test_the_index_of_a_shard_of_equal_size_is_found_out(tmp_path):
    # as many samples and frames, but in another order: read through it, videos would be noise
    write_latents(tmp_path, ((5, 1, 16), (16, 1, 5)))
    index_of(tmp_path, 1).write_bytes(index_of(tmp_path, 0).read_bytes())
    with pytest.raises(UserError) as caught:
        open_shards(tmp_path, "latents")
    assert str(index_of(tmp_path, 1)) in str(caught.value)


def test_shards_that_are_not_asked_for_may_be_missing(folder):
    # a node may hold its own share only
    (folder / SHARD).unlink()
    assert len(open_shards(folder / "latents-{000000,000002}.tar", "latents")) == 7


def test_an_empty_shard_among_others_is_harmless(tmp_path):
    write_latents(tmp_path, ((5, 1), (), (7,)))
    shards = open_shards(tmp_path, "latents")
    assert shards.frames.tolist() == [5, 1, 7]
    assert np.array_equal(shards.read_latents(2, 0, 7), all_latents(((5, 1), (7,)))[2])


def test_a_shard_set_can_be_built_from_a_manifest(folder):
    manifest = open_shards(folder, "latents").manifest
    assert len(ShardSet(manifest)) == 9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": None}, "says nothing of tokens"),
        ({"arvae": None}, "says nothing of arvae"),
        ({"samples": "two"}, "entry of 'latents-000000.tar' is malformed"),
        ({"file": 3}, "entry of '3' is malformed"),
        ({"file": "../latents-000000.tar"}, "is malformed"),
        ({"sha256": "/tmp/elsewhere"}, "is malformed"),
        ({"bytes": True}, "is malformed"),
        ({"mean": [0.0]}, "'mean' is not a list of 4 numbers"),
        ({"std": [float("nan")] * 4}, "'std' is not a list of 4 numbers"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused_in_one_line(tmp_path, change, named):
    write_latents(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    for key, new in change.items():
        if new is None:
            del value[key]
        elif key in value:
            value[key] = new
        else:
            value["shards"][0][key] = new
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=named) as error:
        open_shards(tmp_path, "latents")
    assert str(path) in str(error.value)
