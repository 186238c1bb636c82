import numpy as np
import pytest
from PIL import Image

from ardiff.config import Config, load, with_overrides
from ardiff.errors import UserError
from ardiff.sampling.conditions import class_number, read_prompts
from ardiff.sampling.generate import Request, Video, batches, cache_mode, rows_of, video_seeds, window_of
from ardiff.sampling.levels import ADRows, MatrixRows, SlidingWindow, ad_levels
from ardiff.sampling.outputs import VideoOutput
from ardiff.sampling.pictures import CLEAN, GIVEN, MARGIN, NOISE, frame_forwards, schedule_picture
from ardiff.video import decode


def test_prompts_with_and_without_clips(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    path = tmp_path / "all.txt"
    path.write_text("A red car. || clips/a.mp4\n\nA dog | runs\nnothing||\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 4: no clip ''"):
        read_prompts(path)
    path.write_text("\ufeffA red car. || clips/a.mp4\n\nA dog | runs\n", encoding="utf-8")
    assert read_prompts(path) == [("A red car.", tmp_path / "clips" / "a.mp4"), ("A dog | runs", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a||b.mp4\n", "line 1: no clip 'b.mp4'"), (b"\n \n", "holds no prompts"), (b"\xff\xfe\xfa", "cannot be read")],
)
def test_bad_lists_of_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_classes_by_name_and_number():
    config = load("tiny", ["model.num_classes=3"])
    assert [class_number(label, ["a", "b", "1"], config) for label in ("b", "2", "1")] == [1, 2, 2]
    for label in ("c", "3", "-1"):
        with pytest.raises(UserError, match=f"--label {label}: must be a number below 3"):
            class_number(label, ["a", "b"], config)


def test_seeds_are_those_of_the_numbers():
    seeds = video_seeds(7, range(100))
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**62 for seed in seeds)
    assert video_seeds(7, [41]) == [seeds[41]]
    assert video_seeds(8, [41]) != [seeds[41]]


def test_videos_with_equal_numbers_of_given_frames_share_a_batch():
    given = np.zeros((2, 1, 1))
    videos = [Video(0), Video(1, prefix=given), Video(2), Video(3, prefix=given), Video(4)]
    request = Request(videos, 8, Config().sampling, batch_size=2)
    assert list(batches(request)) == [[0, 2], [4], [1, 3]]


def test_settings_become_rows_windows_and_caches():
    config = load("tiny", ["sampling.sliding=6", "sampling.history=2", "sampling.variable=true", "sampling.gap=4"])
    request = Request([Video(0)], 20, config.sampling)
    assert window_of(config.sampling) == SlidingWindow(6, 2, True)
    assert rows_of(request, config.model, prefix=3) == ADRows(20, config.sampling.num_steps, 4, 1, 3)
    assert cache_mode(config.model, config.sampling) == "none"
    assert cache_mode(config.model, load("tiny").sampling) == "exact"
    leaky = with_overrides(load("tiny"), ["model.context=leaky"])
    assert cache_mode(leaky.model, leaky.sampling) == "none"
    synchronous = load("tiny", ["sampling.gap=0"])
    rows = rows_of(Request([Video(0)], 8, synchronous.sampling), synchronous.model, prefix=1, ending=2)
    assert isinstance(rows, MatrixRows)
    assert (rows.matrix[0] == 0).tolist() == [True, *5 * [False], True, True]
    with pytest.raises(UserError, match="gap = 4: frames that are given at the end"):
        rows_of(request, config.model, prefix=1, ending=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.window=4", "sampling.sliding=4"], "exclude each other"),
        (["sampling.sink=1"], "only with sampling.window"),
        (["sampling.partition=4"], "only with sampling.sliding"),
        (["sampling.sliding=4", "sampling.lookahead=true"], "only with sampling.partition"),
        (["sampling.sliding=4", "sampling.cache=exact"], "use sampling.window"),
        (["sampling.eta=0.5", "sampling.solver=dpmpp"], "needs sampling.solver = ddim"),
        (["sampling.solvr=ddim"], "did you mean 'sampling.solver'"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        with_overrides(load("tiny"), overrides)


def color(picture, row, frame, rows, frames):
    height, width = 640 // (rows + 1), 640 // frames
    return np.array(picture)[MARGIN + row * height, MARGIN + frame * width].astype(float)


def test_a_picture_shows_the_levels(tmp_path):
    rows = ADRows(6, 9, 3, prefix=1)
    schedule_picture(tmp_path / "a.png", rows)
    levels = ad_levels(6, 9, 3, prefix=1)
    with Image.open(tmp_path / "a.png") as picture:
        for row in range(len(levels)):
            assert color(picture, row, 0, len(levels) - 1, 6).tolist() == list(GIVEN)
            for frame in range(1, 6):
                share = levels[row, frame].item() / 9
                expected = share * NOISE + (1 - share) * CLEAN
                assert np.abs(color(picture, row, frame, len(levels) - 1, 6) - expected).max() <= 1
    schedule_picture(tmp_path / "b.png", ADRows(2000, 50, 5), SlidingWindow(16))  # more rows and frames than pixels
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width < 1100 and picture.height < 1100


def test_frames_of_a_longer_video_before_do_not_stay(tmp_path):
    for count in (6, 2):
        with VideoOutput(tmp_path, "v", ["png"], count, (16, 16), 8) as output:
            output.add(np.zeros((count, 16, 16, 3), np.uint8), np.zeros((count, 2, 4)))
        assert len(list((tmp_path / "v").iterdir())) == count


@pytest.mark.parametrize(("frames", "gap", "expected"), [(16, 50, 815), (16, 0, 800), (128, 5, 6527)])
def test_frame_forwards_are_what_is_computed(frames, gap, expected):
    rows = ADRows(frames, 50, gap)
    assert frame_forwards(rows, cache=True) == expected
    assert frame_forwards(rows, cache=False) == frames * rows.num_rows


def test_files_of_a_video_come_frame_by_frame(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    latents = np.arange(20 * 2 * 4, dtype=np.float32).reshape(20, 2, 4)
    with VideoOutput(tmp_path, "v", ["mp4", "gif", "png", "npz"], 20, (16, 16), 8) as output:
        for start in (0, 7, 19):
            stop = {0: 7, 7: 19, 19: 20}[start]
            output.add(frames[start:stop], latents[start:stop])
            assert len(list((tmp_path / "v").glob("*.png"))) == stop
        assert not (tmp_path / "v.mp4").exists()
    assert output.files == ["v.mp4", "v.gif", "v/", "v.npz"]
    assert len(list(decode(tmp_path / "v.mp4"))) == 20
    with Image.open(tmp_path / "v" / "frame_000012.png") as picture:
        assert np.array_equal(np.asarray(picture), frames[12])
    with Image.open(tmp_path / "v.gif") as picture:
        assert picture.n_frames == 20
    found = np.load(tmp_path / "v.npz")
    assert np.array_equal(found["frames"], frames) and np.array_equal(found["latents"], latents)
    assert len(output.sheet) == 16 and np.array_equal(output.sheet[-1], frames[19])


def test_a_video_that_fails_leaves_nothing_half_written(tmp_path):
    with pytest.raises(RuntimeError), VideoOutput(tmp_path, "v", ["mp4", "gif", "npz"], 2, (16, 16), 8) as output:
        output.add(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 2, 4)))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
