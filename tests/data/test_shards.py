import io
import json
import os
import pickle
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_helpers import (
    CLASSES,
    LENGTHS,
    all_latents,
    class_of,
    latent_samples,
    picture,
    write_frames,
    write_latents,
)

from ardiff.data import shards
from ardiff.data.shards import (
    INDEX_DTYPE,
    Manifest,
    Moments,
    Sample,
    encode_array,
    finished_shard,
    index_tar,
    read_manifest,
    read_samples,
    write_manifest,
    write_shard,
)
from ardiff.data.tar import ShardError
from ardiff.errors import UserError


def foreign_reader(tar):
    """All samples as plain webdataset reads them."""
    return list(webdataset.WebDataset(str(tar), shardshuffle=False))


def sample_of(data, key="000000", info=None):
    return Sample(key, info or {"id": key}, {"latents.npy": data})


def npy(array, **options):
    """An array as numpy writes it, without our own writer's precautions."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def tar_with(path, members):
    """A tar of (name, bytes), as somebody else's program may write it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_plain_webdataset_reads_the_same_latents(tmp_path):
    manifest = write_latents(tmp_path)
    video = 0
    for shard, lengths in zip(manifest.shards, LENGTHS, strict=True):
        samples = foreign_reader(tmp_path / shard.file)
        assert [sample["__key__"] for sample in samples] == [f"{video + i:06d}" for i in range(len(lengths))]
        for sample in samples:
            array = np.load(io.BytesIO(sample["latents.npy"]), allow_pickle=False)
            assert array.dtype == np.float16
            assert np.array_equal(array, all_latents()[video])
            assert json.loads(sample["json"])["class"] == class_of(video)
            video += 1
    assert video == sum(len(part) for part in LENGTHS)


def test_plain_webdataset_reads_the_same_pictures(tmp_path):
    write_frames(tmp_path, ((3, 1),), size=16)
    samples = foreign_reader(tmp_path / "frames-000000.tar")
    assert len(samples) == 2
    for video, length in enumerate((3, 1)):
        for frame in range(length):
            assert samples[video][f"{frame:05d}.jpg"] == picture(video, frame, 16)
        assert f"{length:05d}.jpg" not in samples[video]


def test_our_reader_without_index_agrees_with_webdataset(tmp_path):
    manifest = write_latents(tmp_path)
    for shard in manifest.shards:
        ours = list(read_samples(tmp_path / shard.file))
        for one, other in zip(ours, foreign_reader(tmp_path / shard.file), strict=True):
            assert one.key == other["__key__"]
            assert one.info == json.loads(other["json"])
            assert one.members == {"latents.npy": other["latents.npy"]}


def test_shards_are_reproduced_byte_by_byte(tmp_path):
    for name in ("one", "other"):
        write_latents(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    assert len(files) == 3 * 3 + 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    with tarfile.open(tmp_path / "one" / "latents-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}  # equal bytes above may be luck within one second


def test_the_index_points_at_the_arrays_in_the_tar(tmp_path):
    manifest = write_latents(tmp_path)
    video = 0
    for shard in manifest.shards:
        content = (tmp_path / shard.file).read_bytes()
        rows = np.load(tmp_path / shard.file.replace(".tar", ".index.npy"), allow_pickle=False)
        assert rows.dtype == INDEX_DTYPE
        assert rows["sample"].tolist() == list(range(shard.samples))
        for row in rows:
            expected = all_latents()[video]
            data = content[row["offset"] : row["offset"] + row["bytes"]]
            assert data == expected.tobytes()
            assert row["frames"] == len(expected)
            assert row["crc32"] == zlib.crc32(data)
            assert row["label"] == (-1 if class_of(video) is None else class_of(video))
            video += 1


def test_the_index_points_at_the_pictures_in_the_tar(tmp_path):
    write_frames(tmp_path, ((3, 1),), size=16)
    content = (tmp_path / "frames-000000.tar").read_bytes()
    rows = np.load(tmp_path / "frames-000000.index.npy", allow_pickle=False)
    assert rows["sample"].tolist() == [0, 0, 0, 1]
    for row, (video, frame) in zip(rows, [(0, 0), (0, 1), (0, 2), (1, 0)], strict=True):
        assert content[row["offset"] : row["offset"] + row["bytes"]] == picture(video, frame, 16)
        assert (row["frames"], row["label"]) == (1, class_of(video))


def test_the_entry_describes_the_files(tmp_path):
    manifest = write_latents(tmp_path)
    for shard, lengths in zip(manifest.shards, LENGTHS, strict=True):
        content = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.samples, shard.frames) == (len(content), len(lengths), sum(lengths))
        assert finished_shard(tmp_path, Path(shard.file).stem) == shard


def test_statistics_are_those_of_all_latents(tmp_path):
    manifest = write_latents(tmp_path)
    everything = np.concatenate(all_latents()).astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(manifest.details["mean"], everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.details["std"], everything.std(0), rtol=1e-12)


def test_moments_do_not_depend_on_the_split_and_survive_json():
    values = np.random.default_rng(0).normal(5, 0.1, (60, 3, 2)).astype(np.float16)
    parts = []
    for start, end in ((0, 1), (1, 50), (50, 60)):
        moments = Moments(2)
        moments.add(values[start:end])
        parts.append(json.loads(json.dumps(moments.as_json())))
    mean, std = Moments.merge([*parts, {}])  # a shard without statistics counts for nothing
    flat = values.astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, flat.std(0), rtol=1e-9)


@pytest.mark.parametrize(
    "damage", ["no marker", "broken marker", "foreign marker", "no tar", "short tar", "no index", "other name"]
)
def test_a_shard_counts_as_finished_only_when_all_of_it_is_there(tmp_path, damage):
    entry = write_shard(tmp_path, "x", latent_samples(0, (3, 2), 2, 4))
    assert finished_shard(tmp_path, "x") == entry
    marker, tar = tmp_path / "x.done.json", tmp_path / "x.tar"
    name = "x"
    if damage == "no marker":
        marker.unlink()
    elif damage == "broken marker":
        marker.write_text(marker.read_text()[:20])
    elif damage == "foreign marker":
        marker.write_text("[1, 2]")
    elif damage == "no tar":
        tar.unlink()
    elif damage == "short tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "no index":
        (tmp_path / "x.index.npy").unlink()
    else:
        name = "y"
    assert finished_shard(tmp_path, name) is None


def test_an_interrupted_shard_leaves_nothing_and_can_be_made_again(tmp_path):
    def breaking():
        yield from latent_samples(0, (3, 2), 2, 4)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(tmp_path, "x", breaking())
    assert list(tmp_path.iterdir()) == []
    entry = write_shard(tmp_path, "x", latent_samples(0, (3, 2), 2, 4))
    assert finished_shard(tmp_path, "x") == entry


def test_samples_are_written_while_they_are_made(tmp_path):
    # a shard may be larger than memory, and its moments are complete only when its last sample is
    moments, sizes = Moments(4), []

    def lazily():
        for sample in latent_samples(0, (5000, 5000, 5000), 2, 4):
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            moments.add(np.load(io.BytesIO(sample.members["latents.npy"])))
            yield sample

    entry = write_shard(tmp_path, "x", lazily(), moments)
    assert sizes[1] > 60_000
    assert sizes[2] > sizes[1] + 60_000
    assert entry.statistics == moments.as_json()
    assert entry.statistics["count"] == 30_000


class Bomb:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_pickled_arrays_are_refused_and_never_loaded(tmp_path):
    target = tmp_path / "exploded"
    bomb = npy(np.array([Bomb(target)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"latents\.npy"):
        write_shard(tmp_path / "shards", "x", [sample_of(bomb)])
    assert list((tmp_path / "shards").iterdir()) == []
    tar = tar_with(tmp_path / "y.tar", [("0.json", b"{}"), ("0.latents.npy", bomb)])
    with pytest.raises(UserError, match=r"latents\.npy"):
        index_tar(tar)
    assert [sample.members["latents.npy"] for sample in read_samples(tar)] == [bomb]  # bytes, as they are
    bare = tar_with(tmp_path / "z.tar", [("0.json", b"{}"), ("0.latents.npy", pickle.dumps(Bomb(target)))])
    with pytest.raises(UserError, match=r"latents\.npy"):
        index_tar(bare)
    assert not target.exists()


GOOD = np.ones((3, 2, 4), dtype=np.float16)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(npy(np.asfortranarray(np.arange(24, dtype=np.float16).reshape(3, 2, 4))), id="fortran"),
        pytest.param(npy(GOOD.astype(np.float32)), id="float32"),
        pytest.param(npy(GOOD.astype(">f2")), id="big endian"),
        pytest.param(npy(GOOD[0]), id="two axes"),
        pytest.param(npy(np.ones((), np.float16)), id="no axis"),
        pytest.param(npy(np.zeros(3, dtype=[("a", "<f2")])), id="structured"),
        pytest.param(b"", id="empty"),
        pytest.param(b"PK\x03\x04 not an array at all", id="no array"),
        pytest.param(npy(GOOD)[:40], id="cut in the header"),
        pytest.param(npy(GOOD)[:-2], id="cut in the data"),
        pytest.param(npy(GOOD) + b"\0\0", id="more than its shape says"),
    ],
)
def test_latents_of_another_form_are_refused(tmp_path, data):
    with pytest.raises(UserError, match=r"latents\.npy"):
        write_shard(tmp_path, "x", [sample_of(data)])
    assert list(tmp_path.iterdir()) == []


def test_encode_array_writes_what_the_format_asks_for():
    for array in (np.asfortranarray(np.arange(24, dtype=np.float16).reshape(3, 2, 4)), np.arange(9)[::-2]):
        again = np.load(io.BytesIO(encode_array(array)), allow_pickle=False)
        assert again.flags.c_contiguous
        assert np.array_equal(again, array)
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        encode_array(np.array([{}], dtype=object))


def test_a_sample_without_description_has_no_label(tmp_path):
    tar = tar_with(tmp_path / "x.tar", [("0.latents.npy", npy(GOOD))])
    assert index_tar(tar)["label"].tolist() == [-1]


def test_members_of_other_programs_are_passed_over(tmp_path):
    tar = tar_with(
        tmp_path / "x.tar",
        [("7.json", b'{"class": 2}'), ("7.latents.npy", npy(GOOD)), ("7.embedding.npy", npy(GOOD)), ("7.txt", b"hi")],
    )
    rows = index_tar(tar)
    assert len(rows) == 1
    assert (rows[0]["sample"], rows[0]["frames"], rows[0]["label"]) == (0, 3, 2)
    assert set(next(read_samples(tar)).members) == {"latents.npy", "embedding.npy", "txt"}


def test_mirrored_latents_and_text_features_are_found(tmp_path):
    text = np.arange(10, dtype=np.float16).reshape(5, 2)
    members = {"latents.npy": npy(GOOD), "flipped.npy": npy(2 * GOOD), "text.npy": npy(text)}
    entry = write_shard(tmp_path, "x", [Sample("0", {}, members)])
    assert (entry.samples, entry.frames) == (1, 3)
    content = (tmp_path / "x.tar").read_bytes()
    rows = {row["member"]: row for row in index_tar(tmp_path / "x.tar")}
    for member, array in ((0, GOOD), (1, 2 * GOOD), (2, text)):
        row = rows[member]
        assert row["frames"] == len(array)
        assert content[row["offset"] : row["offset"] + row["bytes"]] == array.tobytes()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.json", b"{}")], "neither latents nor pictures"),
        ([("0.json", b"{}"), ("0.text.npy", npy(GOOD[0]))], "neither latents nor pictures"),
        ([("0.json", b"{"), ("0.latents.npy", npy(GOOD))], "not JSON"),
        ([("0.json", b"[" * 100_000), ("0.latents.npy", npy(GOOD))], "not JSON"),
        ([("0.json", b"[]"), ("0.latents.npy", npy(GOOD))], "not the description"),
        ([("0.json", b'{"class": "x"}'), ("0.latents.npy", npy(GOOD))], "not the description"),
        ([("0.latents.npy", npy(GOOD)), ("0.latents.npy", npy(GOOD))], "two members of one name"),
        ([("0.latents.npy", npy(GOOD)), ("1.latents.npy", npy(GOOD)), ("0.json", b"{}")], "not together"),
        ([("../0.latents.npy", npy(GOOD))], "is not KEY.EXTENSION"),
        ([("/etc/0.latents.npy", npy(GOOD))], "is not KEY.EXTENSION"),
        ([("0.latents.npy", npy(GOOD)), ("1" * 200 + ".json", b"{}")], "is not KEY.EXTENSION"),
    ],
)
def test_what_a_shard_may_not_hold_is_named_with_its_place(tmp_path, members, reason):
    tar = tar_with(tmp_path / "x.tar", members)
    with pytest.raises(ShardError, match=reason) as caught:
        index_tar(tar)
    assert caught.value.path == str(tar)
    assert 0 <= caught.value.offset < tar.stat().st_size


def test_the_manifest_survives_a_round_trip(tmp_path):
    written = write_latents(tmp_path)
    for path in (tmp_path, tmp_path / "manifest.json"):
        assert read_manifest(path) == written
    assert isinstance(written, Manifest)
    assert written.classes == list(CLASSES)
    assert written.num_frames == sum(map(sum, LENGTHS))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "manifest.json")):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 2}',
        '{"format": 2, "kind": "latents", "classes": [], "shards": [{"file": "x.tar"}]}',
        '{"format": 2, "kind": "latents", "classes": [], "shards": 3}',
    ],
)
def test_a_malformed_manifest_is_named(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_is_refused(tmp_path, version):
    write_manifest(tmp_path, "latents", [], [], {})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))
    with pytest.raises(UserError, match=f"{path}: format {version}"):
        read_manifest(tmp_path)


def sparse_tar(path, size):
    """A tar whose first sample claims, and on disk pretends, to be of that size."""
    tar_with(path, [("0.json", b"{}"), ("0.latents.npy", npy(GOOD))])
    content = bytearray(path.read_bytes())
    header = content.index(b"0.latents.npy")
    content[header + 124 : header + 136] = b"%011o\0" % size
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    path.write_bytes(content[: header + 512 + 200])
    os.truncate(path, header + 512 + -(-size // 512) * 512 + 1024)
    return path


def test_enormous_members_take_no_memory(tmp_path):
    tar = sparse_tar(tmp_path / "x.tar", 3 << 30)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"0\.latents\.npy has 3221225344 bytes of data for float16 \(3, 2, 4\)"):
        index_tar(tar)
    with pytest.raises(UserError, match=r"has 3221225472 bytes, more than the 1073741824 that are read at once"):
        list(read_samples(tar))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_checksums_of_members_larger_than_a_chunk(tmp_path, monkeypatch):
    data = npy(np.arange(3000, dtype=np.float16).reshape(5, 20, 30))
    tar = tar_with(tmp_path / "x.tar", [("0.json", b"{}"), ("0.latents.npy", data)])
    whole = index_tar(tar)
    assert whole["crc32"][0] == zlib.crc32(data[128:])
    monkeypatch.setattr(shards, "CHUNK", 1000)
    assert np.array_equal(index_tar(tar), whole)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is empty"),
        (b'{"format": 2,\n "shards": [{"fi', "it is not JSON: cut short at line 2, column 14"),
        (b'{"format": 2,\n "shar\x00s": []}', "it is not JSON: damaged at line 2, column 7"),
        (b"[]", "it is not an object with a list of shards"),
        (b'{"format": 2}', "it has no 'shards'"),
        (b'{"format": 2, "shards": [{"x": 1}]}', "it is not an object with a list of shards"),
        (b"\xff", "it is not UTF-8 text"),
        (b"[" * 100_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_manifest_is_said_in_words(tmp_path, text, reason):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'manifest.json'}: not a manifest of shards ({reason})"
