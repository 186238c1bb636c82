import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from data_helpers import all_latents, class_of, decoded, picture, write_frames, write_latents

from ardiff.config import load
from ardiff.data import stream as stream_module
from ardiff.data.clips import FrameClips, LatentClips
from ardiff.data.dataset import open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Plan
from ardiff.data.stream import BatchStream
from ardiff.diffusion.timesteps import fopp_from_seeds
from ardiff.randomness import Stream, hashed, normals

FRAMES, TOKENS, CHANNELS, CLASSES = 4, 2, 4, 3
GLOBAL, MICRO = 16, 2


def settings(*overrides):
    model = (f"model.num_frames={FRAMES}", f"model.tokens_per_frame={TOKENS}", f"model.num_classes={CLASSES}")
    return load("tiny", [*model, "train.seed=5", "train.label_dropout=0.3", *overrides])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_latents(folder)
    return open_shards(folder, "latents")


def parts_of(shards, config):
    data = config.data
    plan = Plan(shards, config.train.seed, data.order, FRAMES, data.stride, data.lanes, data.lane_window)
    mixture = Mixture([plan], [1.0])
    return mixture, LatentClips(mixture, LatentSpace.of(shards.manifest, config.data.normalize), config)


def take(shards, count, config=None, **options):
    """The next `count` batches of one rank."""
    plan, clips = parts_of(shards, config or settings())
    options = {"global_batch_size": GLOBAL, "micro_batch_size": MICRO, **options}
    stream = BatchStream(plan, clips, **options)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def rows_of(data, position, size):
    """A whole global batch as one piece."""
    return data.visits(position, size)


def assembled(shares):
    """The global batch from all ranks' shares, which are its stretches in order."""
    pieces = [piece for share in shares for piece in share.micro_batches]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


@pytest.fixture(scope="module")
def expected(shards):
    """The first three global batches, as one rank reads them in one piece."""
    return [assembled([batch]) for batch in take(shards, 3, micro_batch_size=GLOBAL)]


@pytest.mark.parametrize("order", ["global", "lanes"])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_bytes(shards, world, micro, order):
    config = settings(f"data.order={order}", "data.lanes=4", "data.lane_window=3")
    expected = [assembled([batch]) for batch in take(shards, 3, config, micro_batch_size=GLOBAL)]
    ranks = [take(shards, 3, config, rank=rank, world_size=world, micro_batch_size=micro) for rank in range(world)]
    for number, shares in enumerate(zip(*ranks, strict=True)):
        assert {share.position for share in shares} == {number * GLOBAL}
        assert {share.size for share in shares} == {GLOBAL}
        assert all(len(share.micro_batches) == GLOBAL // micro // world for share in shares)
        together = assembled(shares)
        assert_equal(together, expected[number])
        # what the loss is divided by is the same number on every rank: real frames of the global batch
        assert {share.num_frames for share in shares} == {int(together["mask"].sum())}


def test_batches_are_not_all_alike(expected):
    assert set(expected[0]) == {"latents", "noise", "timesteps", "mask", "label"}
    for name in ("latents", "noise", "timesteps"):
        assert not torch.equal(expected[0][name], expected[1][name])
    masks = torch.cat([batch["mask"] for batch in expected])
    assert masks.any(dim=1).all()
    assert not masks.all()  # the data set has short videos


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_resuming_equals_continuing(shards, order, monkeypatch):
    monkeypatch.setattr(stream_module, "PLANNED", 3 * GLOBAL)  # resume within, at and beyond what is planned at once
    config = settings(f"data.order={order}", "data.lanes=4", "data.lane_window=3")
    whole = take(shards, 8, config)
    for start in (1, 3, 5):
        resumed_batches = take(shards, 8 - start, config, position=start * GLOBAL)
        for resumed, continued in zip(resumed_batches, whole[start:], strict=True):
            assert (resumed.position, resumed.num_frames) == (continued.position, continued.num_frames)
            for one, other in zip(resumed.micro_batches, continued.micro_batches, strict=True):
                assert_equal(one, other)


@pytest.mark.parametrize("prefetch", [1, 2, 8])
def test_prefetching_changes_nothing(shards, expected, prefetch):
    for batch, reference in zip(take(shards, 3, prefetch=prefetch), expected, strict=True):
        assert_equal(assembled([batch]), reference)


def test_a_batch_holds_what_the_plan_says(shards):
    config = settings("data.stride=2")
    plan, _ = parts_of(shards, config)
    visits = plan.visits(GLOBAL, GLOBAL)
    batch = assembled([take(shards, 2, config)[1]])
    for i, (video, first, position, count) in enumerate(zip(*visits, strict=True)):
        raw = all_latents()[video][first::2][:FRAMES].astype(np.float32)
        assert len(raw) == count
        assert batch["mask"][i].tolist() == [frame < count for frame in range(FRAMES)]
        found = batch["latents"][i].numpy()
        np.testing.assert_allclose(found[:count], raw / np.sqrt((raw**2).sum(-1, keepdims=True)), rtol=1e-5, atol=1e-6)
        noise = normals(5, Stream.NOISE, position, (FRAMES, TOKENS, CHANNELS))
        assert np.array_equal(batch["noise"][i].numpy(), noise)
    keys = hashed(5, Stream.TIMESTEPS, visits.position)
    assert torch.equal(batch["timesteps"], fopp_from_seeds(keys, FRAMES, 1000))
    assert batch["mask"].dtype == torch.bool
    assert batch["latents"].dtype == batch["noise"].dtype == torch.float32


def test_timesteps_follow_the_configured_distribution(shards):
    batch = assembled([take(shards, 1, settings("diffusion.timesteps=synchronous"))[0]])
    assert (batch["timesteps"] == batch["timesteps"][:, :1]).all()
    batch = assembled([take(shards, 1, settings("diffusion.num_timesteps=30", "sampling.num_steps=20"))[0]])
    assert batch["timesteps"].max() < 30


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_are_dropped_as_often_as_asked(shards, share):
    config = settings(f"train.label_dropout={share}")
    plan, clips = parts_of(shards, config)
    visits = rows_of(plan, 0, 2000)
    label = clips(visits).tensors["label"]
    known = [class_of(video) for video in visits.video]
    dropped = 0
    for found, given in zip(label.tolist(), known, strict=True):
        if given is None:
            assert found == CLASSES
        else:
            assert found in (given, CLASSES)
            dropped += found == CLASSES
    labelled = sum(given is not None for given in known)
    assert abs(dropped - share * labelled) <= 5 * (share * (1 - share) * labelled) ** 0.5


def test_an_unconditional_model_gets_no_labels(shards):
    batch = take(shards, 1, settings("model.num_classes=0"))[0].micro_batches[0]
    assert set(batch) == {"latents", "noise", "timesteps", "mask"}


def test_padding_is_zero_before_normalisation(shards):
    # zero tokens cannot be brought to length 1: no NaN may come of it
    batch = assembled([take(shards, 1)[0]])
    hidden = batch["latents"][~batch["mask"]]
    assert len(hidden)
    assert torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("kind", ["unit", "standardize", "none"])
def test_normalisations(shards, kind):
    manifest = shards.manifest
    space = LatentSpace.of(manifest, kind)
    raw = np.concatenate(all_latents())
    found = space.to_model(raw)
    assert found.dtype == np.float32
    if kind == "unit":
        np.testing.assert_allclose((found.astype(np.float64) ** 2).sum(-1), 1, rtol=1e-5)
        cosine = (found * raw).sum(-1) / np.linalg.norm(raw.astype(np.float32), axis=-1)
        np.testing.assert_allclose(cosine, 1, rtol=1e-3)
    elif kind == "standardize":
        flat = found.reshape(-1, CHANNELS)
        np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(flat.std(0), 1, rtol=1e-5)
        back = space.to_arvae(torch.from_numpy(found)).numpy()
        np.testing.assert_allclose(back, raw.astype(np.float32), rtol=1e-4, atol=1e-5)
    else:
        assert np.array_equal(found, raw.astype(np.float32))
    if kind != "standardize":  # the decoder normalises for itself
        assert torch.equal(space.to_arvae(torch.from_numpy(found)), torch.from_numpy(found))


@pytest.mark.parametrize("kind", ["unit", "standardize"])
def test_normalisations_survive_constant_and_zero_latents(shards, kind):
    space = LatentSpace.of(shards.manifest, kind)
    space.std = [0.0] * CHANNELS
    assert np.isfinite(space.to_model(np.zeros((3, TOKENS, CHANNELS), np.float16))).all()


def test_a_latent_space_survives_its_checkpoint(shards):
    space = LatentSpace.of(shards.manifest, "standardize")
    assert LatentSpace(**space.as_json()) == space


def test_frame_clips(tmp_path):
    lengths, size = ((3, 1), (6,)), 16
    write_frames(tmp_path, lengths, size)
    shards = open_shards(tmp_path, "frames")
    config = settings("vae.image_size=16", "vae.patch_size=8", "vae.num_tokens=2", "vae.channels=4")
    data = Mixture([Plan(shards, config.train.seed, num_frames=FRAMES)], [1.0])
    visits = rows_of(data, 4, 8)
    batch = FrameClips(data, config, num_frames=FRAMES)(visits).tensors
    assert batch["video"].shape == (8, FRAMES, 3, size, size)
    assert batch["video"].dtype == torch.float32
    for i, (video, first, position, count) in enumerate(zip(*visits, strict=True)):
        frames = [decoded(picture(video, first + frame, size)) for frame in range(count)]
        expected = np.stack(frames).transpose(0, 3, 1, 2).astype(np.float32) / 255
        np.testing.assert_allclose(batch["video"][i, :count].numpy(), expected, rtol=1e-6)
        assert not batch["video"][i, count:].any()
        assert batch["mask"][i].tolist() == [frame < count for frame in range(FRAMES)]
        noise = normals(5, Stream.POSTERIOR, position, (FRAMES, TOKENS, CHANNELS))
        assert np.array_equal(batch["noise"][i].numpy(), noise)


class Broken:
    """Reads well until a position, then fails."""

    def __init__(self, clips, position, error):
        self.clips, self.position, self.error, self.at_once = clips, position, error, clips.at_once
        self.counted_frames = clips.counted_frames

    def __call__(self, rows):
        if self.position in rows.position:
            raise self.error
        return self.clips(rows)


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt(), SystemExit(3)], ids=type)
def test_an_error_surfaces_at_the_batch_that_it_concerns(shards, error):
    plan, clips = parts_of(shards, settings())
    broken = Broken(clips, 2 * GLOBAL + 3, error)
    stream = BatchStream(plan, broken, global_batch_size=GLOBAL, micro_batch_size=MICRO)
    assert next(stream).position == 0
    assert next(stream).position == GLOBAL
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error
    stream.close()
    assert not stream._threads[0].is_alive()


def ends(call):
    """Whether a call comes back within seconds, by returning or raising."""

    def quietly():
        with contextlib.suppress(BaseException):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(timeout=2)
    return not thread.is_alive()


def test_a_stream_that_broke_does_not_hang_a_consumer_that_asks_again(shards):
    plan, clips = parts_of(shards, settings())
    broken = Broken(clips, 0, OSError("disk gone"))
    stream = BatchStream(plan, broken, global_batch_size=GLOBAL, micro_batch_size=MICRO)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert ends(lambda: next(stream))
    stream.close()


def test_a_closed_stream_does_not_hang_a_consumer_that_asks_again(shards):
    plan, clips = parts_of(shards, settings())
    stream = BatchStream(plan, clips, global_batch_size=GLOBAL, micro_batch_size=MICRO, prefetch=1)
    stream.close()
    assert ends(lambda: [next(stream) for _ in range(4)])  # more than can have been prepared


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_thread(shards, taken):
    plan, clips = parts_of(shards, settings())
    stream = BatchStream(plan, clips, global_batch_size=GLOBAL, micro_batch_size=MICRO, prefetch=1)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert not stream._threads[0].is_alive()
    stream.close()  # twice does no harm


@pytest.mark.parametrize(
    ("each", "prefetch", "expected"),
    [(1, 2, 2), (GLOBAL, 4, 4), (4 * GLOBAL, 1, 1), (4 * GLOBAL, 4, 1), (4 * GLOBAL, 8, 1 + 4)],
)
def test_the_producer_stops_at_the_prefetch_limit(shards, each, prefetch, expected):
    """The first batch is handed over alone, then as many at a time as are best made together."""
    plan, clips = parts_of(shards, settings())
    reached, asked = threading.Event(), []

    class Counting:
        at_once = each
        counted_frames = clips.counted_frames

        def __call__(self, visits):
            asked.extend(visits.position.tolist())
            if len(asked) == expected * GLOBAL:
                reached.set()
            return clips(visits)

    stream = BatchStream(plan, Counting(), global_batch_size=GLOBAL, micro_batch_size=MICRO, prefetch=prefetch)
    assert reached.wait(timeout=10)
    time.sleep(0.3)  # for what should not happen
    assert len(asked) == expected * GLOBAL
    stream.close()


def starts(skipped, count, position=0, size=GLOBAL):
    """Where global batches begin, worked out one sample after the other."""
    left_out = {each for start, end in skipped for each in range(start, end)}
    found = []
    while len(found) < count:
        touched = [each for each in range(position, position + size) if each in left_out]
        if touched:
            position = max(end for start, end in skipped if start <= touched[0] < end)
        else:
            found.append(position)
            position += size
    return found


SKIPPED = [
    [(2 * GLOBAL, 3 * GLOBAL)],
    [(0, GLOBAL)],
    [(4 * GLOBAL, 5 * GLOBAL), (GLOBAL, 3 * GLOBAL), (5 * GLOBAL, 7 * GLOBAL)],
    [(GLOBAL + 4, 2 * GLOBAL + 4), (3 * GLOBAL + 8, 4 * GLOBAL)],  # of other batch sizes
    [(GLOBAL, 4 * GLOBAL), (2 * GLOBAL, 2 * GLOBAL + 8), (3 * GLOBAL, 5 * GLOBAL), (8, 8)],
]


@pytest.mark.parametrize("order", ["global", "lanes"])
@pytest.mark.parametrize("skipped", SKIPPED)
def test_skipped_stretches_are_left_out(shards, skipped, order, monkeypatch):
    monkeypatch.setattr(stream_module, "PLANNED", 3 * GLOBAL)
    config = settings(f"data.order={order}", "data.lanes=4", "data.lane_window=3")
    found = take(shards, 8, config, skipped=skipped)
    assert [batch.position for batch in found] == starts([pair for pair in skipped if pair[0] < pair[1]], 8)
    for batch in found:  # what stands at a position is the same as ever
        (alone,) = take(shards, 1, config, position=batch.position)
        assert (batch.size, batch.num_frames) == (GLOBAL, alone.num_frames)
        assert_equal(assembled([batch]), assembled([alone]))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("order", ["global", "lanes"])
def test_any_number_of_ranks_leaves_out_the_same(shards, world, order):
    config = settings(f"data.order={order}", "data.lanes=4", "data.lane_window=3")
    for skipped in SKIPPED:
        expected = take(shards, 6, config, skipped=skipped)
        ranks = [take(shards, 6, config, skipped=skipped, rank=rank, world_size=world) for rank in range(world)]
        for one, shares in zip(expected, zip(*ranks, strict=True), strict=True):
            assert {(share.position, share.num_frames) for share in shares} == {(one.position, one.num_frames)}
            assert_equal(assembled(shares), assembled([one]))


@pytest.mark.parametrize("prefetch", [1, 3, 40])
@pytest.mark.parametrize("skipped", SKIPPED)
def test_prefetch_and_restarts_leave_out_the_same(shards, skipped, prefetch):
    whole = take(shards, 24, skipped=skipped, prefetch=prefetch)  # at most 16 are made at a time
    assert [batch.position for batch in whole] == starts([pair for pair in skipped if pair[0] < pair[1]], 24)
    for number, batch in enumerate(whole[:6]):
        resumed = take(shards, 3, skipped=skipped, position=batch.position + batch.size)
        for one, other in zip(resumed, whole[number + 1 :], strict=False):
            assert one.position == other.position
            assert_equal(assembled([one]), assembled([other]))


def test_with_lanes_batches_begin_at_multiples_of_their_number(shards):
    config = settings("data.order=lanes", "data.lanes=4", "data.lane_window=3")
    found = take(shards, 2, config, skipped=[(GLOBAL, GLOBAL + 3)])
    assert [batch.position for batch in found] == [0, GLOBAL + 4]


def test_an_error_behind_a_skipped_stretch_surfaces_at_its_batch(shards):
    plan, clips = parts_of(shards, settings())
    broken = Broken(clips, 4 * GLOBAL + 3, OSError("disk gone"))
    options = {"global_batch_size": GLOBAL, "micro_batch_size": MICRO, "prefetch": 8}
    stream = BatchStream(plan, broken, skipped=[(2 * GLOBAL, 3 * GLOBAL)], **options)
    assert [next(stream).position for _ in range(3)] == [0, GLOBAL, 3 * GLOBAL]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    stream.close()
    stream = BatchStream(plan, broken, skipped=[(4 * GLOBAL, 5 * GLOBAL)], **options)
    assert [next(stream).position for _ in range(6)] == [each * GLOBAL for each in (0, 1, 2, 3, 5, 6)]
    stream.close()


class Remote:
    """A mixture whose shards would have to be fetched."""

    def __init__(self, data):
        self.data, self.is_remote, self.lanes, self.prepared = data, True, data.lanes, []

    def visits(self, position, size):
        return self.data.visits(position, size)

    def prepare(self, videos):
        self.prepared += videos.tolist()


def test_skipped_stretches_are_not_fetched(shards):
    plan, clips = parts_of(shards, settings())
    data, skipped = Remote(plan), [(GLOBAL, 3 * GLOBAL), (5 * GLOBAL, 6 * GLOBAL)]
    stream = BatchStream(data, clips, global_batch_size=GLOBAL, micro_batch_size=MICRO, prefetch=1, skipped=skipped)
    deadline = time.monotonic() + 10
    while len(data.prepared) < 8 * GLOBAL and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()
    expected = [plan.visits(position, GLOBAL).video for position in starts(skipped, 8)]
    assert data.prepared[: 8 * GLOBAL] == np.concatenate(expected).tolist()
