"""repair: what is good is kept to the byte, what is not is named, the original is only read, a killed run completes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import contents
from data_helpers import write_latents
from mutations.sets import change, reseal, samples_of, write_frame_set, write_latent_set
from mutations.target import BLOCK, header, make_tar

from ardiff.data.shards import read_manifest
from ardiff.errors import UserError
from data_tools.inspection.repair import repair
from data_tools.inspection.verification import verify

REPOSITORY = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "settings.json"}


@pytest.fixture(params=["latents", "frames"])
def folder(request, tmp_path) -> Path:
    """Two shards, with samples 0 and 1 in the first and 2 in the second."""
    (write_latent_set if request.param == "latents" else write_frame_set)(tmp_path / "data")
    return tmp_path / "data"


def first_tar(folder: Path) -> Path:
    return min(folder.glob("*.tar"))


def member_at(tar: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(tar) as archive:
        return next(member for member in archive if member.name.startswith(name))


def repaired(folder: Path, **options):
    """Repair into a new folder, in which nothing is wrong; the original stays as it is."""
    out = folder.parent / "repaired"
    before = contents(folder)
    results = repair(str(folder), out, **options)
    assert contents(folder) == before
    if (out / MANIFEST).exists():
        assert verify(str(out)).problems == []
    return out, results


@pytest.mark.parametrize("copy", [False, True])
def test_a_whole_set_comes_out_as_it_is(folder, copy):
    out, (result,) = repaired(folder, copy=copy)
    assert (result.dropped, result.same, result.lost) == ([], 2, 0)
    assert shards_of(out) == contents(folder)
    for tar in folder.glob("*.tar"):
        assert (out / tar.name).samefile(tar) != copy


def test_every_header_bit_may_be_wrong(folder):
    """Names and sizes of members follow from the index: nothing is lost, and the shard is what it was."""
    tar, manifest = first_tar(folder), read_manifest(folder)
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        headers = [member.offset for member in archive]
    for place in headers:
        change(tar, place + random.Random(place).choice([0, 3, 7, 110, 124, 130, 135, 150, 156, 200, 345]), 4)
        out, (result,) = repaired(folder)
        assert (result.dropped, result.unchecked) == ([], [])
        assert read_manifest(out).shards == manifest.shards
        tar.write_bytes(whole)
        shutil.rmtree(out)


def test_damaged_content_costs_its_sample_only(folder):
    tar = first_tar(folder)
    name = "000001.latents" if (folder / "latents-000000.tar").exists() else "000001.00000"
    place = member_at(tar, name)
    change(tar, place.offset_data + place.size - 5)
    out, (result,) = repaired(folder)
    assert [(problem.key, problem.reason) for problem in result.dropped] == [
        ("000001", "not what its checksum in the index says")
    ]
    assert place.offset_data <= result.dropped[0].offset < place.offset_data + place.size
    original = samples_of(folder)
    assert samples_of(out) == {key: original[key] for key in ("000000", "000002")}
    assert result.lost == 1 and result.same == 1
    assert result.unchecked == [str(tar)]
    record = json.loads((out / f"{tar.stem}.dropped.json").read_text())
    assert record["dropped"][0]["key"] == "000001"
    assert record["sha256_found"] == hashlib.sha256(tar.read_bytes()).hexdigest()


def test_a_damaged_npy_header_is_made_anew(latents):
    tar = first_tar(latents)
    change(tar, member_at(tar, "000000.latents").offset_data + 20)
    out, (result,) = repaired(latents)
    assert result.dropped == []
    assert samples_of(out)["000000"]["latents.npy"] == samples_of(latents)["000000"]["latents.npy"].replace(
        samples_of(latents)["000000"]["latents.npy"][:128], samples_of(out)["000000"]["latents.npy"][:128]
    )
    assert read_manifest(out).shards == read_manifest(latents).shards  # bit for bit what it was


def test_a_damaged_description_costs_its_sample(folder):
    tar = first_tar(folder)
    change(tar, member_at(tar, "000000.json").offset_data)
    out, (result,) = repaired(folder)
    assert [problem.key for problem in result.dropped] == ["000000"]
    assert set(samples_of(out)) == {"000001", "000002"}


def test_another_class_in_a_description_does_not_pass(folder):
    tar = first_tar(folder)
    place = member_at(tar, "000000.json")
    with tarfile.open(tar) as archive:
        text = archive.extractfile(place).read()
    data = bytearray(tar.read_bytes())
    text = text.replace(b'"class": 0', b'"class": 2').replace(b'"label": "run"', b'"label":"wave"')
    data[place.offset_data : place.offset_data + place.size] = text.ljust(place.size)
    tar.write_bytes(bytes(data))
    _, (result,) = repaired(folder)
    assert [(problem.key, problem.reason) for problem in result.dropped] == [
        ("000000", "its class is not the one in the index")
    ]


def test_a_shard_that_was_cut_off_keeps_what_lies_before(folder):
    tar = first_tar(folder)
    os.truncate(tar, member_at(tar, "000001").offset + 700)
    out, (result,) = repaired(folder)
    assert set(samples_of(out)) == {"000000", "000002"}
    assert result.lost == 1


@pytest.mark.parametrize("damage", ["gone", "garbage", "bit", "of another shard"])
def test_an_index_is_made_anew(folder, damage):
    index = first_tar(folder).with_suffix(".index.npy")
    whole = contents(folder)
    if damage == "gone":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"garbage")
    elif damage == "bit":
        change(index, index.stat().st_size - 8)
    else:
        shutil.copy(max(folder.glob("*.index.npy")), index)
    out, (result,) = repaired(folder)
    assert result.dropped == []
    assert shards_of(out) == whole


def test_without_any_checksum_nothing_is_kept_unless_it_is_wanted(folder):
    tar = first_tar(folder)
    with tarfile.open(tar) as archive:
        json_of_0 = next(member for member in archive if member.name == "000000.json")
    change(tar, json_of_0.offset_data + json_of_0.size - 1, 0)
    change(tar, tar.stat().st_size - 1)  # harmless, but the sha256 is gone
    tar.with_suffix(".index.npy").unlink()
    out, (result,) = repaired(folder)
    assert "nothing tells good samples from bad" in result.dropped[0].reason
    assert set(samples_of(out)) == {"000002"}
    assert not (out / tar.name).exists()
    shutil.rmtree(out)
    out, (result,) = repaired(folder, keep_unchecked=True)
    assert samples_of(out) == samples_of(folder)
    assert "something follows the end mark" in result.dropped[0].reason


def test_of_a_damaged_index_the_rows_whose_checksums_fit_are_good(folder):
    tar = first_tar(folder)
    change(tar, tar.stat().st_size - 1)
    index = tar.with_suffix(".index.npy")
    rows = np.load(index)
    rows["offset"][0] += 1
    np.save(index, rows)
    out, (result,) = repaired(folder)
    assert set(samples_of(out)) == {"000001", "000002"}
    assert [problem.key for problem in result.dropped] == ["000000"]


def test_the_marker_is_a_second_witness(folder):
    path = folder / MANIFEST
    value = json.loads(path.read_text())
    whole = json.dumps(value)
    value["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(value))
    first_tar(folder).with_suffix(".index.npy").unlink()  # the tar is all there is
    out, (result,) = repaired(folder)
    assert result.dropped == []
    assert json.loads((out / MANIFEST).read_text()) == json.loads(whole)


def test_statistics_are_those_of_what_is_left(tmp_path):
    manifest = write_latents(tmp_path / "data")
    tar = tmp_path / "data" / manifest.shards[0].file
    change(tar, member_at(tar, "000002.latents").offset_data + 300)
    out, _ = repaired(tmp_path / "data")
    left = [np.frombuffer(members["latents.npy"][128:], "<f2") for members in samples_of(out).values()]
    values = np.concatenate(left).astype(np.float64).reshape(-1, 4)
    details = read_manifest(out).details
    np.testing.assert_allclose(details["mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(details["std"], values.std(0), rtol=1e-12)
    same = {name: value for name, value in details.items() if name not in ("mean", "std")}
    assert same == {name: value for name, value in manifest.details.items() if name not in ("mean", "std")}


def test_a_wrong_value_in_the_manifest_is_put_right(latents):
    path = latents / MANIFEST
    value = json.loads(path.read_text())
    whole = json.dumps(value)
    value["mean"][1] += 1
    value["shards"][0]["frames"] += 1
    value["text_tokens"] = 9
    path.write_text(json.dumps(value))
    out, (result,) = repaired(latents)
    assert result.dropped == []
    assert json.loads((out / MANIFEST).read_text()) == json.loads(whole)


def test_samples_that_are_bad_in_themselves(folder):
    tar = first_tar(folder)
    with tarfile.open(tar) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    tar.write_bytes(make_tar([(n, b"{" if n == "000001.json" else data) for n, data in members]))
    assert reseal(folder, keep_index=True)
    out, (result,) = repaired(folder)
    assert [(problem.key, problem.reason[:23]) for problem in result.dropped] == [("000001", "000001.json is not JSON")]
    assert set(samples_of(out)) == {"000000", "000002"}
    assert result.unchecked == []  # the tar's own checksum vouches for the rest


def test_second_samples_of_a_key_and_videos_of_two_splits_are_left_out(latents):
    shutil.copytree(latents, latents / "test")
    for file in (latents / "test").glob("*-000000.*"):  # the test split has video 2 only
        file.unlink()
    value = json.loads((latents / "test" / MANIFEST).read_text())
    value["shards"] = value["shards"][1:]
    (latents / "test" / MANIFEST).write_text(json.dumps(value))
    first, second = sorted(latents.glob("*.tar"))
    with tarfile.open(first) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(second) as archive:
        more = [(member.name, archive.extractfile(member).read()) for member in archive]
    second.write_bytes(make_tar([*more, *(member for member in members if member[0].startswith("000001"))]))
    assert reseal(latents, keep_index=False)
    out, results = repaired(latents)
    reasons = {problem.key: problem.reason for problem in results[0].dropped}
    assert reasons == {
        "000001": "the key is used in latents-000000.tar as well",
        "000002": "its source video is also in the test split",
    }
    assert results[1].dropped == []
    assert set(samples_of(out)) == {"000000", "000001"}
    assert set(samples_of(out / "test")) == {"000002"}


def test_nothing_is_left(folder):
    for tar in folder.glob("*.tar"):
        tar.unlink()
    out, (result,) = repaired(folder)
    assert (result.entries, len(result.dropped)) == ([], 2)
    assert not (out / MANIFEST).exists() and not list(out.glob("*.tar"))


def test_other_things_are_not_mixed_in(folder, tmp_path):
    for place in (folder, folder / "new", folder.parent):
        with pytest.raises(UserError, match="must lie apart"):
            repair(str(folder), place)
    repair(str(folder), tmp_path / "out")
    change(folder / MANIFEST, -3, 0)
    shutil.copytree(folder, tmp_path / "other")
    value = json.loads((tmp_path / "other" / MANIFEST).read_text())
    (tmp_path / "other" / MANIFEST).write_text(json.dumps({**value, "note": 1}))
    with pytest.raises(UserError, match="holds the results of other settings"):
        repair(str(tmp_path / "other"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.tar").touch()
    with pytest.raises(UserError, match="holds files of something else"):
        repair(str(folder), tmp_path / "mine")


def test_some_shards_only(latents, tmp_path):
    results = repair(f"{latents}/latents-000001.tar", tmp_path / "out")
    assert set(samples_of(tmp_path / "out")) == {"000002"}
    assert results[0].lost == 0
    assert verify(str(tmp_path / "out")).problems == []


def damaged_set(folder: Path, shards: int = 12) -> None:
    """Many shards, each third one damaged in its way."""
    write_latents(folder, [(40, 30, 20)] * shards, tokens=8, channels=16)
    write_latents(folder / "validation", [(5,)], tokens=8, channels=16)
    for number, tar in enumerate(sorted(folder.glob("*.tar"))):
        if number % 3 == 0:
            change(tar, member_at(tar, f"{3 * number:06d}.latents").offset_data + 1000)
        if number % 6 == 3:
            change(tar, 3 * BLOCK)
        if number == 7:
            tar.with_suffix(".index.npy").unlink()


def test_number_of_processes_and_restarts_do_not_matter(tmp_path):
    damaged_set(tmp_path / "data")
    results = repair(str(tmp_path / "data"), tmp_path / "one")
    assert len(results[0].dropped) == 4 and verify(str(tmp_path / "one")).problems == []
    repair(str(tmp_path / "data"), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.tar")}
    again = repair(str(tmp_path / "data"), tmp_path / "two")
    assert [result.dropped for result in again] == [result.dropped for result in results]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_shard_that_was_changed_since_is_written_again(latents, tmp_path):
    tar = first_tar(latents)
    whole = tar.read_bytes()
    change(tar, member_at(tar, "000001.latents").offset_data + 130)
    repair(str(latents), tmp_path / "out")
    assert set(samples_of(tmp_path / "out")) == {"000000", "000002"}
    tar.write_bytes(whole)  # a good copy was found
    result = repair(str(latents), tmp_path / "out")[0]
    assert result.dropped == [] and not list((tmp_path / "out").glob("*.dropped.json"))
    assert shards_of(tmp_path / "out") == contents(latents)


def test_more_damage_than_before(tmp_path):
    write_latents(tmp_path / "data", [(3, 2, 1)])
    tar = first_tar(tmp_path / "data")
    for key, left in (("000001", {"000000", "000002"}), ("000000", {"000002"})):
        change(tar, member_at(tar, f"{key}.latents").offset_data + 130)
        repair(str(tmp_path / "data"), tmp_path / "out")
        assert set(samples_of(tmp_path / "out")) == left
        assert verify(str(tmp_path / "out")).problems == []


def test_a_foreign_member_is_passed_over_by_means_of_the_index(folder):
    """A tar may be whole and yet hold a header that a shard may not have: what follows is not lost."""
    tar = first_tar(folder)
    place = member_at(tar, "000001").offset
    content = tar.read_bytes()
    tar.write_bytes(content[:place] + header(b"pax", b"%011o\0" % 0, b"x") + content[place:])
    index = tar.with_suffix(".index.npy")
    rows = np.load(index)
    rows["offset"][rows["sample"] == 1] += BLOCK
    np.save(index, rows)
    assert reseal(folder, keep_index=True)
    assert [problem.offset for problem in verify(str(folder)).problems] == [place]
    out, (result,) = repaired(folder)
    assert result.dropped == []
    assert set(samples_of(out)) == {"000000", "000001", "000002"}


@pytest.mark.slow
def test_a_killed_run_completes_to_the_same_bytes(tmp_path):
    damaged_set(tmp_path / "data", shards=18)
    repair(str(tmp_path / "data"), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    arguments = ["repair", str(tmp_path / "data"), "--out", str(out), "--workers", "1"]
    command = [sys.executable, "-m", "data_tools.inspect_shards", *arguments]
    chance, kills = random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        markers = len(list(out.glob("*.done.json")))
        while process.poll() is None and len(list(out.glob("*.done.json"))) <= markers + 3:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode == 1
    assert contents(out) == expected
