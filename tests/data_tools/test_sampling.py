"""Which frames are taken and which videos share a shard."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from ardiff.data.corpus import CorpusEntry
from ardiff.errors import UserError
from data_tools.sharding.sampling import (
    Rate,
    class_numbers,
    common_fps,
    fill,
    parse_rate,
    plan_shards,
    tar_bytes,
    usable_at,
    video_info,
)


def entry(number: int, num_frames: int = 10, fps: str = "8/1", path: str | None = None, **more) -> CorpusEntry:
    values = {"split": "train", "sha256": f"{number:064x}", "width": 4, "height": 4, **more}
    return CorpusEntry(f"{number:06d}", path or f"{number}.mp4", "ok", fps=fps, num_frames=num_frames, **values)


@pytest.mark.parametrize("source", ["8/1", "25/1", "30000/1001", "24000/1001", "60/1", "12/1"])
@pytest.mark.parametrize("wanted", ["8", "7.5", "30000/1001", "12.5", "1", "1/3", "6"])
def test_frames_are_the_nearest_in_time(source, wanted):
    rate, fps = parse_rate(None, wanted), Fraction(source)
    for num_frames in (1, 2, 7, 100):
        video = entry(0, num_frames, source, first_frame=40)
        if fps < Fraction(wanted):
            assert "fewer than --fps" in rate.problem(video)
            continue
        assert rate.problem(video) is None
        positions = rate.positions(video)
        assert len(positions) == rate.count(video) == len(set(positions))
        times = [Fraction(k) / Fraction(wanted) for k in range(len(positions) + 1)]
        expected = [min(range(num_frames + 1), key=lambda i: (abs(i / fps - time), i)) for time in times]
        assert positions == [40 + i for i in expected[:-1]]  # of two that are equally near, the earlier one
        assert expected[-1] == num_frames  # the next one would lie behind the end


def test_every_nth_frame():
    video = entry(0, 10, first_frame=5)
    assert Rate(3).positions(video) == [5, 8, 11, 14] and Rate(3).count(video) == 4
    assert Rate(3).of_frames(video) == Fraction(8, 3) and parse_rate(None, "2").of_frames(video) == 2
    assert parse_rate(None, "8").positions(video) == Rate(1).positions(video) == list(range(5, 15))


def test_what_is_noted_of_the_rate():
    assert Rate(2).as_json() == {"stride": 2, "sampled_fps": None} and Rate(2).of_sample() == {"stride": 2}
    rate = parse_rate(None, "30000/1001")
    assert rate.as_json() == {"stride": 1, "sampled_fps": "30000/1001"}
    info = video_info(entry(3, 100, "60/1", label="b"), {"a": 0, "b": 1}, rate)
    assert (info["fps"], info["sampled_fps"], info["num_frames"], info["class"]) == ("60/1", "30000/1001", 50, 1)
    assert "stride" not in info  # the time of frame k is k / sampled_fps
    assert common_fps([entry(0), entry(1, fps="9/1")], Rate(2)) is None
    assert common_fps([entry(0), entry(1, fps="9/1")], parse_rate(None, "5")) == 5
    assert common_fps([entry(0), entry(1)], Rate(2)) == 4


@pytest.mark.parametrize("fps", ["0", "-3", "abc", "1/0", "nan", "inf", "1e3", "3/", "0.0", " 8", "12345678", ""])
def test_impossible_rates_are_refused(fps):
    with pytest.raises(UserError, match=r"^--fps .*such as 8, 12.5 or 30000/1001"):
        parse_rate(None, fps)


def test_stride_must_be_positive():
    with pytest.raises(UserError, match="--stride 0: must be at least 1"):
        parse_rate(0, None)


def test_slow_videos_are_named(tmp_path):
    videos = [entry(0), entry(1, fps="4/1"), entry(2, num_frames=1000)]
    chosen, skipped = usable_at(tmp_path, videos, parse_rate(None, "5"), max_frames=100)
    assert chosen == videos[:1]
    assert skipped["1.mp4"] == "has 4/1 frames per second, fewer than --fps 5; choose a lower one, or --stride"
    assert skipped["2.mp4"].startswith("gives more than 100 frames")
    with pytest.raises(UserError, match=r"none of its videos can be used; the first has 8/1 frames per second"):
        usable_at(tmp_path, videos, parse_rate(None, "9"))
    with pytest.raises(UserError, match="none is left to train on"):
        usable_at(tmp_path, [replace(videos[0], split="test")], Rate())


def test_classes_have_the_numbers_of_the_corpus():
    assert class_numbers([entry(0, label="b"), entry(1, label="a"), entry(2)]) == {"a": 0, "b": 1}
    assert class_numbers([entry(0, label="b", class_index=3), entry(1, label="a", class_index=7)]) == {"a": 7, "b": 3}


@pytest.fixture
def videos() -> list[CorpusEntry]:
    """40 videos of one segment each, 10 with three; and a very long one with twenty."""
    rng = random.Random(0)
    found = [entry(number, rng.randint(1, 30)) for number in range(40)]
    for group in range(10):
        for part in range(3):
            number = 40 + 3 * group + part
            found.append(entry(number, 8, path=f"group{group}.mp4", sha256=f"{group:064x}", first_frame=10 * part))
    found += [entry(70 + part, 20, path="long.mp4", sha256="f" * 64, first_frame=20 * part) for part in range(20)]
    return found


def test_shards_hold_every_video_once_and_are_about_full(videos):
    target = 100
    plan = plan_shards(videos, lambda video: video.num_frames, target)
    shards = [[video for source in shard for video in source.segments] for shard in plan]
    assert sorted(video.id for shard in shards for video in shard) == [video.id for video in videos]
    sizes = [sum(video.num_frames for video in shard) for shard in shards]
    assert max(sizes) <= target and min(sizes[:-1]) > target - 30
    parts = [source for shard in plan for source in shard]
    for source in parts:
        firsts = [video.first_frame for video in source.segments]
        assert firsts == sorted(firsts) and {video.path for video in source.segments} == {source.path}
    for group in range(10):  # the scenes of a video lie in one shard
        assert sum(source.path == f"group{group}.mp4" for source in parts) == 1
    assert sum(source.path == "long.mp4" for source in parts) >= 4  # 400 frames do not fit into one


def test_the_plan_depends_on_the_corpus_alone(videos):
    plan = plan_shards(videos, lambda video: video.num_frames, 100)
    shuffled = random.Random(1).sample(videos, len(videos))
    assert plan_shards(shuffled, lambda video: video.num_frames, 100) == plan
    assert [source.path for source in plan[0]] != [f"{number}.mp4" for number in range(len(plan[0]))]  # mixed


def test_a_group_is_only_divided_if_it_must_be():
    assert fill([[4, 4], [5], [3, 3, 3], [2]], int, 10) == [[[4, 4]], [[5]], [[3, 3, 3]], [[2]]]
    assert fill([[4], [5], [6, 6], [2]], int, 10) == [[[4], [5]], [[6]], [[6], [2]]]
    assert fill([[99], [1]], int, 10) == [[[99]], [[1]]]
    assert fill([], int, 10) == []


def test_positions_of_overlapping_scenes_are_decoded_once():
    scenes = [entry(0, 10, path="a.mp4"), entry(1, 10, path="a.mp4", sha256=f"{0:064x}", first_frame=5)]
    ((source,),) = plan_shards(scenes, lambda video: 1, 10)
    assert source.positions(Rate(2)) == [0, 2, 4, 5, 6, 7, 8, 9, 11, 13]


@pytest.mark.parametrize(("payload", "expected"), [(0, 512), (1, 1024), (512, 1024), (513, 1536)])
def test_bytes_in_a_tar(payload, expected):
    assert tar_bytes(payload) == expected
