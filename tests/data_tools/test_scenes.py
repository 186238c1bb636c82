"""Scene cuts: exact where pictures change at once, none in ordinary motion."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from ardiff.video import check, decode, write_mp4
from data_tools.make_demo_corpus import make_clip
from data_tools.scanning.scenes import THRESHOLDS, THUMBNAIL_SIDE, SceneFinder, SceneSettings, split_at

REAL_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"


def cuts(frames: Iterable[np.ndarray], **settings) -> list[int]:
    finder = SceneFinder(SceneSettings(**settings))
    for frame in frames:
        finder.see(frame)
    return finder.cuts()


def cuts_in(path: Path, **settings) -> list[int]:
    finder = SceneFinder(SceneSettings(**settings))
    check(path, visit=lambda frame: finder.see(frame.thumbnail(THUMBNAIL_SIDE)))
    return finder.cuts()


def shot(seed: int, num_frames: int, speed: float = 2.0, size: int = 96) -> np.ndarray:
    """A camera that pans over a picture of its own: smooth random colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3)).astype(np.float64)
    grid = np.linspace(0, 11, 400)
    rows = np.stack([np.interp(grid, np.arange(12), coarse[:, j, c]) for j in range(12) for c in range(3)], -1)
    rows = rows.reshape(400, 12, 3)
    wide = np.stack([np.interp(grid, np.arange(12), rows[i, :, c]) for i in range(400) for c in range(3)], -1)
    picture = wide.reshape(400, 400, 3).transpose(1, 0, 2).round().astype(np.uint8)
    left = (np.arange(num_frames) * speed).astype(int) % 300
    return np.stack([picture[50 : 50 + size, at : at + size] for at in left])


def test_ordinary_motion_is_no_cut():
    for number in range(36):
        assert cuts(make_clip(0, number, size=64, num_frames=32)) == [], number
    assert cuts(shot(0, 60, speed=5.0)) == []


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_cuts_are_exact(detector, tmp_path):
    lengths = [20, 1, 37, 2, 25, 24]
    frames = np.concatenate([shot(seed, length, speed=0.5) for seed, length in enumerate(lengths)])
    expected = np.cumsum(lengths)[:-1].tolist()
    assert cuts(frames, detector=detector, threshold=THRESHOLDS[detector]) == expected
    write_mp4(tmp_path / "v.mp4", frames, fps=25, crf=28)
    assert cuts_in(tmp_path / "v.mp4", detector=detector, threshold=THRESHOLDS[detector]) == expected
    assert cuts(frames, detector="none") == []


@pytest.mark.parametrize("place", [1, 2, 3, 4, 36, 37, 38, 39])
def test_cuts_near_the_ends_are_found(place):
    assert cuts(np.concatenate([shot(1, place), shot(2, 40 - place)])) == [place]


def test_very_short_videos():
    for length in range(1, 6):
        assert cuts(shot(0, length)) == []
    assert cuts([]) == []


def test_repeated_frames_are_no_cuts():
    """Fast motion at half or a third of the frame rate: every repetition is followed by a large change."""
    fast = shot(3, 30, speed=9.0)
    for times in (2, 3):
        assert cuts(np.repeat(fast, times, axis=0)) == []
        both = np.concatenate([np.repeat(fast, times, axis=0), np.repeat(shot(4, 30, speed=9.0), times, axis=0)])
        assert cuts(both) == [30 * times]


def test_still_pictures_are_cut_like_any_other():
    slides = np.concatenate([np.repeat(shot(seed, 1), 20, axis=0) for seed in range(4)])
    assert cuts(slides) == [20, 40, 60]


def test_thresholds():
    frames = np.concatenate([shot(0, 30), shot(1, 30)])
    weak = np.repeat(frames.mean(-1, keepdims=True) * 0.5 + 60, 3, axis=-1).round().astype(np.uint8)
    assert cuts(weak) == []
    assert cuts(weak, min_change=3.0) == [30]
    assert cuts(frames, detector="content", threshold=200.0) == []


def faded(frames: np.ndarray, out: int, begin: int) -> np.ndarray:
    """Fade in over the first `begin` frames and out over the last `out`."""
    gain = np.minimum(
        1, np.minimum((np.arange(len(frames)) + 1) / (begin + 1), np.arange(len(frames), 0, -1) / (out + 1))
    )
    return (frames * gain[:, None, None, None]).round().astype(np.uint8)


def test_black_is_cut_out():
    black = np.zeros((10, 96, 96, 3), np.uint8)
    fading = [black, faded(shot(0, 40), 15, 15), black, faded(shot(1, 40), 15, 15), black]
    found = split_at(cuts(np.concatenate(fading)), 110)
    long = [(start, length) for start, length in found if length >= 16]
    assert len(long) == 2  # in between are but black and the darkest frames of the fades
    for (start, length), begin in zip(long, (10, 60), strict=True):
        assert begin <= start <= begin + 3 and begin + 37 <= start + length <= begin + 40
    gradual = [(frame / 8 + 20).astype(np.uint8) for frame in fading]
    assert cuts(np.concatenate(gradual), black_below=0.0, min_change=255.0) == []


def test_a_dissolve_is_not_cut():
    one, other = shot(0, 60).astype(float), shot(1, 60).astype(float)
    weight = np.clip((np.arange(60) - 20) / 20, 0, 1)[:, None, None, None]
    assert cuts((one * (1 - weight) + other * weight).round().astype(np.uint8)) == []


def test_scenes_cover_the_video():
    assert split_at([], 9) == [(0, 9)]
    assert split_at([4, 5], 9) == [(0, 4), (4, 1), (5, 4)]


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason="real videos are not part of the repository")
def test_real_videos():
    assert cuts_in(REAL_VIDEOS / "bikes.mp4") == [30, 76, 137, 187, 242]
    assert cuts_in(REAL_VIDEOS / "mm_test.avi") == []  # every second frame is a repetition
    frames = [frame for name, end in (("mm_test.avi", 30), ("mm_demo.mp4", 25)) for frame in first(name, end)]
    assert cuts(frames) == [30]


def first(name: str, end: int) -> list[np.ndarray]:
    from PIL import Image

    frames = decode(REAL_VIDEOS / name, 0, end)
    return [np.asarray(Image.fromarray(frame).resize((128, 96), Image.Resampling.BOX)) for frame in frames]
