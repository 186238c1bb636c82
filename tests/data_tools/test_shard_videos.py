"""shard_videos: what lies in the shards, and that runs which are killed or repeated give the same bytes."""

import io
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
from PIL import Image

from ardiff.data.corpus import CorpusEntry, read_corpus, usable, write_corpus
from ardiff.data.shards import read_manifest, read_samples
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.video import decode, resize_and_crop
from data_tools import make_demo_corpus, scan_videos
from data_tools.shard_videos import FrameSettings, main, make_sample, plan_shards

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """24 videos of 12 frames, one of them unlabelled, one with a caption, four in the validation split."""
    folder = tmp_path_factory.mktemp("shard")
    make_demo_corpus.main(["--out", f"{folder}/videos", "--num_videos", "24", "--num_frames", "12", "--size", "48"])
    file = folder / "corpus.jsonl"
    scan_videos.main([f"{folder}/videos", "--out", str(file), "--workers", "1"])
    entries = [replace(e, split="validation" if int(e.id) % 6 == 1 else "train") for e in read_corpus(file)]
    entries[2] = replace(entries[2], label=None)
    entries[3] = replace(entries[3], caption="a ball", first_frame=2, num_frames=9)  # a segment
    entries[4] = replace(entries[4], status="not wanted")
    write_corpus(file, entries)
    return file


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    settings = ["--size", "32", "--format", "png", "--stride", "2", "--frames_per_shard", "20", "--workers", "1"]
    return ["--corpus", str(corpus), "--out", str(out), *settings, *more]


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    assert main(arguments(corpus, out, "--workers", "2")) == 0
    return out


def test_every_frame_of_every_video_is_there(corpus, shards):
    entries = usable(corpus, read_corpus(corpus))
    for split, folder in (("train", shards), ("validation", shards / "validation")):
        manifest = read_manifest(folder)
        samples = {s.key: s for shard in manifest.shards for s in read_samples(folder / shard.file)}
        assert set(samples) == {entry.id for entry in entries if entry.split == split}
        for entry in entries:
            if entry.split != split:
                continue
            sample = samples[entry.id]
            frames = list(decode(Path(entry.path), entry.first_frame, entry.num_frames, 2))
            assert sorted(sample.members) == [f"{i:05d}.png" for i in range(len(frames))]
            for i, frame in enumerate(frames):
                picture = np.asarray(Image.open(io.BytesIO(sample.members[f"{i:05d}.png"])))
                assert np.array_equal(picture, resize_and_crop(frame, 32))


def test_descriptions(corpus, shards):
    entries = {entry.id: entry for entry in usable(corpus, read_corpus(corpus), "train")}
    samples = {s.key: s.info for tar in shards.glob("*.tar") for s in read_samples(tar)}
    segment = entries["000003"]
    assert samples["000003"] == {
        "id": "000003",
        "path": segment.path,
        "sha256": segment.sha256,
        "fps": "8/1",
        "stride": 2,
        "first_frame": 2,
        "num_frames": 5,
        "width": 48,
        "height": 48,
        "label": "bounce",
        "class": 0,
        "caption": "a ball",
    }
    assert (samples["000002"]["label"], samples["000002"]["class"]) == (None, None)
    classes = read_manifest(shards).classes
    assert classes == ["bounce", "drift", "orbit", "pendulum", "pulse", "stripes"]
    for key, info in samples.items():
        assert info["class"] is None or classes[info["class"]] == entries[key].label


def test_manifest_and_index(corpus, shards):
    for split, folder in (("train", shards), ("validation", shards / "validation")):
        manifest = read_manifest(folder)
        assert manifest.kind == "frames"
        assert manifest.details == {
            "size": 32,
            "stride": 2,
            "picture_format": "png",
            "quality": 95,
            "fps": "8/1",
            "split": split,
            "corpus_sha256": sha256(corpus),
        }
        assert len(manifest.shards) > 1
        for shard in manifest.shards:
            assert sha256(folder / shard.file) == shard.sha256
            index = np.load(folder / shard.file.replace(".tar", ".index.npy"))
            assert shard.frames == len(index) <= 20
            data = (folder / shard.file).read_bytes()
            pictures = [m for s in read_samples(folder / shard.file) for _, m in sorted(s.members.items())]
            assert [data[row["offset"] : row["offset"] + row["bytes"]] for row in index] == pictures
    assert read_manifest(shards).num_frames == 18 * 6 + 5


@pytest.mark.parametrize(("picture_format", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats(corpus, picture_format, kind):
    entry = usable(corpus, read_corpus(corpus), "train")[0]
    sample = make_sample(entry, FrameSettings(40, 2, picture_format, quality=95), ["bounce"])
    picture = Image.open(io.BytesIO(sample.members[f"00001.{picture_format}"]))
    original = resize_and_crop(list(decode(Path(entry.path)))[2], 40).astype(int)
    assert picture.format == kind
    assert np.abs(np.asarray(picture) - original).mean() < 4
    coarse = make_sample(entry, FrameSettings(40, 2, picture_format, quality=20), ["bounce"])
    assert len(coarse.members[f"00001.{picture_format}"]) < len(sample.members[f"00001.{picture_format}"])


def test_plan():
    lengths = [*np.random.default_rng(0).integers(1, 60, 300).tolist(), 500]
    entries = [CorpusEntry(f"{i:06d}", "/x", "ok", num_frames=n) for i, n in enumerate(lengths)]
    plan = plan_shards(entries, stride=3, frames_per_shard=100)
    assert sorted(entry.id for shard in plan for entry in shard) == [entry.id for entry in entries]
    for shard in plan:
        assert [entry.id for entry in shard] == sorted(entry.id for entry in shard)
        assert sum(-(-entry.num_frames // 3) for entry in shard) <= 100 or len(shard) == 1
    assert len(plan) < 1.3 * sum(lengths) / 300
    spread = [np.ptp([int(entry.id) for entry in shard]) for shard in plan if len(shard) > 5]
    assert min(spread) > 60  # neighbours in the corpus, of one class, lie in different shards


def test_number_of_processes_does_not_matter(corpus, shards, tmp_path, capsys):
    main(arguments(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(shards)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    capsys.readouterr()
    assert main(arguments(corpus, tmp_path / "out")) == 0  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "out") == contents(shards)
    assert "19 videos, 113 frames" in capsys.readouterr().out


def kill_after_the_first_shard(corpus: Path, out: Path) -> bool:
    """Whether the program could be killed before it had finished."""
    command = [sys.executable, "-m", "data_tools.shard_videos", *arguments(corpus, out)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("*.done.json")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()


def test_a_killed_run_completes_to_the_same_bytes(corpus, shards, tmp_path):
    out = next(out for out in map(tmp_path.joinpath, "abcdef") if kill_after_the_first_shard(corpus, out))
    (out / f".frames-000001.tar.tmp.{platform.node()}.999999999").write_bytes(
        b"half"
    )  # had it been killed while writing
    done = min(out.glob("*.done.json"))
    kept = out / done.name.replace("done.json", "tar")
    before = kept.stat().st_mtime_ns
    assert main(arguments(corpus, out)) == 0
    assert contents(out) == contents(shards)
    assert kept.stat().st_mtime_ns == before


def test_changed_and_missing_videos_are_skipped_and_named(corpus, shards, tmp_path, capsys):
    shutil.copytree(corpus.parent / "videos", tmp_path / "videos")
    entries = [
        replace(entry, path=entry.path.replace(str(corpus.parent), str(tmp_path))) for entry in read_corpus(corpus)
    ]
    write_corpus(tmp_path / "c.jsonl", entries)
    changed, missing = usable(corpus, entries, "train")[5:7]
    original = Path(changed.path).read_bytes()
    Path(changed.path).write_bytes(original[:-1] + b"?")
    Path(missing.path).rename(tmp_path / "elsewhere.mp4")
    assert main(arguments(tmp_path / "c.jsonl", tmp_path / "out")) == 1
    output = capsys.readouterr()
    assert f"skipped {changed.path}: has changed since it was scanned" in output.err
    assert f"skipped {missing.path}: cannot be read (No such file or directory)" in output.err
    assert output.err.endswith("2 videos skipped\n")
    assert sum(shard.samples for shard in read_manifest(tmp_path / "out").shards) == 17

    Path(changed.path).write_bytes(original)
    (tmp_path / "elsewhere.mp4").rename(missing.path)
    assert main(arguments(tmp_path / "c.jsonl", tmp_path / "out")) == 0
    manifest = read_manifest(tmp_path / "out")
    assert sum(shard.samples for shard in manifest.shards) == 19
    pictures = [
        [sample.members for shard in read_manifest(folder).shards for sample in read_samples(folder / shard.file)]
        for folder in (tmp_path / "out", shards)
    ]
    assert pictures[0] == pictures[1]


def test_shards_of_other_settings_are_not_mixed(corpus, shards, tmp_path):
    before = contents(shards)
    with pytest.raises(UserError, match=r"holds the results of other settings \(size 32 -> 64\).*another --out"):
        main(arguments(corpus, shards, "--size", "64"))
    write_corpus(tmp_path / "c.jsonl", read_corpus(corpus)[:-1])
    with pytest.raises(UserError, match="corpus_sha256"):
        main(arguments(tmp_path / "c.jsonl", shards))
    assert contents(shards) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latents-000000.tar").touch()
    with pytest.raises(UserError, match="holds files of something else"):
        main(arguments(corpus, tmp_path / "other"))


def test_mistakes_are_one_line_and_exit_code_2(corpus, tmp_path):
    write_corpus(tmp_path / "v.jsonl", [replace(entry, split="validation") for entry in read_corpus(corpus)])
    mistakes = {
        "missing.jsonl: not found": ["--corpus", tmp_path / "missing.jsonl", "--out", tmp_path / "out"],
        "none is left to train on": ["--corpus", tmp_path / "v.jsonl", "--out", tmp_path / "out"],
        "--size 0: must be at least 1": ["--corpus", corpus, "--out", tmp_path / "out", "--size", "0"],
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
