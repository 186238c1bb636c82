"""shard_videos: what lies in the shards, and that runs which are killed or repeated give the same bytes."""

import io
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import contents, entry, make_corpus, make_video, run_sabotaged, samples_in
from PIL import Image

from ardiff.data.corpus import SPLITS, read_corpus, write_corpus
from ardiff.data.shards import read_manifest
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.video import decode, resize_and_crop
from data_tools.common import split_folder
from data_tools.shard_videos import main
from data_tools.sharding.frame_shards import make_samples
from data_tools.sharding.pictures import FrameSettings
from data_tools.sharding.sampling import Rate, Source

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    settings = ["--size", "32", "--format", "png", "--shard_mb", "0.06", "--workers", "1"]
    return ["--corpus", str(corpus), "--out", str(out), *settings, *more]


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    assert main(arguments(corpus, out, "--stride", "2", "--workers", "2")) == 0
    return out


def pictures(sample) -> np.ndarray:
    files = [sample.members[name] for name in sorted(sample.members)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def test_every_frame_of_every_video_is_there_and_in_its_split(corpus, shards):
    entries = read_corpus(corpus)
    for split in SPLITS:
        samples = {sample.key: sample for sample in samples_in(split_folder(shards, split))}
        expected = [entry for entry in entries if entry.split == split]
        assert sorted(samples) == [entry.id for entry in expected]
        for video in expected:
            frames = decode(Path(video.path), video.first_frame, video.num_frames, 2)
            expected_pictures = np.stack([resize_and_crop(frame, 32) for frame in frames])
            assert np.array_equal(pictures(samples[video.id]), expected_pictures)
            assert list(samples[video.id].members) == [f"{i:05d}.png" for i in range(len(expected_pictures))]


def test_descriptions(corpus, shards):
    infos = {sample.key: sample.info for sample in samples_in(shards)}
    scene = read_corpus(corpus)[10]
    assert infos[scene.id] == {
        "id": scene.id,
        "path": scene.path,
        "sha256": scene.sha256,
        "fps": "8/1",
        "stride": 2,
        "first_frame": 11,
        "num_frames": 3,
        "width": 48,
        "height": 40,
        "label": None,
        "class": None,
        "caption": "scene from 11",
    }
    assert read_manifest(shards).classes == ["jump", "run", "walk"]
    assert (infos["000000"]["label"], infos["000000"]["class"]) == ("walk", 2)


def test_manifest_and_index(corpus, shards):
    for split in SPLITS:
        folder = split_folder(shards, split)
        manifest = read_manifest(folder)
        assert manifest.kind == "frames"
        assert manifest.details == {
            "size": 32,
            "stride": 2,
            "sampled_fps": None,
            "picture_format": "png",
            "quality": 95,
            "fps": "4/1",
            "split": split,
            "corpus_sha256": sha256(corpus),
        }
        samples = samples_in(folder)
        for shard in manifest.shards:
            assert sha256(folder / shard.file) == shard.sha256
            assert 0.2 * 60_000 < shard.bytes < 1.3 * 60_000 or split != "train"
            index = np.load(folder / shard.file.replace(".tar", ".index.npy"))
            data = (folder / shard.file).read_bytes()
            found = [data[row["offset"] : row["offset"] + row["bytes"]] for row in index]
            assert found == [file for _ in range(shard.samples) for _, file in sorted(next(samples).members.items())]
    train = read_manifest(shards)
    assert len(train.shards) > 2
    assert train.num_frames == sum(-(-e.num_frames // 2) for e in read_corpus(corpus) if e.split == "train")


def test_scenes_of_a_video_lie_together(shards):
    order = [sample.key for sample in samples_in(shards)]
    first = order.index("000009")
    assert order[first : first + 3] == ["000009", "000010", "000011"]


def test_frames_at_a_chosen_rate(corpus, tmp_path, capsys):
    entries = read_corpus(corpus)
    entries[0] = replace(entries[0], fps="2/1")
    write_corpus(tmp_path / "c.jsonl", entries)
    assert main(arguments(tmp_path / "c.jsonl", tmp_path / "out", "--fps", "3")) == 1
    captured = capsys.readouterr()
    assert f"skipped {entries[0].path}: has 2/1 frames per second, fewer than --fps 3" in captured.err
    details = read_manifest(tmp_path / "out").details
    assert (details["fps"], details["sampled_fps"], details["stride"]) == ("3/1", "3/1", 1)
    samples = {sample.key: sample for sample in samples_in(tmp_path / "out")}
    assert "000000" not in samples
    scene = samples["000011"]
    assert (scene.info["sampled_fps"], scene.info["fps"], scene.info["num_frames"]) == ("3/1", "8/1", 5)
    frames = [resize_and_crop(frame, 32) for frame in decode(Path(entries[11].path))]
    assert np.array_equal(pictures(scene), np.stack([frames[18 + i] for i in (0, 3, 5, 8, 11)]))


@pytest.mark.parametrize(("picture_format", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats(corpus, picture_format, kind):
    video = read_corpus(corpus)[0]
    source = Source(video.path, video.sha256, (video,))

    def sizes(quality: int) -> list[int]:
        settings = FrameSettings(40, Rate(2), picture_format, quality)
        (sample,) = make_samples(source, settings, {"walk": 0})
        picture = Image.open(io.BytesIO(sample.members[f"00001.{picture_format}"]))
        original = resize_and_crop(list(decode(Path(video.path)))[2], 40).astype(int)
        assert picture.format == kind
        assert np.abs(np.asarray(picture) - original).mean() < (30 if quality < 50 else 6)
        return [len(data) for data in sample.members.values()]

    assert sum(sizes(20)) < 0.8 * sum(sizes(95))


def test_a_second_run_writes_nothing_and_says_the_same(corpus, shards, capsys):
    main(arguments(corpus, shards, "--stride", "2"))
    said = capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    kept = contents(shards)
    assert main(arguments(corpus, shards, "--stride", "2")) == 0
    assert capsys.readouterr() == said
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")} == before
    assert contents(shards) == kept


@pytest.mark.launcher
def test_killed_runs_complete_to_the_same_bytes(corpus, shards, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools.shard_videos", *arguments(corpus, out, "--stride", "2")]
    for wanted in (1, 3):  # killed with that many shards complete
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while len(list(out.glob("*.done.json"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()
    # had it been killed while writing
    (out / f".frames-000004.tar.tmp.{platform.node()}.999999999").write_bytes(b"half")
    kept = min(out.glob("*.tar"))
    before = kept.stat().st_mtime_ns
    assert main(arguments(corpus, out, "--stride", "2")) == 0
    assert contents(out) == contents(shards)
    assert kept.stat().st_mtime_ns == before


def test_changed_and_missing_videos_are_skipped_and_named(corpus, shards, tmp_path, capsys):
    shutil.copytree(corpus.parent, tmp_path / "videos")
    entries = [
        replace(entry, path=entry.path.replace(str(corpus.parent), str(tmp_path / "videos")))
        for entry in read_corpus(corpus)
    ]
    write_corpus(tmp_path / "c.jsonl", entries)
    run = arguments(tmp_path / "c.jsonl", tmp_path / "out", "--stride", "2")
    changed, missing = Path(entries[1].path), Path(entries[9].path)  # the second one has three scenes
    original = changed.read_bytes()
    changed.write_bytes(original[:-1] + b"?")
    missing.rename(tmp_path / "elsewhere.mp4")
    assert main(run) == 1
    output = capsys.readouterr()
    assert f"skipped {changed}: has changed since it was scanned" in output.err
    assert f"skipped {missing}: cannot be read (No such file or directory)" in output.err
    assert output.err.endswith("2 files skipped\n")
    assert sum(shard.samples for shard in read_manifest(tmp_path / "out").shards) == 5

    changed.write_bytes(original)
    (tmp_path / "elsewhere.mp4").rename(missing)
    assert main(run) == 0
    found, expected = ({s.key: s.members for s in samples_in(folder)} for folder in (tmp_path / "out", shards))
    assert found == expected


@pytest.mark.launcher
def test_a_crashing_and_a_hanging_decoder_cost_one_video_each(tmp_path):
    names = ("good", "crash", "fine", "hang")
    entries = [
        entry(number, make_video(tmp_path / f"{name}.mp4", 6, number), 6, label=None)
        for number, name in enumerate(names)
    ]
    write_corpus(tmp_path / "c.jsonl", entries)
    run = arguments(tmp_path / "c.jsonl", tmp_path / "out", "--timeout", "5", "--shard_mb", "1")
    done = run_sabotaged(tmp_path, "data_tools.shard_videos", run)
    assert done.returncode == 1
    assert f"skipped {tmp_path}/crash.mp4: cannot be decoded (its process died (signal SIGSEGV))" in done.stderr
    assert f"skipped {tmp_path}/hang.mp4: cannot be decoded (no answer within 5 s)" in done.stderr
    assert [sample.key for sample in samples_in(tmp_path / "out")] == ["000000", "000002"]
    assert len(read_manifest(tmp_path / "out").shards) == 1


def test_shards_of_other_settings_are_not_mixed(corpus, shards, tmp_path):
    before = contents(shards)
    with pytest.raises(UserError, match=r"holds the results of other settings \(size 32 -> 64\).*another --out"):
        main(arguments(corpus, shards, "--stride", "2", "--size", "64"))
    with pytest.raises(UserError, match=r"sampled_fps None -> 4/1, stride 2 -> 1"):
        main(arguments(corpus, shards, "--fps", "4"))
    write_corpus(tmp_path / "c.jsonl", read_corpus(corpus)[:-1])
    with pytest.raises(UserError, match="corpus_sha256"):
        main(arguments(tmp_path / "c.jsonl", shards, "--stride", "2"))
    assert contents(shards) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latents-000000.tar").touch()
    with pytest.raises(UserError, match="holds files of something else"):
        main(arguments(corpus, tmp_path / "other"))


def test_the_estimate_of_the_first_run_is_kept(corpus, shards, tmp_path, monkeypatch):
    """Otherwise a video that has gone since would change which video lies in which shard."""
    settings = json.loads((shards / "settings.json").read_text())
    assert 500 < settings["derived"]["picture_bytes"] < 4000
    monkeypatch.setattr("data_tools.shard_videos.picture_bytes", lambda *_: pytest.fail("estimated again"))
    assert main(arguments(corpus, shards, "--stride", "2")) == 0


def test_mistakes_are_one_line_and_exit_code_2(corpus, tmp_path):
    write_corpus(tmp_path / "v.jsonl", [replace(entry, split="validation") for entry in read_corpus(corpus)])
    given = ["--corpus", corpus, "--out", tmp_path / "out"]
    mistakes = {
        "missing.jsonl: not found": ["--corpus", tmp_path / "missing.jsonl", "--out", tmp_path / "out"],
        "none is left to train on": ["--corpus", tmp_path / "v.jsonl", "--out", tmp_path / "out"],
        "--size 0: must be between 8 and 4096": [*given, "--size", "0"],
        "--shard_mb nan: must be between": [*given, "--shard_mb", "nan"],
        "--fps 0: must be a number": [*given, "--fps", "0"],
        "none of its videos can be used": [*given, "--fps", "9"],
        "cannot make this folder": ["--corpus", corpus, "--out", tmp_path / "v.jsonl"],
    }
    for expected, options in mistakes.items():
        with pytest.raises(UserError, match=expected):
            main([str(option) for option in options])
    command = [sys.executable, "-m", "data_tools.shard_videos", *map(str, mistakes["missing.jsonl: not found"])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
