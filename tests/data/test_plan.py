import itertools
import time

import numpy as np
import pytest
from data_helpers import chi_square, write_latents

from ardiff.data import plan as plan_module
from ardiff.data.dataset import open_shards
from ardiff.data.plan import ROUNDS, Plan, places
from ardiff.data.shards import read_manifest
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed

FRAMES = 4
LENGTHS = ((5, 1, 16), (20, 7), (33, 2, 4, 9), (8,) * 40)
FLAT = np.array([length for part in LENGTHS for length in part])
COUNTS = [1, 2, 3, 4, 5, 16, 17, 64, 1000, 4097, 65537]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_latents(folder, LENGTHS, tokens=1, channels=1)
    return open_shards(folder, "latents")


def plan_of(shards, seed=0, num_frames=FRAMES, stride=1):
    return Plan(shards, seed, num_frames=num_frames, stride=stride)


def permute(places, count, seed, epoch):
    keys = hashed(seed, Stream.ORDER, np.int64(epoch) * ROUNDS + np.arange(ROUNDS))
    return plan_module.permute(places, np.array([count]), np.tile(keys, (len(places), 1)))


def visits_per_video(num_frames=FRAMES, stride=1):
    return np.maximum(1, FLAT // (num_frames * stride))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 10**9), (-1, 3)])
def test_permute_is_a_bijection(count, seed, epoch):
    values = permute(np.arange(count), count, seed, epoch)
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(count))


@pytest.mark.parametrize("count", [17, 1000])
def test_permute_takes_places_one_by_one(count):
    whole = permute(np.arange(count), count, 3, 5)
    places = np.array([count - 1, 0, 7, 7, 3])
    assert np.array_equal(permute(places, count, 3, 5), whole[places])
    assert [permute(np.array([place]), count, 3, 5)[0] for place in places] == whole[places].tolist()


def test_permute_is_pinned():
    # a run that is resumed after an update must not see other data
    assert permute(np.arange(10), 10, 0, 0).tolist() == [5, 7, 8, 1, 2, 4, 9, 3, 6, 0]
    assert permute(np.arange(10), 10, 0, 1).tolist() == [1, 0, 8, 7, 9, 2, 5, 4, 6, 3]


def test_permute_changes_with_seed_and_epoch():
    orders = {permute(np.arange(100), 100, seed, epoch).tobytes() for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("count", [8, 10])
def test_permute_sends_every_place_everywhere_alike(count):
    # over many epochs: also where the network works on 4 bits only
    epochs = 4000
    table = np.stack([permute(np.arange(count), count, 1, epoch) for epoch in range(epochs)])
    for place in range(count):
        observed = np.bincount(table[:, place], minlength=count)
        assert chi_square(observed, np.full(count, epochs / count)) < 1
    # nor do neighbours stay neighbours: the first two places are any distance apart
    difference = (table[:, 1] - table[:, 0]) % count
    assert chi_square(np.bincount(difference, minlength=count)[1:], np.full(count - 1, epochs / (count - 1))) < 1


@pytest.mark.parametrize(("num_frames", "stride"), [(4, 1), (4, 2), (1, 1), (16, 1), (3, 5)])
def test_every_visit_comes_exactly_once_per_epoch(shards, num_frames, stride):
    plan = plan_of(shards, num_frames=num_frames, stride=stride)
    expected = visits_per_video(num_frames, stride)
    assert plan.visits_per_epoch == expected.sum()
    for epoch in range(3):
        visits = plan.visits(epoch * plan.visits_per_epoch, plan.visits_per_epoch)
        assert np.array_equal(np.bincount(visits.video, minlength=len(FLAT)), expected)


def test_order_differs_between_epochs_and_seeds(shards):
    plan, other = plan_of(shards), plan_of(shards, seed=1)
    size = plan.visits_per_epoch
    orders = {one.visits(epoch * size, size).video.tobytes() for one in (plan, other) for epoch in range(4)}
    assert len(orders) == 8
    # a shuffle, not a rotation: neighbours in one epoch are no neighbours in the next
    one, other = (set(itertools.pairwise(plan.visits(epoch * size, size).video.tolist())) for epoch in (0, 1))
    assert len(one & other) < size / 4


def test_a_plan_is_a_pure_function_of_the_position(shards):
    plan = plan_of(shards)
    size = plan.visits_per_epoch
    for position in (0, 5, size - 3, 3 * size - 1, 10**9):  # across the ends of epochs too
        together = plan.visits(position, 40)
        assert together.position.tolist() == list(range(position, position + 40))
        singles = [plan_of(shards).visits(position + i, 1) for i in reversed(range(40))]
        for column, parts in zip(together, zip(*reversed(singles), strict=True), strict=True):
            assert np.array_equal(column, np.concatenate(parts))


def test_a_batch_may_span_several_epochs(shards):
    plan = plan_of(shards)
    size = plan.visits_per_epoch
    whole = plan.visits(3, 3 * size)
    expected = visits_per_video()
    for epoch in (1, 2):
        start = epoch * size - 3
        counts = np.bincount(whole.video[start : start + size], minlength=len(FLAT))
        assert np.array_equal(counts, expected)


def test_batch_and_visits_tell_the_same(shards):
    plan = plan_of(shards)
    visits, batch = plan.visits(11, 30), plan.batch(11, 30)
    assert [visit.video for visit in batch] == visits.video.tolist()
    assert [visit.first_frame for visit in batch] == visits.first_frame.tolist()
    assert [visit.position for visit in batch] == list(range(11, 41))
    assert all(type(value) is int for visit in batch for value in visit)


@pytest.mark.parametrize(("num_frames", "stride"), [(4, 1), (4, 2), (1, 1), (16, 1), (3, 5)])
def test_clips_lie_inside_their_video(shards, num_frames, stride):
    visits = plan_of(shards, num_frames=num_frames, stride=stride).visits(0, 2000)
    lengths = FLAT[visits.video]
    span = (num_frames - 1) * stride + 1
    last = visits.first_frame + (visits.num_frames - 1) * stride
    assert (visits.first_frame >= 0).all()
    assert (last < lengths).all()
    assert (visits.num_frames >= 1).all()
    whole = lengths >= span
    assert (visits.num_frames[whole] == num_frames).all()
    # a short video begins at its start and gives all it has
    assert (visits.first_frame[~whole] == 0).all()
    assert np.array_equal(visits.num_frames[~whole], -(-lengths[~whole] // stride))


@pytest.mark.parametrize(("num_frames", "stride"), [(4, 1), (4, 2), (16, 1)])
def test_short_videos_are_counted(shards, num_frames, stride):
    plan = plan_of(shards, num_frames=num_frames, stride=stride)
    assert plan.num_short == sum(length < (num_frames - 1) * stride + 1 for length in FLAT)


@pytest.mark.parametrize(("video", "stride", "choices"), [(5, 1, 30), (5, 2, 27), (2, 1, 13)])
def test_crops_are_uniform_over_all_starts(shards, video, stride, choices):
    visits = plan_of(shards, stride=stride).visits(0, 60_000)
    starts = visits.first_frame[visits.video == video]
    assert len(starts) > 1000
    observed = np.bincount(starts, minlength=choices)
    assert len(observed) == choices
    assert chi_square(observed, np.full(choices, len(starts) / choices)) < 1


def test_crops_change_with_epoch_visit_and_seed(tmp_path):
    # one video only, so that the order of the videos cannot make the difference
    write_latents(tmp_path, ((33,),), tokens=1, channels=1)
    shards = open_shards(tmp_path, "latents")
    starts = [tuple(plan_of(shards, seed).visits(8 * epoch, 8).first_frame) for seed in (0, 1) for epoch in range(3)]
    assert len(set(starts)) == 6
    assert len(set(starts[0])) > 1


def test_a_far_position_is_as_quick_as_a_near_one(shards):
    plan = plan_of(shards)
    begin = time.perf_counter()
    visits = plan.visits(10**12, 1024)
    assert time.perf_counter() - begin < 0.5
    assert visits.position[-1] == 10**12 + 1023
    again = plan.visits(10**12 + 1000, 24)
    assert np.array_equal(visits.video[1000:], again.video)
    assert np.array_equal(visits.first_frame[1000:], again.first_frame)


def test_a_plan_can_be_made_from_folder_manifest_or_shards(shards):
    folder = shards.manifest.folder
    expected = plan_of(shards).batch(0, 20)
    for source in (folder, str(folder), folder / "manifest.json", read_manifest(folder)):
        assert Plan(source, 0, num_frames=FRAMES).batch(0, 20) == expected


def test_one_video_alone_is_visited_again_and_again(tmp_path):
    write_latents(tmp_path, ((2,),), tokens=1, channels=1)
    visits = plan_of(open_shards(tmp_path, "latents")).visits(0, 50)
    assert visits.video.tolist() == [0] * 50
    assert visits.num_frames.tolist() == [2] * 50


def test_an_unknown_order_is_refused(shards):
    with pytest.raises(UserError, match="'global' or 'lanes'"):
        Plan(shards, 0, order="sorted")


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    write_latents(folder, [(FRAMES,) * 13] * 24, tokens=1, channels=1)  # 312 visits
    return open_shards(folder, "latents")


def lanes_plan(shards, seed=0, lanes=8, window=7):
    return Plan(shards, seed, "lanes", FRAMES, 1, lanes, window)


def test_lanes_visit_nothing_twice_and_drop_another_tail_each_epoch(many_shards):
    plan = lanes_plan(many_shards, lanes=16)
    assert (plan.visits_per_lane, plan.visits_per_epoch) == (19, 304)  # 8 visits of 312 are left over
    dropped = []
    for epoch in range(4):
        videos = plan.visits(epoch * 304, 304).video
        assert len(set(videos.tolist())) == 304
        dropped.append(frozenset(range(312)) - frozenset(videos.tolist()))
    assert len(set(dropped)) == 4


def test_a_rank_reads_the_shards_of_its_own_lanes_one_after_the_other(many_shards):
    plan = lanes_plan(many_shards)
    size, world = 16, 4
    shares = [set() for _ in range(world)]
    in_one_batch = []
    for position in range(0, plan.visits_per_epoch - size, size):
        shards = many_shards.shard_of_video[plan.visits(position, size).video]
        in_one_batch.append(len(set(shards.tolist())))
        for rank in range(world):
            shares[rank] |= set(shards[rank * size // world : (rank + 1) * size // world].tolist())
    # 24 shards on 4 ranks: 6 each, and those cut by a border between lanes twice
    assert all(len(share) <= 8 for share in shares), [len(share) for share in shares]
    assert min(in_one_batch) >= 8  # every lane is elsewhere in the data
    # and what lies in one shard is not read in the order in which it lies there
    first_lane = [int(plan.visits(position, 8).video[0]) for position in range(0, 8 * plan.visits_per_lane, 8)]
    assert sum(b == a + 1 for a, b in itertools.pairwise(first_lane)) < len(first_lane) / 3


def test_positions_in_lanes_do_not_depend_on_the_batch_size(many_shards):
    plan = lanes_plan(many_shards)
    reference = {}
    for position in range(0, 800, 8):
        for visit in plan.batch(position, 8):
            reference[visit.position] = visit
    assert sorted(reference) == list(range(800))
    for size in (16, 32, 200):
        for position in range(0, 800, size):
            batch = plan.batch(position, size)
            assert all(reference[visit.position] == visit for visit in batch)
            assert [visit.position % 8 for visit in batch] == sorted(visit.position % 8 for visit in batch)


def test_lanes_change_with_seed_and_epoch_and_are_pure(many_shards):
    orders = {
        lanes_plan(many_shards, seed).visits(epoch * 312, 312).video.tobytes()
        for seed in (0, 1)
        for epoch in (3, 0, 2, 1)
    }
    assert len(orders) == 8
    begin = time.perf_counter()
    far = lanes_plan(many_shards).visits(10**11 - 10**11 % 8, 64)
    assert time.perf_counter() - begin < 0.5
    assert len(far.video) == 64


def test_too_few_clips_for_the_lanes_are_refused(shards):
    with pytest.raises(UserError, match=r"cannot fill data.lanes = 1000"):
        lanes_plan(shards, lanes=1000)


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_substitutes_are_pure_and_different(many_shards, order):
    plan = Plan(many_shards, 3, order, FRAMES, 1, 8, 7)
    where = places(16, 16, plan.lanes)
    found = [plan.substitute(where, attempt) for attempt in range(20)]
    assert len({visits.video.tobytes() for visits in found}) == 20
    again = plan.substitute(where, 7)
    assert all(np.array_equal(one, other) for one, other in zip(again, found[7], strict=True))
    assert np.array_equal(again.position, where.position)
    # one place alone gets what it gets among others
    alone = plan.substitute(type(where)(*(column[5:6] for column in where)), 7)
    assert alone.video[0] == again.video[5]
