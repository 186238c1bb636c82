"""Samples in words: videos and frames that really are the ones of the batch."""

import re

import numpy as np
import pytest
from data_helpers import all_latents, write_frames, write_latents

from ardiff.data.dataset import open_shards
from ardiff.data.describing import describe_samples
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Plan
from ardiff.data.shards import read_samples
from ardiff.data.tar import ShardError
from ardiff.errors import UserError

LINE = re.compile(r"(.*)/(latents-\d{6}\.tar): (\d{6}) frames? (\d+)(?:-(\d+))?(?:, every (2nd))?")


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path)
    return tmp_path


def mixture(folder, order="global", stride=1):
    return Mixture([Plan(open_shards(folder, "latents"), 5, order, 4, stride, lanes=4, window=3)], [1.0])


@pytest.mark.parametrize("order", ["global", "lanes"])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_sample_of_a_batch_is_named(folder, order, stride):
    data, videos = mixture(folder, order, stride), all_latents()
    lines, visits = describe_samples(data, 16, 16), data.visits(16, 16)
    assert len(lines) == 16
    for line, video, first, count in zip(lines, visits.video, visits.first_frame, visits.num_frames, strict=True):
        place, shard, key, begin, end, every = LINE.fullmatch(line).groups()
        assert place == str(folder)
        keys = [sample.key for sample in read_samples(folder / shard)]
        assert key in keys
        assert int(key) == video  # in this data set
        assert int(begin) == first
        last = int(end) if end else int(begin)
        assert len(videos[video][int(begin) : last + 1 : stride]) == count
        assert (every == "2nd") == (stride == 2 and count > 1)


def test_keys_are_those_of_the_shards(folder, tmp_path):
    data = mixture(folder)
    assert [data.key_of(video) for video in range(len(data))] == [f"{video:06d}" for video in range(len(data))]
    write_frames(tmp_path / "frames")
    frames = open_shards(tmp_path / "frames", "frames")
    assert [frames.key_of(video) for video in range(len(frames))] == ["000000", "000001", "000002"]


def test_of_several_sets(tmp_path):
    for name in ("one", "two"):
        write_latents(tmp_path / name)
    plans = [
        Plan(open_shards(tmp_path / name, "latents"), seed, num_frames=4) for seed, name in enumerate(("one", "two"))
    ]
    lines = describe_samples(Mixture(plans, [1.0, 1.0]), 0, 16)
    assert {line.split("/latents-")[0] for line in lines} == {str(tmp_path / "one"), str(tmp_path / "two")}


def test_a_shard_that_cannot_be_read_is_no_obstacle(folder):
    data = mixture(folder)
    path = folder / "latents-000001.tar"
    path.write_bytes(bytes(np.full(path.stat().st_size, 7, dtype=np.uint8)))
    with pytest.raises(ShardError, match="checksum"):
        data.key_of(3)
    lines = describe_samples(data, 0, 32)
    assert len(lines) == 32
    assert any(re.search(r"latents-000001.tar: video [34] frame", line) for line in lines)


def test_nor_is_a_table_of_pictures_that_cannot_be_read(tmp_path):
    write_frames(tmp_path)
    data = Mixture([Plan(open_shards(tmp_path, "frames"), 5, num_frames=2)], [1.0])
    named = describe_samples(data, 0, 4)
    assert all(re.search(r"\.tar: 00000\d frames? \d(-\d)?$", line) for line in named)
    data = Mixture([Plan(open_shards(tmp_path, "frames"), 5, num_frames=2)], [1.0])
    for path in tmp_path.iterdir():
        if path.suffix == ".npy":
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises((OSError, UserError)):
        data.place_of(0)
    lines = describe_samples(data, 0, 4)
    assert len(lines) == 4 and all(re.fullmatch(r"video \d frames? \d(-\d)?", line) for line in lines)


@pytest.mark.parametrize("failure", [ValueError("x"), KeyError(3), IndexError("x"), OverflowError("x")])
@pytest.mark.parametrize("what", ["place_of", "key_of"])
def test_whatever_damaged_data_raise(folder, monkeypatch, what, failure):
    def fails(*_):
        raise failure

    data = mixture(folder)
    monkeypatch.setattr(data, what, fails)
    lines = describe_samples(data, 0, 4)
    assert len(lines) == 4 and all(re.search(r"video \d+ frames? \d", line) for line in lines)
    assert all((str(folder) in line) == (what == "key_of") for line in lines)
