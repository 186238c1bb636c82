"""scan_videos as a user runs it: what the corpus says of every input, and what a second or killed run does."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ardiff.data.corpus import CorpusEntry, classes, read_corpus, usable, write_corpus
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.video import fingerprint, write_mp4
from data_tools import make_demo_corpus, scan_videos
from data_tools.make_demo_corpus import make_clip
from data_tools.scanning import scan_results

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_VIDEOS = REPOSITORY.parent / "shared" / "data" / "videos"


def scan(*arguments: object, out: Path) -> list[CorpusEntry]:
    assert scan_videos.main([*map(str, arguments), "--out", str(out), "--workers", "1"]) == 0
    return read_corpus(out)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """18 demo videos, 3 unusable files, a copy under another name, and files that are none."""
    folder = tmp_path_factory.mktemp("scan") / "videos"
    make_demo_corpus.main(["--out", str(folder), "--num_videos", "18", "--num_frames", "8", "--size", "32"])
    data = bytearray((folder / "orbit" / "00001.mp4").read_bytes())
    (folder / "orbit" / "cut.mp4").write_bytes(data[: len(data) // 2])
    media = data.find(b"mdat") + 4
    data[media + 720 : media + 1200] = bytes(byte ^ 0x55 for byte in data[media + 720 : media + 1200])
    (folder / "pulse" / "damaged.mp4").write_bytes(data)
    (folder / "empty.MP4").touch()
    shutil.copy(folder / "drift" / "00002.mp4", folder / "bounce" / "copy.mp4")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "drift" / ".hidden.mp4").write_text("not looked at")
    (folder / "stripes" / "loop").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scan") / "new" / "corpus.jsonl"
    assert scan_videos.main([str(videos), "--out", str(out), "--workers", "2", "--validation_fraction", "0.3"]) == 0
    return out


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """Three scenes of 20, 6 and 24 frames, and a re-encoded copy of the film beside it."""
    folder = tmp_path_factory.mktemp("film")
    scenes = [make_clip(7, number, 48, length) for number, length in ((0, 20), (5, 6), (2, 24))]
    write_mp4(folder / "film.mp4", np.concatenate(scenes), fps=25)
    write_mp4(folder / "film_small.mp4", np.concatenate(scenes), fps=25, crf=28)
    return folder


def test_every_video_is_listed_with_what_it_is(videos, corpus):
    entries = read_corpus(corpus)
    assert [entry.path for entry in entries] == sorted(str(path) for path in videos.rglob("[!.]*.[mM][pP]4"))
    assert [entry.id for entry in entries] == [f"{number:06d}" for number in range(22)]
    good = [entry for entry in entries if entry.ok]
    assert len(good) == 19
    for entry in good:
        assert (entry.codec, entry.width, entry.height, entry.fps) == ("h264", 32, 32, "8/1")
        assert (entry.first_frame, entry.num_frames, entry.caption, entry.class_index) == (0, 8, None, None)
        assert Fraction(entry.fps) == 8
        assert entry.label == Path(entry.path).parent.name
        assert entry.sha256 == sha256(Path(entry.path))
        assert re.fullmatch(r"[0-9a-f]{128}", entry.perceptual_hash)
    assert classes(entries) == ["bounce", "drift", "orbit", "pendulum", "pulse", "stripes"]
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus.jsonl", "corpus.jsonl.results"]


def test_unusable_videos_are_named_with_a_reason(corpus):
    bad = {Path(entry.path).name: entry for entry in read_corpus(corpus) if not entry.ok}
    assert set(bad) == {"cut.mp4", "damaged.mp4", "empty.MP4"}
    assert "cannot be opened as a video" in bad["cut.mp4"].status
    assert re.fullmatch(r"frame \d+ (cannot be decoded \(.*\)|is damaged)", bad["damaged.mp4"].status)
    assert all(entry.split is None for entry in bad.values())


def test_the_split_follows_the_content(corpus):
    good = usable(corpus, read_corpus(corpus))
    of_content: dict[str, set] = {}
    for entry in good:
        of_content.setdefault(entry.sha256, set()).add(entry.split)
    assert len(of_content) == 18  # the copy is the 19th video
    assert all(len(splits) == 1 for splits in of_content.values())
    validation = usable(corpus, good, "validation")
    assert 1 <= len(validation) <= 12
    assert len(validation) + len(usable(corpus, good, "train")) == 19


def test_number_of_processes_does_not_matter(videos, corpus, tmp_path):
    scan(videos, "--validation_fraction", "0.3", out=tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == corpus.read_bytes()
    results = (tmp_path / "c.jsonl.results").read_bytes()
    assert results == corpus.with_name("corpus.jsonl.results").read_bytes()


def test_scenes_become_entries(film, tmp_path, capsys):
    entries = scan(film / "film.mp4", out=tmp_path / "c.jsonl")
    assert [(entry.first_frame, entry.num_frames) for entry in entries] == [(0, 20), (20, 6), (26, 24)]
    assert [entry.status for entry in entries] == ["ok", "scene of 6 frames, fewer than --min_scene_frames 16", "ok"]
    assert [entry.id for entry in entries] == ["000000", "000001", "000002"]
    assert len({(entry.path, entry.sha256) for entry in entries}) == 1
    assert len({entry.split for entry in entries if entry.ok}) == 1
    output = capsys.readouterr()
    assert "2 ok from 1 video (" in output.out
    assert re.search(r"rejected .*film\.mp4, frames 20 to 25: scene of 6 frames", output.err)
    entries = scan(film / "film.mp4", "--min_scene_frames", "6", out=tmp_path / "c.jsonl")
    assert all(entry.ok for entry in entries)
    for arguments in (["--scenes", "none"], ["--scene_min_change", "255"], ["--scene_threshold", "200"]):
        (whole,) = scan(film / "film.mp4", *arguments, out=tmp_path / "c.jsonl")
        assert (whole.status, whole.first_frame, whole.num_frames) == ("ok", 0, 50)
    assert scan(film / "film.mp4", "--scenes", "content", "--scene_threshold", "60", out=tmp_path / "c.jsonl")


def test_black_scenes_are_rejected(tmp_path):
    black = np.zeros((30, 48, 48, 3), np.uint8)
    write_mp4(tmp_path / "v.mp4", np.concatenate([make_clip(0, 0, 48, 30), black, make_clip(0, 1, 48, 30)]), fps=25)
    write_mp4(tmp_path / "w.mp4", black, fps=25)
    entries = scan(tmp_path, out=tmp_path / "c.jsonl")
    assert [entry.status for entry in entries] == ["ok", "30 black frames", "ok", "ok"]


def test_near_duplicates(film, tmp_path, capsys):
    flagged = scan(film, "--min_scene_frames", "6", out=tmp_path / "c.jsonl")
    assert [entry.duplicate_of for entry in flagged] == [None] * 3 + ["000000", "000001", "000002"]
    assert all(entry.ok for entry in flagged) and len({entry.split for entry in flagged}) == 1
    assert "3 of them are nearly identical to others" in capsys.readouterr().out
    rejected = scan(film, "--min_scene_frames", "6", "--duplicates", "reject", out=tmp_path / "c.jsonl")
    assert [entry.ok for entry in rejected] == [True] * 3 + [False] * 3
    assert rejected[4].status == f"nearly identical to 000001 ({film / 'film.mp4'})"
    assert (rejected[4].duplicate_of, rejected[4].split) == ("000001", None)
    unknown = scan(film, "--duplicates", "off", out=tmp_path / "c.jsonl")
    assert {entry.duplicate_of for entry in unknown} == {None}


def test_copies_follow_their_original_into_its_split(film, tmp_path, capsys):
    for name in ("a", "b", "c", "d"):
        write_mp4(tmp_path / f"{name}.mp4", make_clip(3, ord(name), 48, 20), fps=25)
    (tmp_path / "l.csv").write_text(f"path,split\n{film / 'film.mp4'},test\n{film / 'film_small.mp4'},\na.mp4,\nb.mp4,")
    entries = scan(tmp_path / "l.csv", "--validation_fraction", "0", out=tmp_path / "c.jsonl")
    splits = {Path(entry.path).stem: entry.split for entry in entries if entry.ok}
    assert splits == {"a": "train", "b": "train", "film": "test", "film_small": "test"}
    (tmp_path / "l.csv").write_text(
        f"path,split\n{film / 'film.mp4'},test\n{film / 'film_small.mp4'},train\na.mp4,\nb.mp4,"
    )
    capsys.readouterr()
    scan(tmp_path / "l.csv", out=tmp_path / "c.jsonl")
    assert "2 of these are in another split than their originals" in capsys.readouterr().err


def test_groups_and_given_splits(videos, tmp_path):
    by_group: dict[str, set] = {}
    entries = scan(videos, "--group", r"/\d+([0-9])\.mp4", "--validation_fraction", "0.4", out=tmp_path / "c.jsonl")
    for entry in entries:
        if entry.ok and "copy" not in entry.path:
            by_group.setdefault(entry.path[-5], set()).add(entry.split)
    assert len(by_group) == 10 and all(len(splits) == 1 for splits in by_group.values())
    assert len(set.union(*by_group.values())) == 2
    entries = scan(videos / "orbit", "--split", "test", out=tmp_path / "c.jsonl")
    assert {entry.split for entry in entries} == {"test", None}
    entries = scan(videos, "--validation_fraction", "0.3", "--test_fraction", "0.3", out=tmp_path / "c.jsonl")
    assert {entry.split for entry in entries if entry.ok} == {"train", "validation", "test"}


def test_lists_with_classes(videos, tmp_path, capsys):
    """Laid out as UCF-101: a class list, and a list of lines with the number of the class."""
    (tmp_path / "classInd.txt").write_text("1 archery\n2 bounce\n3 drift\n4 orbit\n5 pendulum\n6 pulse\n7 stripes\n")
    (tmp_path / "trainlist01.txt").write_text("drift/00002.mp4 3\norbit/00001.mp4 4\norbit/gone.mp4 4\n")
    arguments = [tmp_path / "trainlist01.txt", "--root", videos, "--labels", tmp_path / "classInd.txt"]
    entries = scan(*arguments, "--split", "train", out=tmp_path / "c.jsonl")
    assert [(entry.label, entry.class_index, entry.status, entry.split) for entry in entries] == [
        ("drift", 2, "ok", "train"),
        ("orbit", 3, "ok", "train"),
        ("orbit", 3, "missing", None),
    ]
    assert classes(entries) == ["class 0", "class 1", "drift", "orbit"]
    assert "orbit/gone.mp4: missing" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a ball|| drift/00002.mp4\n")
    (entry,) = scan(tmp_path / "prompts.txt", "--root", videos, out=tmp_path / "p.jsonl")
    assert (entry.caption, entry.label, entry.status) == ("a ball", None, "ok")
    (tmp_path / "classInd.txt").write_text("1 bounce\n2 drifting\n")
    with pytest.raises(UserError, match=r"has no class 'drift' \(nearest: 'drifting'\), 'orbit' \(nearest: '"):
        scan_videos.main([str(videos), "--out", str(tmp_path / "x.jsonl"), "--labels", str(tmp_path / "classInd.txt")])
    assert not (tmp_path / "x.jsonl.results").exists()


def test_frame_folders(tmp_path):
    for number in range(2):
        folder = tmp_path / "data" / "running" / f"clip{number}"
        folder.mkdir(parents=True)
        for i, frame in enumerate(make_clip(1, number, 48, 18)):
            Image.fromarray(frame).save(folder / f"frame{i}.png")
    (tmp_path / "data" / "running" / "clip1" / "frame10.png").write_bytes(b"broken")
    good, bad = scan(tmp_path / "data", "--fps", "30000/1001", out=tmp_path / "c.jsonl")
    assert (good.label, good.codec, good.fps, good.num_frames) == ("running", "png", "30000/1001", 18)
    assert good.sha256 == fingerprint(Path(good.path))
    assert bad.status.startswith("picture frame10.png cannot be read")
    good, _ = scan(tmp_path / "data", out=tmp_path / "c.jsonl")
    assert good.fps == "25/1"
    (tmp_path / "data" / "running" / "clip0" / "frame17.png").unlink()
    good, _ = scan(tmp_path / "data", out=tmp_path / "c.jsonl")
    assert good.num_frames == 17


def test_known_results_are_used_for_the_same_content_and_settings(videos, tmp_path, monkeypatch):
    video = tmp_path / "v.mp4"
    shutil.copy(videos / "drift" / "00002.mp4", video)
    out = tmp_path / "c.jsonl"
    first = scan(video, out=out)
    results = tmp_path / "c.jsonl.results"
    kept = results.read_text()
    # A trace in the results shows whether they were used.
    results.write_text(kept.replace('"num_frames": 8', '"num_frames": 7'))
    assert scan(video, out=out)[0].num_frames == 7
    assert scan(video, "--duplicates", "off", "--min_frames", "3", out=out)[0].num_frames == 7  # nothing to decode
    assert scan(video, "--scene_threshold", "3", out=out)[0].num_frames == 8
    results.write_text(kept.replace('"num_frames": 8', '"num_frames": 7'))
    shutil.copy(videos / "drift" / "00008.mp4", video)
    (changed,) = scan(video, out=out)
    assert changed.num_frames == 8 and changed.sha256 != first[0].sha256
    results.write_text(kept.replace('"num_frames": 8', '"num_frames": 7'))
    shutil.copy(videos / "drift" / "00002.mp4", video)
    monkeypatch.setattr(scan_results, "VERSION", scan_results.VERSION + 1)
    assert scan_results.ResultsFile(results, scan_videos.SceneSettings()).known == {}


def test_results_of_other_settings_are_not_lost_in_a_run_that_is_stopped(film, tmp_path):
    results = tmp_path / "c.jsonl.results"
    scan(film / "film.mp4", out=tmp_path / "c.jsonl")
    other = scan_results.ResultsFile(results, scan_videos.SceneSettings(threshold=9.0))
    assert other.known == {}
    other.add(scan_results.Result("/x.mp4", "broken", "0" * 64))
    mine = scan_results.ResultsFile(results, scan_videos.SceneSettings())
    assert list(mine.known) == [str(film / "film.mp4")]
    mine.finish(mine.known.values())
    assert scan_results.ResultsFile(results, scan_videos.SceneSettings(threshold=9.0)).known == {}


def test_torn_and_foreign_lines_are_ignored(videos, corpus, tmp_path):
    lines = corpus.with_name("corpus.jsonl.results").read_text().splitlines()
    assert len(lines) == 22
    wrong = [json.dumps({**json.loads(lines[0]), "surplus": 1}), "[]", "null", "{}", '{"settings": 3}', "\udcff"]
    text = "\n".join([*wrong, *lines[:9], lines[9][:-30]])
    (tmp_path / "c.jsonl.results").write_bytes(text.encode("utf-8", "surrogateescape"))
    scan(videos, "--validation_fraction", "0.3", out=tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == corpus.read_bytes()
    assert (tmp_path / "c.jsonl.results").read_text().splitlines() == lines


@pytest.mark.launcher
def test_killed_at_random_moments_the_result_is_the_same(videos, film, corpus, tmp_path):
    shutil.copytree(videos, tmp_path / "videos", symlinks=True)
    shutil.copytree(film, tmp_path / "videos" / "film")
    arguments = ["-m", "data_tools.scan_videos", tmp_path / "videos", "--workers", "2", "--out"]
    scan(tmp_path / "videos", out=tmp_path / "undisturbed.jsonl")
    command = [sys.executable, *map(str, arguments), str(tmp_path / "killed.jsonl")]
    rng = random.Random(0)
    progress = []
    for _ in range(2):
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
        results = tmp_path / "killed.jsonl.results"
        before = results.stat().st_size if results.exists() else 0
        while process.poll() is None and not (results.exists() and results.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        progress.append(results.read_bytes().count(b"\n"))
    assert progress[0] > 0 and progress == sorted(progress)
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    for suffix in ("", ".results"):
        killed, undisturbed = (tmp_path / f"{name}.jsonl{suffix}" for name in ("killed", "undisturbed"))
        assert killed.read_bytes() == undisturbed.read_bytes()


def test_captions_stay(videos, film, tmp_path, capsys):
    out = tmp_path / "c.jsonl"
    entries = scan(videos / "drift", film, out=out)
    typed = [replace(entry, caption=f"caption {i}") for i, entry in enumerate(entries)]
    typed = [replace(entry, caption=None) if "00008" in entry.path else entry for entry in typed]
    write_corpus(out, typed)
    assert scan(videos / "drift", film, out=out) == typed
    # Cut in another way, the film has other scenes: what was written about them is kept beside the corpus.
    capsys.readouterr()
    after = scan(videos / "drift", film, "--scenes", "none", out=out)
    assert [entry.caption for entry in after if "drift" in entry.path] == [
        entry.caption for entry in typed if "drift" in entry.path
    ]
    assert "6 captions belong to scenes that are not in the corpus any more" in capsys.readouterr().err
    assert read_corpus(tmp_path / "c.jsonl.previous") == typed
    # A caption that a list gives is that of the list.
    (tmp_path / "l.csv").write_text(f"path,caption\n{videos / 'drift' / '00002.mp4'},from a list\n")
    after = scan(videos / "drift", tmp_path / "l.csv", out=out)
    assert {Path(entry.path).name: entry.caption for entry in after}["00002.mp4"] == "from a list"


def test_single_files_short_videos_and_labels(videos, tmp_path, capsys):
    out = tmp_path / "c.jsonl"
    files = [str(videos / "drift" / "00002.mp4"), str(videos / "orbit"), str(videos / "drift" / "00002.mp4")]
    entries = scan(*files, out=out)
    assert [Path(entry.path).name for entry in entries] == [
        "00002.mp4",
        "00001.mp4",
        "00007.mp4",
        "00013.mp4",
        "cut.mp4",
    ]
    assert {entry.label for entry in entries} == {None}
    with pytest.raises(UserError, match="none of the 5 videos is usable"):
        scan_videos.main([*files, "--out", str(tmp_path / "d.jsonl"), "--workers", "1", "--min_frames", "9"])
    assert "00002.mp4, frames 0 to 7: has 8 frames, fewer than --min_frames 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of its 5 videos is usable"):
        usable(tmp_path / "d.jsonl", read_corpus(tmp_path / "d.jsonl"))
    assert scan_videos.main([*files, "--out", str(out), "--workers", "1", "--min_frames", "8"]) == 0


def test_mistakes_are_one_line_and_exit_code_2(videos, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "c.jsonl").write_text("not a corpus\n")
    (tmp_path / "gone.txt").write_text("a.mp4\nb.mp4\n")
    x = ["--out", tmp_path / "x.jsonl"]
    mistakes = {
        "no such file or folder": [tmp_path / "missing", *x],
        "no videos found": [tmp_path / "nothing", *x],
        "none of the 2 listed videos exists": [tmp_path / "gone.txt", *x],
        "c.jsonl, line 1: not JSON": [videos, "--out", tmp_path / "c.jsonl"],
        "is a folder": [videos, "--out", tmp_path],
        "c.jsonl: cannot make this folder": [videos, "--out", tmp_path / "c.jsonl" / "d.jsonl"],
        "--validation_fraction 2.0: must be between 0 and 1": [videos, *x, "--validation_fraction", "2"],
        "must not be more than 1": [videos, *x, "--validation_fraction", "0.6", "--test_fraction", "0.5"],
        "--group (: is not a regular expression": [videos, *x, "--group", "("],
        "--group zzz: matches none of the paths": [videos, *x, "--group", "zzz"],
        "--fps 0: must be a positive number": [videos, *x, "--fps", "0"],
        "--fps fast: must be a positive number": [videos, *x, "--fps", "fast"],
        "--scene_threshold 0.5: must be between 1 and 255": [videos, *x, "--scene_threshold", "0.5"],
        "--scene_min_change nan: must be": [videos, *x, "--scene_min_change", "nan"],
        "--min_scene_frames 0: must be at least 1": [videos, *x, "--min_scene_frames", "0"],
    }
    for expected, arguments in mistakes.items():
        with pytest.raises(UserError, match=re.escape(expected)) as caught:
            scan_videos.main([str(argument) for argument in arguments])
        assert "\n" not in str(caught.value)
    command = [sys.executable, "-m", "data_tools.scan_videos", *map(str, mistakes["no videos found"])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason="real videos are not part of the repository")
def test_real_videos(tmp_path, capsys):
    assert scan_videos.main([str(REAL_VIDEOS), "--out", str(tmp_path / "c.jsonl"), "--workers", "2"]) == 0
    entries = read_corpus(tmp_path / "c.jsonl")
    by_name: dict[str, list[CorpusEntry]] = {}
    for entry in entries:
        by_name.setdefault(Path(entry.path).name, []).append(entry)
    assert len(by_name) == 10
    assert [name for name, found in by_name.items() if not any(entry.ok for entry in found)] == ["corrupted.mp4"]
    assert by_name["carphone_pristine.mp4"][0].fps == "30000/1001"
    assert [entry.num_frames for entry in by_name["pancake.mkv"]] == [310]
    bounds = [(0, 30), (30, 46), (76, 61), (137, 50), (187, 55), (242, 8)]
    assert [(entry.first_frame, entry.num_frames) for entry in by_name["bikes.mp4"]] == bounds
    assert not by_name["bikes.mp4"][5].ok  # too short
    assert {entry.duplicate_of for entry in entries} == {None}
    assert "corrupted.mp4: frame " in capsys.readouterr().err


def test_a_scan_that_finds_nothing_leaves_an_earlier_corpus_alone(corpus, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl"
    out.write_bytes(corpus.read_bytes())
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"the only video is not usable; .*corpus.jsonl is left as it was"):
        scan_videos.main([str(tmp_path / "text.mp4"), "--out", str(out), "--workers", "1"])
    assert out.read_bytes() == corpus.read_bytes()
    assert "text.mp4" in capsys.readouterr().err
