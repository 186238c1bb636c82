"""The batches of a shard: filled in any order, by videos that overlap, fail or stop halfway, to the same result."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ardiff.config import load
from ardiff.data.corpus import CorpusEntry
from ardiff.errors import UserError
from ardiff.models import ARVAE
from data_tools.sharding.decoding import Chunk
from data_tools.sharding.encoding import Encoder, OpenShard, choose_device
from data_tools.sharding.latent_inputs import LatentTask, PicturesUnit, VideoUnit
from data_tools.sharding.sampling import Rate, Source

SIZE, BATCH = 2, 4


def video(number: int, *segments: tuple[int, int]) -> VideoUnit:
    """A video whose frame at position p is `picture(number, p)`."""
    entries = tuple(
        CorpusEntry(f"{number}{part}", f"{number}.mp4", "ok", first_frame=first, num_frames=length, fps="8/1")
        for part, (first, length) in enumerate(segments)
    )
    return VideoUnit(Source(f"{number}.mp4", "", entries), Rate(2), {})


def picture(number: int, position: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), 40 * number + position, dtype=np.uint8)


UNITS = (
    video(1, (0, 9)),
    video(2, (4, 20), (30, 6)),
    video(3, (0, 10), (5, 10), (6, 3)),  # overlapping, of both parities
    PicturesUnit("4.tar", "", (2, 5), (3, 1)),
    video(5, (0, 1)),
)


def decoded(number: int) -> list[np.ndarray]:
    unit = UNITS[number - 1]
    if isinstance(unit, VideoUnit):
        return [picture(number, position) for position in unit.source.positions(unit.rate)]
    return [picture(number, position) for position in range(4)]


def expected() -> list[list[int]]:
    """The grey values of every sample, straight from its definition."""
    values = [
        [[40 * number + p for p in unit.rate.positions(entry)] for entry in unit.source.segments]
        if isinstance(unit, VideoUnit)
        else [[160, 161, 162], [163]]
        for number, unit in enumerate(UNITS, 1)
    ]
    return [sample for unit in values for sample in unit]


def run(seed: int, broken: dict[int, int] | None = None) -> tuple[OpenShard, list[tuple[int, np.ndarray]]]:
    """Feed all units in random pieces at once; `broken` units (from 1) stop after that many frames."""
    rng, broken = random.Random(seed), broken or {}
    task = LatentTask(Path("out"), "latents-000000", "train", UNITS)
    shard = OpenShard(task, SimpleNamespace(batch_size=BATCH, size=SIZE, flip=True, latent_shape=(1, 1)))
    at, open_units, batches = dict.fromkeys(range(1, 6), 0), [1, 2, 3, 4, 5], []
    while open_units:
        assert not shard.complete
        number = rng.choice(open_units)
        frames = decoded(number)[: broken.get(number)]
        count = rng.randint(1, 4)
        if at[number] < len(frames):
            batches += shard.take(number - 1, Chunk(at[number], np.stack(frames[at[number] : at[number] + count])))
            at[number] += count
        else:
            open_units.remove(number)
            batches += shard.close(number - 1, "broken" if number in broken else None)
    rng.shuffle(batches)
    for batch, frames in batches:  # "encoded" as their grey value, mirrored ones as its negative
        grey = frames[:, 0, 0, 0].astype(np.float16)
        shard.store(batch, np.stack([grey, -grey])[..., None, None])
    assert shard.complete
    return shard, sorted(batches, key=lambda batch: batch[0])


def values(shard: OpenShard) -> dict[tuple[int, int], list[int]]:
    found = {}
    for unit, number, latents in shard.samples():
        assert latents.shape[2:] == (1, 1) and np.array_equal(latents[1], -latents[0])
        found[unit, number] = latents[0, :, 0, 0].astype(int).tolist()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_frame_finds_its_place_in_the_same_batch(seed):
    shard, batches = run(seed)
    assert list(values(shard).values()) == expected()
    assert shard.stored == shard.task.frames == sum(map(len, expected()))
    reference = run(99)[1]
    assert [number for number, _ in batches] == list(range(-(-shard.task.frames // BATCH)))
    for (_, found), (_, wanted) in zip(batches, reference, strict=True):
        assert np.array_equal(found, wanted)
    padding = len(batches) * BATCH - shard.task.frames
    assert padding and not batches[-1][1][-padding:].any()


@pytest.mark.parametrize("broken", [{1: 0}, {2: 3}, {3: 8}, {4: 2}, {5: 0}, {1: 2, 2: 0, 3: 1}])
def test_a_broken_video_changes_nothing_else(broken):
    shard, _ = run(0, broken)
    everything = values(run(1)[0])
    assert values(shard) == {key: value for key, value in everything.items() if key[0] + 1 not in broken}
    assert shard.problems == {number - 1: "broken" for number in broken}


def test_a_shard_of_which_nothing_is_left():
    shard, batches = run(0, dict.fromkeys(range(1, 6), 0))
    assert not values(shard) and not batches


def test_a_video_that_ends_early_without_a_word_is_a_problem():
    shard = OpenShard(
        LatentTask(Path("out"), "x", "train", UNITS[:1]),
        SimpleNamespace(batch_size=BATCH, size=SIZE, flip=False, latent_shape=(1, 1)),
    )
    shard.take(0, Chunk(0, np.stack(decoded(1)[:3])))
    shard.close(0)
    assert shard.problems == {0: "gave 3 of 5 frames"}


@pytest.fixture
def network() -> ARVAE:
    small = ["vae.image_size=16", "vae.hidden_size=16", "vae.num_tokens=4", "vae.num_heads=2"]
    return ARVAE(load("arvae_tiny", small).vae)


def test_latents_are_those_of_the_network_whatever_the_threads(network):
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 16, 16, 3), dtype=np.uint8)
    results = []
    for cores in (1, 3):
        encoder = Encoder(network, torch.device("cpu"), 6, flip=True, cores=cores)
        with encoder.running():
            results.append([future.result() for future in [encoder.submit(batch) for batch in frames]])
    assert all(np.array_equal(*pair) for pair in zip(*results, strict=True))
    for batch, found in zip(frames, results[0], strict=True):
        video = torch.from_numpy(batch).permute(0, 3, 1, 2)[None].float() / 255
        with torch.no_grad():
            wanted = torch.stack([network.encode(video)[0], network.encode(video.flip(-1))[0]])
        assert found.dtype == np.float16 and found.shape == (2, 6, 4, 4)
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-3, rtol=2e-3)


def test_latents_that_are_not_finite_are_refused(network):
    with torch.no_grad():
        network.to_latents.bias.fill_(float("nan"))
    encoder = Encoder(network, torch.device("cpu"), 1, flip=False, cores=1)
    with encoder.running(), pytest.raises(UserError, match="latents that are not finite; train it again"):
        encoder.submit(np.zeros((1, 16, 16, 3), dtype=np.uint8)).result()


def test_devices():
    assert choose_device("cpu", 3).type == "cpu"
    for name in ("tpu", "meta", "cuda:999", "cpu:x"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name, 0)
