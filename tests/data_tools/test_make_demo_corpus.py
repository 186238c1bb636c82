"""The demo corpus: real videos, deterministic, resumable, and moving the way a model can learn."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ardiff.errors import UserError
from ardiff.video import check, decode
from data_tools.make_demo_corpus import CLASSES, main, make_clip

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--num_videos", "12", "--num_frames", "10", "--size", "32"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "videos"
    assert main(["--out", str(folder), *SMALL]) == 0
    return folder


def test_what_is_written(corpus):
    videos = sorted(corpus.rglob("*.mp4"))
    assert len(videos) == 12
    assert {path.parent.name for path in videos} == set(CLASSES) and len(CLASSES) == 6
    for path in videos:
        info = check(path)
        assert (info.codec, info.width, info.height, info.fps, info.num_frames) == ("h264", 32, 32, 8, 10)


def test_the_files_show_the_clips(corpus):
    for name in CLASSES:
        path = min((corpus / name).glob("*.mp4"))
        decoded = np.stack(list(decode(path))).astype(int)
        drawn = make_clip(0, int(path.stem), size=32, num_frames=10)
        assert np.abs(decoded - drawn).mean() < 6, name


def test_same_seed_same_bytes(corpus, tmp_path):
    main(["--out", str(tmp_path / "same"), *SMALL])
    assert contents(tmp_path / "same") == contents(corpus)
    main(["--out", str(tmp_path / "other"), *SMALL, "--seed", "1"])
    other = contents(tmp_path / "other")
    assert not {other[name] for name in other if name.endswith("mp4")} & set(contents(corpus).values())


@pytest.mark.parametrize("number", range(6))
def test_motion_is_smooth_and_shapes_are_large(number):
    for repeat in range(3):
        clip = make_clip(0, number + 6 * repeat, size=64, num_frames=32).astype(float)
        steps = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
        assert steps.max() > 1  # it moves
        assert steps.max() < 2 * steps.mean()  # without jumps
        shape = (clip.max(-1) > 190).mean((1, 2))
        assert 0.05 < shape.mean() < 0.7


def test_restart_completes_to_the_same_bytes(corpus, tmp_path, capsys):
    folder = tmp_path / "videos"
    main(["--out", str(folder), "--num_videos", "7", *SMALL[2:]])
    videos = sorted(folder.rglob("*.mp4"))
    videos[0].write_bytes(videos[0].read_bytes()[:-300])  # truncated by someone
    videos[1].unlink()
    (videos[2].parent / f".{videos[2].name}.tmp.{platform.node()}.999999999").write_bytes(
        b"half"
    )  # what a killed process leaves
    untouched = videos[3].stat().st_mtime_ns
    capsys.readouterr()
    main(["--out", str(folder), *SMALL])
    assert "12 videos of 6 classes, 7 newly made" in capsys.readouterr().out
    assert contents(folder) == contents(corpus)
    assert videos[3].stat().st_mtime_ns == untouched


def test_a_folder_with_something_else_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"seed 0 -> 5.*another --out"):
        main(["--out", str(corpus), *SMALL, "--seed", "5"])
    with pytest.raises(UserError, match="not part of this corpus"):
        main(["--out", str(corpus), "--num_videos", "6", *SMALL[2:]])
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(UserError, match=r"not part of this corpus \(holiday.mp4\)"):
        main(["--out", str(tmp_path)])


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").touch()
    for arguments in (["--out", tmp_path / "file"], ["--out", tmp_path / "x", "--size", "33"]):
        command = [sys.executable, "-m", "data_tools.make_demo_corpus", *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1
