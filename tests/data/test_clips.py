import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from data_helpers import all_latents, decoded, picture, write_frames, write_latents

from ardiff.config import load
from ardiff.data import dataset
from ardiff.data.clips import BadSample, FrameClips, LatentClips, count_bad
from ardiff.data.dataset import open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture, open_data
from ardiff.data.plan import Plan
from ardiff.data.shards import Moments, Sample, encode_array, parse_index, write_manifest, write_shard
from ardiff.data.stream import BatchStream
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.randomness import Stream, hashed, uniforms

FRAMES, TOKENS, CHANNELS = 4, 2, 4
LENGTHS = ((8,) * 12, (8, 2, 8, 3, 8, 8, 8, 8))
SHARD = "latents-000001.tar"


def settings(*overrides):
    model = (f"model.num_frames={FRAMES}", f"model.tokens_per_frame={TOKENS}", "data.normalize=none")
    return load("tiny", [*model, "train.seed=5", *overrides])


def opened(folder, *overrides):
    config = settings(f"data.shards={folder}", *overrides)
    data = open_data(config, "latents", FRAMES)
    return data, LatentClips(data, LatentSpace.of(data.manifest, config.data.normalize), config)


def rows_of(data, position=0, size=200):
    return data.visits(position, size)


def overwrite(folder, video, value, shard=1):
    """Write bytes over the latents of a video of a shard."""
    rows = parse_index((folder / f"latents-{shard:06d}.index.npy").read_bytes())
    with (folder / f"latents-{shard:06d}.tar").open("r+b") as stream:
        stream.seek(int(rows["offset"][video]))
        stream.write(value)
    return int(rows["offset"][video])


NAN = np.full((8, TOKENS, CHANNELS), np.nan, np.float16).tobytes()


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path, LENGTHS)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (NAN, [], "not finite"),
        (NAN, ["data.stride=2"], "not finite"),
        (b"\x00\x01", ["data.verify=true"], "checksum"),
        (b"\x00\x01", ["data.verify=true", "data.stride=2"], "checksum"),
    ],
)
def test_a_bad_sample_is_replaced_and_named(folder, damage, options, reason):
    data, clips = opened(folder, *options)
    whole = clips(rows_of(data)).tensors
    offset = overwrite(folder, 4, damage)
    result = clips(rows_of(data))
    visits = rows_of(data)
    hit = np.flatnonzero(visits.video == 12 + 4)
    assert len(hit) > 5
    assert [bad.position for bad in result.bad if bad.position in visits.position[hit]] == [
        bad.position for bad in result.bad
    ]
    assert {(bad.shard, bad.offset) for bad in result.bad} == {(f"{folder}/{SHARD}", offset)}
    assert all(reason in bad.reason for bad in result.bad)
    assert {bad.position for bad in result.bad} == set(visits.position[hit].tolist())
    others = np.setdiff1d(np.arange(200), hit)
    # nothing else changes: neither other rows nor, in the replaced ones, what ranks count on
    for name in ("noise", "timesteps", "mask"):
        assert torch.equal(result.tensors[name], whole[name])
    assert torch.equal(result.tensors["latents"][others], whole["latents"][others])
    stride = clips.config.data.stride
    every = [video[first : first + 3 * stride + 1 : stride] for video in all_latents(LENGTHS) for first in range(8)]
    known = {clip.astype(np.float32).tobytes() for clip in every if len(clip) == FRAMES}
    for row in hit:
        assert result.tensors["latents"][row].numpy().tobytes() in known


def test_substitutes_do_not_depend_on_ranks_or_micro_batches(folder):
    overwrite(folder, 4, NAN)
    overwrite(folder, 0, NAN, shard=0)
    data, clips = opened(folder)

    def batches(rank, world, micro):
        options = {"global_batch_size": 32, "micro_batch_size": micro, "rank": rank, "world_size": world}
        stream = BatchStream(data, clips, **options)
        found = [next(stream) for _ in range(4)]
        stream.close()
        return found

    whole = batches(0, 1, 32)
    assert sum(len(batch.bad) for batch in whole) > 3
    for world, micro in ((1, 4), (2, 8), (4, 2)):
        ranks = [batches(rank, world, micro) for rank in range(world)]
        for number in range(4):
            pieces = [piece for rank in ranks for piece in rank[number].micro_batches]
            for name, expected in whole[number].micro_batches[0].items():
                assert torch.equal(torch.cat([piece[name] for piece in pieces]), expected)
            assert sorted(bad for rank in ranks for bad in rank[number].bad) == sorted(whole[number].bad)


def test_a_short_clip_is_replaced_by_one_that_is_long_enough(folder):
    overwrite(folder, 1, NAN[: 2 * 2 * TOKENS * CHANNELS])
    data, clips = opened(folder)
    rows = rows_of(data)
    hit = np.flatnonzero(rows.video == 13)
    assert len(hit) and (rows.num_frames[hit] == 2).all()
    result = clips(rows).tensors
    assert torch.equal(result["mask"][hit].sum(1), torch.full((len(hit),), 2))
    latents = result["latents"][hit]
    assert torch.isfinite(latents).all()
    assert latents[:, :2].abs().sum(dim=(1, 2, 3)).all()
    assert not latents[:, 2:].any()


def test_a_shard_that_shrinks_while_it_is_read_is_no_crash(folder, monkeypatch):
    monkeypatch.setattr(dataset.time, "sleep", lambda seconds: None)
    data, clips = opened(folder)
    clips(rows_of(data))  # it is open now
    with (folder / SHARD).open("r+b") as stream:
        stream.truncate(2000)
    result = clips(rows_of(data))
    assert all("ends before" in bad.reason for bad in result.bad)
    visits = rows_of(data)
    lost = data.sets[0]._offset[0] + 8 * 2 * TOKENS * CHANNELS > 2000
    lost &= data.sets[0].shard_of_video == 1
    assert {bad.position for bad in result.bad} >= set(
        visits.position[lost[visits.video] & (visits.video > 13)].tolist()
    )


def test_a_failing_disk_is_asked_again_and_then_named(folder, monkeypatch):
    data, clips = opened(folder, "data.verify=true")  # which reads, where otherwise memory maps are used
    expected = clips(rows_of(data)).tensors["latents"]
    real, calls, pauses = dataset.os.preadv, [], []

    def flaky(handle, buffers, offset):
        calls.append(offset)
        if len(calls) % 3 == 1:
            raise OSError(5, "Input/output error")
        return real(handle, buffers, offset)

    monkeypatch.setattr(dataset.os, "preadv", flaky)
    monkeypatch.setattr(dataset.time, "sleep", pauses.append)
    result = clips(rows_of(data))
    assert not result.bad
    assert torch.equal(result.tensors["latents"], expected)
    monkeypatch.setattr(dataset.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"20 samples in a row cannot be used, the last one: .*latents-.*Input/output"):
        clips(rows_of(data, size=4))


def test_nothing_but_bad_samples_ends_the_run(folder):
    for shard, lengths in enumerate(LENGTHS):
        for video in range(len(lengths)):
            overwrite(folder, video, NAN[: 2 * lengths[video] * TOKENS * CHANNELS], shard)
    data, clips = opened(folder)
    with pytest.raises(UserError, match="20 samples in a row cannot be used"):
        clips(rows_of(data))


def test_bad_samples_are_counted_by_position_and_in_a_row():
    def at(*positions):
        return [BadSample(position, "x.tar", 0, "why") for position in positions]

    assert count_bad(at(), 1) == (0, 0)
    assert count_bad(at(5, 5, 5), 1) == (1, 1)  # a substitute that was bad as well is no other sample
    assert count_bad(at(9, 3, 4, 5, 1), 1) == (5, 3)
    assert count_bad(at(0, 4, 8, 1), 4) == (4, 3)  # three in a row in lane 0
    assert count_bad(at(*range(50)), 1) == (50, 50)


def write_rich(folder, dim=3):
    """Latents with mirrored ones and texts of different lengths."""
    entries, moments = [], Moments(CHANNELS)
    for number in range(2):
        samples = []
        for video in range(number * 5, number * 5 + 5):
            latents = np.random.default_rng(video).normal(size=(8, TOKENS, CHANNELS)).astype(np.float16)
            text = np.full((1 + video % 3, dim), video + 1, np.float16)
            members = {"latents.npy": latents, "flipped.npy": -latents, "text.npy": text}
            arrays = {name: encode_array(array) for name, array in members.items()}
            samples.append(Sample(f"{video:06d}", {"class": None}, arrays))
            moments.add(latents)
        entries.append(write_shard(folder, f"latents-{number:06d}", samples, moments))
    details = {"tokens": TOKENS, "channels": CHANNELS, "mean": [0.0] * 4, "std": [1.0] * 4}
    details |= {"arvae": {"id": "0", "path": "x"}, "text_tokens": 3, "text_dim": dim}
    write_manifest(folder, "latents", entries, [], details)


@pytest.mark.parametrize("options", [[], ["data.stride=2"], ["data.verify=true"]])
def test_mirrored_clips_come_as_often_as_asked_and_by_position(tmp_path, options):
    write_rich(tmp_path)
    plain_data, plain = opened(tmp_path, *options)
    rows = rows_of(plain_data, size=400)
    original = plain(rows).tensors["latents"]
    assert torch.equal(opened(tmp_path, "data.flip_probability=1", *options)[1](rows).tensors["latents"], -original)
    mixed = opened(tmp_path, "data.flip_probability=0.3", *options)[1](rows).tensors["latents"]
    expected = uniforms(hashed(5, Stream.FLIP, rows.position), 1)[:, 0] < 0.3
    assert 80 < expected.sum() < 160
    assert torch.equal(mixed[expected], -original[expected])
    assert torch.equal(mixed[~expected], original[~expected])


@pytest.mark.parametrize("verify", ["true", "false"])
def test_text_features_are_padded_and_dropped(tmp_path, verify):
    write_rich(tmp_path)
    data, clips = opened(tmp_path, "model.context_dim=3", "train.label_dropout=0.4", f"data.verify={verify}")
    rows = rows_of(data, size=300)
    context = clips(rows).tensors["context"]
    assert context.shape == (300, 3, 3)
    assert context.dtype == torch.float32
    dropped = 0
    for row, video in enumerate(rows.video.tolist()):
        expected = np.zeros((3, 3), np.float32)
        expected[: 1 + video % 3] = video + 1
        if not context[row].any():
            dropped += 1
        else:
            assert np.array_equal(context[row].numpy(), expected)
    assert 80 < dropped < 160


def test_texts_longer_than_any_that_was_trained_on_are_cut(tmp_path):
    write_rich(tmp_path)
    data, clips = opened(tmp_path, "model.context_dim=3", "train.label_dropout=0")
    rows = rows_of(data, size=20)
    whole = clips(rows).tensors["context"]
    clips.space = dataclasses.replace(clips.space, text_tokens=2)  # as if these videos were held out
    assert torch.equal(clips(rows).tensors["context"], whole[:, :2])


def test_text_that_is_not_finite_is_a_bad_sample(tmp_path):
    write_rich(tmp_path)
    rows = parse_index((tmp_path / "latents-000000.index.npy").read_bytes())
    place = rows[(rows["member"] == 2) & (rows["sample"] == 2)][0]
    with (tmp_path / "latents-000000.tar").open("r+b") as stream:
        stream.seek(int(place["offset"]))
        stream.write(b"\x00\x7c")
    data, clips = opened(tmp_path, "model.context_dim=3", "train.label_dropout=0")
    result = clips(rows_of(data))
    assert {bad.reason for bad in result.bad} == {"text features that are not finite"}
    assert torch.isfinite(result.tensors["context"]).all()
    assert 3.0 not in result.tensors["context"]


def test_nothing_is_unpickled_between_disk_and_batch(tmp_path, monkeypatch):
    write_rich(tmp_path / "latents")
    write_frames(tmp_path / "frames", ((3, 1), (6,)), 16)

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    data, clips = opened(tmp_path / "latents", "model.context_dim=3", "data.verify=true", "data.flip_probability=0.5")
    assert not clips(rows_of(data)).bad
    config = settings(f"data.shards={tmp_path / 'frames'}", "vae.image_size=16", "vae.patch_size=8")
    frames = open_data(config, "frames", 1)
    assert not FrameClips(frames, config, 1)(rows_of(frames, size=20)).bad


def test_pictures_are_mirrored_checked_and_replaced(tmp_path):
    size, lengths = 16, ((3, 1), (6,))
    write_frames(tmp_path, lengths, size)
    config = settings("vae.image_size=16", "vae.patch_size=8", "vae.num_tokens=2", "data.flip_probability=0.5")
    shards = open_shards(tmp_path, "frames")
    data = Mixture([Plan(shards, 5, num_frames=1)], [1.0])
    clips, rows = FrameClips(data, config, 1), rows_of(data, size=40)
    flipped = uniforms(hashed(5, Stream.FLIP, rows.position), 1)[:, 0] < 0.5
    video = clips(rows).tensors["video"]
    for row, (index, first, _, _) in enumerate(zip(*rows, strict=True)):
        expected = decoded(picture(index, first, size))[:, :: -1 if flipped[row] else 1]
        np.testing.assert_allclose(video[row, 0].permute(1, 2, 0).numpy(), expected / 255, atol=1e-6)
    table = parse_index((tmp_path / "frames-000001.index.npy").read_bytes())
    with (tmp_path / "frames-000001.tar").open("r+b") as stream:
        stream.seek(int(table["offset"][2]) + 300)
        stream.write(b"\xff\x00\xff")
    result = clips(rows)
    hit = (rows.video == 2) & (rows.first_frame == 2)
    assert {bad.position for bad in result.bad} == set(rows.position[hit].tolist())
    assert all("checksum of this picture" in bad.reason for bad in result.bad)
    assert torch.equal(result.tensors["video"][~torch.from_numpy(hit)], video[~torch.from_numpy(hit)])


def enlarged(pictures, scale, y, x):
    """The square of side `scale` whose centre lies at y, x in [-1, 1] of where it may lie: pictures [F, S, S, 3]."""
    size = pictures.shape[1]
    offsets = (np.arange(size) + 0.5) * scale + (1 - scale) * size / 2 - 0.5
    for axis, place in ((1, y), (2, x)):
        at = np.clip(offsets + place * (1 - scale) * size / 2, 0, size - 1)
        low = np.minimum(at.astype(int), size - 2)
        share = (at - low).reshape([-1 if number == axis else 1 for number in range(4)])
        pictures = np.take(pictures, low, axis) * (1 - share) + np.take(pictures, low + 1, axis) * share
    return pictures


def test_crops_of_pictures_are_one_square_per_clip_whichever_clips_are_made_together(tmp_path):
    size, frames = 16, 3
    write_frames(tmp_path, ((6, 6), (6,)), size)
    config = settings("vae.image_size=16", "vae.patch_size=8", "vae.num_tokens=2", "data.crop_scale=0.4")
    data = Mixture([Plan(open_shards(tmp_path, "frames"), 5, num_frames=frames)], [1.0])
    clips, rows = FrameClips(data, config, frames), rows_of(data, size=24)
    video = clips(rows).tensors["video"].permute(0, 1, 3, 4, 2).numpy()
    numbers = uniforms(hashed(5, Stream.FRAME_CROP, rows.position), 3)
    for row, (index, first, _, _) in enumerate(zip(*rows, strict=True)):
        whole = np.stack([decoded(picture(index, first + frame, size)) for frame in range(frames)]) / 255
        scale, x, y = 0.4 + 0.6 * numbers[row, 0], *(2 * numbers[row, 1:] - 1)
        np.testing.assert_allclose(video[row], enlarged(whole, scale, y, x), atol=1e-5)
    half = type(rows)(*(column[7:11] for column in rows))
    np.testing.assert_array_equal(clips(half).tensors["video"].permute(0, 1, 3, 4, 2).numpy(), video[7:11])


def rewrite_index(folder, change):
    """Let somebody change the index of the first shard and make its checksum fit."""
    path = folder / "latents-000000.index.npy"
    rows = parse_index(path.read_bytes()).copy()
    change(rows)
    np.save(path, rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("member", [1, 2])
def test_arrays_that_do_not_fit_their_latents_are_refused(tmp_path, member):
    write_rich(tmp_path)

    def change(rows):
        row = np.flatnonzero(rows["member"] == member)[1]
        rows["frames"][row], rows["bytes"][row] = {1: (7, 7 * 2 * TOKENS * CHANNELS), 2: (4, 4 * 2 * 3)}[member]

    rewrite_index(tmp_path, change)
    with pytest.raises(UserError, match=r"latents-000000.index.npy: does not describe latents-000000.tar"):
        opened(tmp_path)
