"""Near-identical scenes: copies of all kinds are found, other clips are not."""

import base64
import itertools
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ardiff.video import VideoError, check, write_mp4
from data_tools.make_demo_corpus import make_clip
from data_tools.scanning.near_duplicates import (
    COLOURS,
    FRAMES,
    MAX_PICTURES,
    Duplicates,
    Pictures,
    Signature,
    are_alike,
    connect,
    find_duplicates,
)
from data_tools.scanning.scenes import THUMBNAIL_SIDE

REAL_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"


def signature(frames: np.ndarray) -> Signature:
    pictures = Pictures()
    for frame in frames:
        pictures.see(frame)
    return pictures.signature(0, len(frames))


def signature_of(path: Path) -> Signature:
    pictures = Pictures()
    info = check(path, visit=lambda frame: pictures.see(frame.thumbnail(THUMBNAIL_SIDE)))
    return pictures.signature(0, info.num_frames)


def search(*signatures: Signature) -> Duplicates:
    return find_duplicates(signatures, range(len(signatures)))


def resized(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    how = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), how)) for frame in frames])


@pytest.mark.parametrize("number", range(12))
def test_copies_are_found(number, tmp_path):
    frames = make_clip(0, number, size=64, num_frames=32)
    write_mp4(tmp_path / "original.mp4", frames, fps=8)
    write_mp4(tmp_path / "coarse.mp4", frames, fps=8, crf=34)
    write_mp4(tmp_path / "larger.mp4", resized(frames, 160, 120), fps=8, crf=24)
    write_mp4(tmp_path / "smaller.mp4", resized(frames, 40, 40), fps=8, crf=20)
    write_mp4(tmp_path / "cropped.mp4", frames[:, 1:-1, 1:-1], fps=8)
    write_mp4(tmp_path / "slower.mp4", frames[::2], fps=4)
    with av.open(str(tmp_path / "other.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8, bit_rate=200_000)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    names = ("original.mp4", "coarse.mp4", "larger.mp4", "smaller.mp4", "cropped.mp4", "slower.mp4", "other.avi")
    found = search(*(signature_of(tmp_path / name) for name in names))
    assert found.original == [None, 0, 0, 0, 0, 0, 0]
    assert found.group == [0] * 7


def test_other_clips_are_not():
    clips = [make_clip(0, number, size=64, num_frames=32) for number in range(160)]
    found = search(*map(signature, clips))
    assert found.original == [None] * 160 and found.group == list(range(160))


def test_no_pair_of_other_clips_is_alike():
    """As before, but without the search for candidates, which might just have missed them."""
    words = [signature(make_clip(1, number, size=64, num_frames=32)) for number in range(90)]
    pairs = np.array([*itertools.combinations(range(90), 2)])
    colours = np.stack([np.frombuffer(base64.b64decode(word.colours), np.uint8) for word in words])
    assert not are_alike(colours[pairs[:, 0]], colours[pairs[:, 1]]).any()


def test_the_same_motion_in_other_colours_is_another_clip():
    frames = make_clip(0, 0, size=64, num_frames=32)
    assert search(signature(frames), signature(frames[..., [2, 0, 1]])).original == [None, None]


def test_one_place_at_two_times():
    """A fixed camera: most of the picture never changes, what moves does so in another way."""
    place = make_clip(0, 5, size=64, num_frames=1)[0]
    clips = np.repeat(np.repeat(place[None], 32, 0)[None], 2, 0)
    for i in range(32):
        clips[0, i, 10 + i : 20 + i, 20:30] = 255
        clips[1, i, 42 - i : 52 - i, 20:30] = 255
    assert search(*map(signature, clips)).original == [None, None]
    assert search(*map(signature, [clips[0], clips[1], clips[0]])).original == [None, None, 0]


def test_still_pictures():
    stills = [np.repeat(make_clip(0, number, size=64, num_frames=1), 20, 0) for number in range(12)]
    rng = np.random.default_rng(0)
    noisy = np.clip(stills[3] + rng.normal(0, 3, stills[3].shape), 0, 255).astype(np.uint8)
    assert search(*map(signature, [*stills, noisy])).original == [None] * 12 + [3]


def test_black_and_blank_scenes_are_not_compared():
    rng = np.random.default_rng(0)
    blank = [np.full((20, 32, 32, 3), value, np.uint8) for value in (0, 0, 0, 90, 90, 255)]
    noise = [np.clip(rng.normal(4, 2, (20, 32, 32, 3)), 0, 255).astype(np.uint8) for _ in range(3)]
    mostly = [np.concatenate([blank[0], make_clip(0, number, size=32, num_frames=8)]) for number in range(3)]
    signatures = [signature(frames) for frames in (*blank, *noise, *mostly)]
    assert search(*signatures).original == [None] * 12
    equal = find_duplicates(signatures, ["x", "y", "x", *range(9)])  # unless they are equal to the byte
    assert equal.original == [None, None, 0, *[None] * 9]


def test_the_first_is_the_original_and_chains_are_one_group():
    """A slowly changes into C by way of B: A is like B, B is like C, but A is not like C."""
    base = resized(make_clip(0, 3, size=64, num_frames=8), 64, 64).astype(float)
    a, b, c = (signature((base * 0.8 + shift).astype(np.uint8)) for shift in (0, 6, 12))
    found = search(a, b, c)
    assert (found.original, found.group) == ([None, 0, None], [0, 0, 0])
    found = search(b, a, c)
    assert (found.original, found.group) == ([None, 0, 0], [0, 0, 0])
    assert search(a, c, b).original == [None, None, 0]


def test_equal_content_is_found_at_once():
    other = signature(make_clip(0, 1, size=64, num_frames=8))
    one = signature(make_clip(0, 0, size=64, num_frames=8))
    found = find_duplicates([other, one, other, one, one], ["o", "1", "o", "1", "1"])
    assert (found.original, found.group) == ([None, None, 0, 1, 1], [0, 1, 0, 1, 1])
    assert find_duplicates([], []) == Duplicates([], [])


def test_signatures_of_scenes_inside_a_long_video():
    """Of a video with more frames than are kept every second one describes its scenes."""
    scene = np.repeat(make_clip(0, 2, size=16, num_frames=8), 8, axis=0)
    still = np.zeros((16, 16, 3), np.uint8)
    short, long = Pictures(), Pictures()
    for frame in scene:
        short.see(frame)
    for i in range(MAX_PICTURES + 100):
        long.see(scene[i - 1001] if 1001 <= i < 1065 else still)
    assert len(long._kept) <= MAX_PICTURES and long._stride == 2
    one, other = short.signature(0, 64), long.signature(1001, 64)
    assert search(one, other).original == [None, 0]
    assert long.signature(0, 64).hashes == "0" * 16 * FRAMES
    assert long.signature(1064, 1).hashes != "0" * 16 * FRAMES  # nothing of the scenes beside it


def test_brightness():
    frames = np.zeros((16, 32, 32, 3), np.uint8)
    frames[10:] = 30
    assert signature(frames).brightness() == 30


def test_connect():
    assert connect(6, [(4, 2), (5, 4), (3, 3), (0, 1)]) == [0, 0, 2, 3, 2, 2]
    assert connect(3, []) == [0, 1, 2]


def test_many_scenes_take_little_time():
    """Thousands with the same bits: not every pair may be compared, but the first is compared with all."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4000, COLOURS), np.uint8)
    colours[3999] = colours[0]
    same_bits = "0123456789abcdef" * FRAMES
    many = [Signature(same_bits, base64.b64encode(row.tobytes()).decode()) for row in colours]
    begin = time.monotonic()
    assert search(*many).original == [None] * 3999 + [0]
    assert time.monotonic() - begin < 20


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason="real videos are not part of the repository")
def test_real_videos():
    signatures = []
    for path in sorted(REAL_VIDEOS.iterdir()):
        pictures = Pictures()
        seen = []
        try:
            check(path, visit=lambda frame, p=pictures, s=seen: (p.see(frame.thumbnail(128)), s.append(1)))
        except VideoError:
            continue
        # pieces of one and the same scene count as different clips
        signatures += [pictures.signature(start, 24) for start in range(0, len(seen) - 23, 24)]
    assert len(signatures) > 50
    assert search(*signatures).original == [None] * len(signatures)
