"""verify: a whole data set has no problems, and each kind of damage is named with file, place and sample."""

import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mutations.sets import CHANNELS, change, describe, members_of, sealed

from ardiff.data.shards import (
    Moments,
    Sample,
    encode_array,
    index_tar,
    read_manifest,
    read_samples,
    write_manifest,
    write_shard,
)
from ardiff.errors import UserError
from ardiff.files import write_json
from data_tools.inspection import shard_checks, shard_repair, shard_workers
from data_tools.inspection.sample_checks import check_sample
from data_tools.inspection.shard_checks import check_shard, read_group, read_groups, rows_of, same_sums
from data_tools.inspection.shard_folders import Problem, Rules, ShardJob, locate, open_parts, printable
from data_tools.inspection.shard_workers import BytesDone, for_each_shard
from data_tools.inspection.verification import repeated, verify


def lines(source, **options) -> list[str]:
    return [str(problem) for problem in verify(str(source), **options).problems]


def test_whole_sets_have_no_problems(latents, frames):
    shutil.copytree(latents, latents / "test")  # no sources in common
    for tar in (latents / "test").glob("*.tar"):
        sealed(tar, [(name, data.replace(b'"sha256": "0', b'"sha256": "1')) for name, data in members_of(tar)])
    for source, videos, num_frames, parts in ((latents, 6, 12, 2), (frames, 3, 6, 1)):
        for options in ({}, {"fast": True}, {"workers": 2}):
            result = verify(str(source), **options)
            assert result.problems == []
            assert (result.videos, result.frames, len(result.parts)) == (videos, num_frames, parts)


@pytest.mark.parametrize("kind", ["latents", "frames"])
def test_reading_a_shard_reports_progress_from_its_first_byte_on(request, monkeypatch, kind):
    folder = request.getfixturevalue(kind)
    for module in (shard_checks, shard_repair, shard_workers):
        monkeypatch.setattr(module, "REPORT_EVERY", 256)
    manifest = read_manifest(folder)
    job = ShardJob(folder, manifest.shards[0], Rules.of(manifest))
    for function, item in ((check_shard, job), (shard_repair.examine, (job, False))):
        reported: list = []
        function(item, reported.append)
        steps = [int(value) for value in reported if isinstance(value, BytesDone)]
        hashing = list(itertools.takewhile(lambda step: step == 128, steps))
        assert len(hashing) >= job.entry.bytes // 256  # the checksum alone is half of the work
        assert job.entry.bytes / 2 < sum(steps) <= job.entry.bytes


def test_recomputed_rows_are_those_of_the_indexer(latents, frames):
    for folder in (latents, frames):
        manifest = read_manifest(folder)
        for entry in manifest.shards:
            found = []
            with (folder / entry.file).open("rb") as stream:
                for number, group in enumerate(read_groups(stream, folder / entry.file)):
                    members = read_group(stream, group, folder / entry.file)
                    checked = check_sample(group[0].key, members, Rules.of(manifest))
                    found.append(rows_of(number, group, members, checked))
            assert np.array_equal(np.concatenate(found), index_tar(folder / entry.file))


def rewrite(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def add_to_squares(entry: dict, details: dict) -> None:
    entry["statistics"]["squares"][1] *= 1 + 1e-6
    details["std"][1] *= 1.1


DAMAGE = {
    "flipped bit in latents": (
        lambda folder: change(folder / "latents-000000.tar", data_of(folder, 1, 0) + 3),
        ["latents-000000.tar: its sha256 is not", "sample 000001: not what the index says (crc32)"],
    ),
    "flipped bit in a header": (
        lambda folder: change(folder / "latents-000000.tar", 4096),
        ["latents-000000.tar: its sha256 is not", "latents-000000.tar, byte 4096: the header's checksum is wrong"],
    ),
    "cut off": (
        lambda folder: os.truncate(folder / "latents-000000.tar", 3000),
        [
            "latents-000000.tar: has 3000 bytes where the manifest says",
            "sample 000000: there is no latents.npy",
            "sample 000000: there is no text.npy",
            "byte 2560: 000000.latents.npy has 176 bytes, more than the file",
        ],
    ),
    "no tar": (lambda folder: (folder / "latents-000001.tar").unlink(), ["latents-000001.tar: missing"]),
    "no index": (
        lambda folder: (folder / "latents-000001.index.npy").unlink(),
        ["latents-000001.index.npy: cannot be read (No such file or directory)"],
    ),
    "index of another shard": (
        lambda folder: shutil.copy(folder / "latents-000000.index.npy", folder / "latents-000001.index.npy"),
        [
            "latents-000001.index.npy: its sha256 is not",
            "cannot be the index of latents-000001.tar: it does not list samples 0 to 0",
            "byte 640, sample 000002: not what the index says (bytes, frames, label, crc32)",
            "the index has 2 samples, the tar 1",
        ],
    ),
    "marker of another shard": (
        lambda folder: shutil.copy(folder / "latents-000000.done.json", folder / "latents-000001.done.json"),
        ["latents-000001.done.json: does not say what the manifest says"],
    ),
    "broken marker": (
        lambda folder: (folder / "latents-000000.done.json").write_text("{"),
        ["latents-000000.done.json: is damaged"],
    ),
    "broken manifest": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        ["manifest.json: not a manifest of shards"],
    ),
    "absurd manifest": (
        lambda folder: rewrite(folder / "manifest.json", lambda value: value.update(tokens=0)),
        ["manifest.json: tokens must be a whole number above 0"],
    ),
    "wrong mean": (
        lambda folder: rewrite(folder / "manifest.json", lambda value: value["mean"].__setitem__(2, 0.5)),
        ["manifest.json: its mean does not follow from its shards in channels 2"],
    ),
    "wrong sums": (
        lambda folder: [
            rewrite(folder / "manifest.json", lambda value: add_to_squares(value["shards"][0], value)),
            rewrite(folder / "latents-000000.done.json", lambda value: add_to_squares(value, {"std": [0] * 4})),
        ],
        ["latents-000000.tar: the statistics in the manifest are not those of its latents", "its std does not follow"],
    ),
    "wrong length of text": (
        lambda folder: rewrite(folder / "manifest.json", lambda value: value.update(text_tokens=7)),
        ["manifest.json: its text_tokens is 7, the longest text has 2"],
    ),
    "leftovers": (
        lambda folder: [(folder / name).touch() for name in (".x.tar.tmp.host.7", "y.tar", "z.done.json", "README")],
        [".x.tar.tmp.host.7: a temporary file", "y.tar: a shard that the manifest does not", "z.done.json: a note of"],
    ),
}


def data_of(folder: Path, sample: int, member: int) -> int:
    rows = np.load(folder / "latents-000000.index.npy")
    return int(rows["offset"][(rows["sample"] == sample) & (rows["member"] == member)][0])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_place(latents, damage):
    hurt, expected = DAMAGE[damage]
    hurt(latents)
    found = lines(latents)
    for part in expected:
        assert any(part in line for line in found), found
    assert all(line.startswith(str(latents)) for line in found)
    if damage not in ("index of another shard", "leftovers"):
        assert len(found) == len(expected), found
    assert lines(latents, workers=2) == found


def write_split(folder: Path, videos, source=lambda video: video, **details) -> None:
    """A data set of one shard per video list, small."""
    shards = []
    for number, part in enumerate(videos):
        moments, samples = Moments(CHANNELS), []
        for video in part:
            array = np.random.default_rng(video).normal(size=(2, 2, CHANNELS)).astype(np.float16)
            moments.add(array)
            info = {**describe(video, 2), "sha256": f"{source(video):064x}"}
            samples.append(Sample(f"{video:06d}", info, {"latents.npy": encode_array(array)}))
        shards.append(write_shard(folder, f"latents-{number:06d}", samples, moments))
    mean, std = Moments.merge(shard.statistics for shard in shards)
    common = {"tokens": 2, "channels": CHANNELS, "mean": mean, "std": std, "arvae": {"id": "0" * 16, "path": "x"}}
    write_manifest(folder, "latents", shards, ["run", "sit", "wave"], {**common, **details})


def test_a_key_may_occur_only_once(tmp_path):
    write_split(tmp_path, [[0, 1], [2], [4, 1]])
    found = lines(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{tmp_path}/latents-000002.tar, sample 000001: the key is used in ")
    assert lines(tmp_path / "latents-00000{0,1}.tar") == []  # some of its shards


def test_a_video_may_not_lie_in_two_splits(tmp_path):
    write_split(tmp_path, [[0, 1], [2, 4]], source=lambda video: video // 2)  # scenes of one video are no leak
    write_split(tmp_path / "validation", [[5, 6]], source=lambda video: video // 2)
    write_split(tmp_path / "test", [[7, 8]], source=lambda video: video // 2)
    found = lines(tmp_path)
    assert [line.removeprefix(f"{tmp_path}/") for line in found] == [
        f"validation/latents-000000.tar, sample 000005: its source video is also in the train split (sample 000004 of "
        f"{tmp_path}/latents-000001.tar)",
        f"test/latents-000000.tar, sample 000007: its source video is also in the validation split (sample 000006 of "
        f"{tmp_path}/validation/latents-000000.tar)",
    ]


def test_splits_must_fit_each_other(tmp_path):
    write_split(tmp_path, [[0]])
    write_split(tmp_path / "validation", [[1]], stride=2, arvae={"id": "another", "path": "x"})
    found = lines(tmp_path)
    assert any("not the same as in" in line and "stride, AR-VAE" in line for line in found), found
    (tmp_path / "validation" / "manifest.json").unlink()
    assert any(line.startswith(f"{tmp_path}/validation/manifest.json: not found") for line in lines(tmp_path))


def test_what_has_another_checksum_is_not_sound(latents):
    change(latents / "latents-000000.tar", data_of(latents, 1, 0))
    result = verify(str(latents))
    assert (result.videos, result.frames) == (2, 5)
    assert [problem.key for problem in result.problems] == [None, "000001"]


def test_fast_looks_at_files_and_indexes_only(latents):
    change(latents / "latents-000000.tar", data_of(latents, 0, 0))
    assert lines(latents, fast=True) == []
    rows = np.load(latents / "latents-000001.index.npy")
    rows["offset"][0] = 10**9
    np.save(latents / "latents-000001.index.npy", rows)
    found = lines(latents, fast=True)
    assert len(found) == 2
    assert "row 0 is impossible" in found[1]


def test_statistics_are_compared_up_to_the_order_of_addition():
    values = np.random.default_rng(0).normal(0, 1, (20_000, 2, 4)).astype(np.float16)
    one, other = Moments(4), Moments(4)
    one.add(values)
    for part in np.split(values[::-1], 100):
        other.add(part)
    assert one.as_json() != other.as_json()
    assert same_sums(one.as_json(), other.as_json())
    changed = values.copy()
    changed[7, 1, 2] += 1
    other = Moments(4)
    other.add(changed)
    assert not same_sums(one.as_json(), other.as_json())


def test_equal_texts_are_found_among_many():
    rng = np.random.default_rng(0)
    groups = [[str(number) for number in rng.integers(0, 2000, size)] for size in (300, 0, 500, 200)]
    groups[2][7] = groups[0][9] = ""
    expected = {}
    for group, texts in enumerate(groups):
        for position, text in enumerate(texts):
            expected.setdefault(text, []).append((group, position))
    expected = [places for text, places in expected.items() if text and len(places) > 1]
    assert sorted(repeated(groups)) == sorted(expected)
    assert list(repeated([])) == list(repeated([["a"], ["b"]])) == []


def misbehave(item: str, report) -> None:
    report(BytesDone(5))
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":
        time.sleep(1000)
    report(item.upper())


def test_a_shard_that_crashes_or_hangs_its_reader_costs_itself_only():
    outcomes = for_each_shard(misbehave, ["a", "crash", "hang", "b"], [10] * 4, workers=2, timeout=2, title="x")
    found = {outcome.item: (outcome.value, outcome.failure) for outcome in outcomes}
    assert found == {
        0: ("A", None),
        1: (None, "its process died (signal SIGSEGV)"),
        2: (None, "no answer within 2 s"),
        3: ("B", None),
    }


def test_such_a_shard_is_a_problem(latents, monkeypatch):
    monkeypatch.setattr("data_tools.inspection.verification.check_shard", check_that_dies)
    found = lines(latents, workers=1)
    assert found[0] == f"{latents}/latents-000000.tar: could not be checked: its process died (signal SIGKILL)"


def check_that_dies(job: ShardJob, report) -> None:
    if job.entry.file == "latents-000000.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    from data_tools.inspection.shard_checks import check_shard

    check_shard(job, report)


def test_what_is_named_is_one_printable_line(latents):
    problem = Problem("a\nb.tar", "caption \x1b[31m \ud800 é", 7, "0")
    assert str(problem) == "a\\nb.tar, byte 7, sample 0: caption \\x1b[31m \\ud800 é"
    assert printable("日本") == "日本"


def test_sources(latents, tmp_path):
    assert [place.name for place in locate(str(latents))] == [""]
    assert len(open_parts(f"{latents}/latents-*.tar")[0].chosen) == 2
    assert len(open_parts(f"{latents}/manifest.json")) == 1
    shutil.copytree(latents, latents / "validation")
    assert [part.name for part in open_parts(str(latents))] == ["", "validation"]
    assert [part.name for part in open_parts(f"{latents}/latents-000000.tar")] == [""]
    for source, reason in (
        ("nothing", "no such folder, manifest or tar files"),
        (f"{latents}/x-{{0..1.tar", "its braces do not match"),
        (f"{latents}/x-*.tar", "no file matches"),
        (f"{latents}/x.tar", "not among the 2 shards"),
        (f"{{{latents},{tmp_path}}}/x.tar", "one folder at a time"),
        (tmp_path, "manifest.json: not found"),
    ):
        with pytest.raises(UserError, match=reason):
            open_parts(str(source))
        with pytest.raises(UserError, match=reason):
            verify(str(tmp_path / "none") if source == "nothing" else str(source))


def test_the_marker_may_be_missing_and_entries_of_it_compared(latents):
    (latents / "latents-000000.done.json").unlink()  # training needs none
    assert lines(latents) == []
    entry = read_manifest(latents).shards[1]
    write_json(latents / "latents-000001.done.json", {**asdict(entry), "samples": 2})
    assert len(lines(latents)) == 1


def test_reading_changes_nothing(latents):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in latents.iterdir()}
    verify(str(latents))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in latents.iterdir()} == before
    assert [sample.key for sample in read_samples(latents / "latents-000000.tar")] == ["000000", "000001"]
