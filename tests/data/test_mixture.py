import numpy as np
import pytest
from data_helpers import all_latents, latents_of, write_latents

from ardiff.config import load
from ardiff.data.dataset import open_shards
from ardiff.data.mixture import Mixture, _turns, open_data
from ardiff.data.plan import Plan
from ardiff.data.shards import MANIFEST, read_manifest, write_manifest
from ardiff.errors import UserError

FRAMES = 4
SIZES = (((8,) * 10,), ((4,) * 7, (4,) * 6), ((40,),))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("mixture")
    for number, lengths in enumerate(SIZES):
        write_latents(base / str(number), lengths)
    return [base / str(number) for number in range(len(SIZES))]


def mixture_of(folders, weights, order="global", lanes=4, seed=0):
    sets = [open_shards(folder, "latents") for folder in folders]
    return Mixture([Plan(part, seed, order, FRAMES, 1, lanes, 3) for part in sets], weights)


def sets_of(mixture, visits):
    return np.array([mixture.sets.index(mixture.set_of(int(video))[0]) for video in visits.video])


@pytest.mark.parametrize("order", ["global", "lanes"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (6, 3, 1), (0.05, 0.9, 0.05), (0, 2, 1), (1, 0, 0), (0, 0, 5)])
def test_every_stretch_holds_its_share_of_every_set(folders, weights, order):
    mixture = mixture_of(folders, weights, order)
    share = np.array(weights) / sum(weights)
    number = sets_of(mixture, mixture.visits(0, 2000))
    if order == "lanes":  # back to the order of positions
        number = number[np.argsort(mixture.visits(0, 2000).position)]
    for start, end in ((0, 40), (400, 440), (1000, 1400), (0, 2000)):
        counts = np.bincount(number[start:end], minlength=3)
        assert (abs(counts - share * (end - start)) <= (3 if order == "global" else 5)).all(), (start, counts)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 1, 1), (3, 1, 1), (6, 3, 1), (0.5, 0.3, 0.15, 0.05)])
def test_in_many_lanes_every_batch_holds_its_shares(weights):
    lanes = np.arange(256)
    for turn in range(300):
        number, _ = _turns(np.full(256, turn), lanes, weights)
        counts = np.bincount(number, minlength=len(weights))
        assert (abs(counts - 256 * np.array(weights) / sum(weights)) <= 8).all(), (turn, counts)


def test_every_set_keeps_its_own_order_and_loses_nothing(folders):
    mixture = mixture_of(folders, (5, 3, 2))
    visits = mixture.visits(0, 1000)
    number = sets_of(mixture, visits)
    first_video = 0
    for each, plan in enumerate(mixture.plans):
        own = visits.video[number == each] - first_video
        assert np.array_equal(own, plan.visits(0, len(own)).video)
        first_video += len(plan.shards)


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_any_position_is_found_at_once(folders, order):
    mixture = mixture_of(folders, (5, 3, 2), order)
    whole = mixture.visits(0, 1200)
    for position in (4, 400, 1000):
        part = mixture_of(folders, (5, 3, 2), order).visits(position, 40)
        rows = [int(np.flatnonzero(whole.position == place)[0]) for place in part.position]
        for one, other in zip(part, whole, strict=True):
            assert np.array_equal(one, other[rows])
    far = mixture.visits(4 * 10**10, 40)
    counts = np.bincount(sets_of(mixture, far), minlength=3)
    assert (abs(counts - np.array([20, 12, 8])) <= 2 * mixture.lanes).all()


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_weights_may_change_and_every_set_goes_on_where_it_was(folders, order):
    run = mixture_of(folders, (1, 1, 2), order)
    before = run.visits(0, 200)
    changed = mixture_of(folders, (8, 1, 1), order)
    assert changed.continue_with([list(change) for change in run.history], 200)
    assert [list(change) for change in changed.history] == [[0, [1.0, 1.0, 2.0]], [200, [8.0, 1.0, 1.0]]]
    after = changed.visits(200, 400)
    assert all(np.array_equal(a, b) for a, b in zip(changed.visits(0, 200), before, strict=True))
    assert (abs(np.bincount(sets_of(changed, after), minlength=3) - [320, 40, 40]) <= 2 * changed.lanes).all()
    for each, plan in enumerate(changed.plans):
        # together the two stretches are what the set's own plan says, lane by lane
        own = []
        for visits in (before, after):
            rows = np.flatnonzero(sets_of(changed, visits) == each)
            own += sorted((int(visits.position[row]) % changed.lanes, int(visits.position[row]), row) for row in rows)
        for lane in range(changed.lanes):
            count = sum(place[0] == lane for place in own)
            expected = plan.visits(0, count * changed.lanes).video.reshape(changed.lanes, -1)[lane]
            found = []
            for visits in (before, after):
                chosen = (sets_of(changed, visits) == each) & (visits.position % changed.lanes == lane)
                order_of_positions = np.argsort(visits.position[chosen])
                found += visits.video[chosen][order_of_positions].tolist()
            first_video = sum(len(part) for part in changed.sets[:each])
            assert [video - first_video for video in found] == expected.tolist()


def test_the_same_weights_in_other_words_are_no_change(folders):
    mixture = mixture_of(folders, (2, 2, 4))
    assert not mixture.continue_with([[0, [1.0, 1.0, 2.0]]], 300)
    assert len(mixture.history) == 1


def test_changes_after_the_checkpoint_never_happened(folders):
    mixture = mixture_of(folders, (1, 1, 1))
    assert mixture.continue_with([[0, [1, 1, 1]], [100, [1, 0, 0]], [500, [0, 1, 0]]], 300)
    assert [change.position for change in mixture.history] == [0, 100, 300]


def test_clips_come_from_the_right_set(folders):
    mixture = mixture_of(folders, (1, 1, 1))
    visits = mixture.visits(0, 64)
    clips = np.zeros((64, FRAMES, 2, 4), np.float16)
    failed = mixture.read_clips(clips, *visits[:2], visits.num_frames, 1, np.zeros(64, bool))
    assert failed == []
    for row in range(64):
        part, local = mixture.set_of(int(visits.video[row]))
        lengths = SIZES[mixture.sets.index(part)]
        first = visits.first_frame[row]
        assert np.array_equal(clips[row], all_latents(lengths)[local][first : first + FRAMES])


def rewrite(folder, classes=None, **details):
    manifest = read_manifest(folder)
    manifest.details.update(details)
    write_manifest(folder, manifest.kind, manifest.shards, classes or manifest.classes, manifest.details)


def test_classes_are_joined_by_name(tmp_path):
    for name in ("a", "b"):
        write_latents(tmp_path / name, ((8,) * 4,))
    rewrite(tmp_path / "b", classes=["wave", "swim", "run"])
    mixture = mixture_of([tmp_path / "a", tmp_path / "b"], (1, 1))
    assert mixture.classes == ["run", "sit", "wave", "swim"]
    assert mixture.labels.tolist() == [0, 1, 2, -1, 2, 3, 0, -1]


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"arvae": {"id": "f" * 16, "path": "x"}}, "of AR-VAE 0000000000000000, .* of ffffffffffffffff"),
        ({"tokens": 4, "channels": 2, "mean": [0.0] * 2, "std": [1.0] * 2}, "has tokens 2, .* has 4"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path, details, reason):
    for name in ("a", "b"):
        write_latents(tmp_path / name, ((8,) * 4,))
    rewrite(tmp_path / "b", **details)
    with pytest.raises(UserError, match=reason):
        mixture_of([tmp_path / "a", tmp_path / "b"], (1, 1))


def test_statistics_are_those_of_all_sets_together(folders):
    mixture = mixture_of(folders[:2], (1, 1))
    values = [latents_of(video, length, 2, 4) for video, length in enumerate((8,) * 10)]
    values += [latents_of(video, length, 2, 4) for video, length in enumerate((4,) * 13)]
    flat = np.concatenate(values).astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(mixture.manifest.details["mean"], flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(mixture.manifest.details["std"], flat.std(0), rtol=1e-12)


def config_of(*overrides):
    return load("tiny", ["model.num_frames=4", "model.tokens_per_frame=2", *overrides])


def test_sets_of_one_size_do_not_go_in_step(tmp_path):
    for name in ("a", "b"):
        write_latents(tmp_path / name, ((8,) * 10,))
    listed = f"[{{shards: {tmp_path / 'a'}}}, {{shards: {tmp_path / 'b'}}}]"
    data = open_data(config_of("--data.mixture", listed), "latents", FRAMES)
    one, other = (plan.visits(0, 40).video for plan in data.plans)
    assert (one == other).mean() < 0.5


def test_a_history_from_before_mixtures_is_no_change(folders):
    mixture = mixture_of(folders, (1, 2, 3))
    assert not mixture.continue_with([], 100)
    assert mixture.history == [(0, [1.0, 2.0, 3.0])]


def test_weights_changed_twice_at_one_place_leave_one_change(folders):
    mixture = mixture_of(folders, (1, 2, 3))
    assert mixture.continue_with([[0, [1, 1, 1]], [100, [5, 1, 1]]], 100)
    assert mixture.history == [(0, [1.0, 1.0, 1.0]), (100, [1.0, 2.0, 3.0])]


def test_one_set_or_several_from_the_configuration(folders):
    alone = open_data(config_of(f"data.shards={folders[0]}"), "latents", FRAMES)
    assert len(alone) == 10
    assert alone.identity == open_shards(folders[0], "latents").identity
    listed = f"[{{shards: {folders[0]}, weight: 3}}, {{shards: {folders[1]}}}]"
    both = open_data(config_of("--data.mixture", listed), "latents", FRAMES)
    assert len(both) == 23
    assert both.history == [(0, [3.0, 1.0])]
    assert both.identity not in {part.identity for part in both.sets}


def test_a_shard_that_is_named_twice_is_refused(folders):
    pattern = f"{folders[0]}/latents-{{000000,000000}}.tar"
    with pytest.raises(UserError, match=r"names latents-000000\.tar 2 times; use data\.mixture"):
        open_data(config_of(f"data.shards={pattern}"), "latents", FRAMES)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.shards=x", "--data.mixture", "[{shards: y}]"], "data.shards and data.mixture: give one"),
        (["--data.mixture", "[{shards: y, weight: -1}]"], "weight >= 0"),
        (["--data.mixture", "[{weight: 1}]"], "needs shards"),
        (["--data.mixture", "[{shards: y}, {shards: z, weight: 1e-6}]"], "of data set 2 is below 1e-4 of all"),
        (["--data.mixture", "[{shards: y, weight: 0}]"], "at least one weight"),
    ],
)
def test_impossible_mixtures_are_refused_by_the_configuration(overrides, reason):
    with pytest.raises(UserError, match=reason):
        config_of(*overrides)


def test_hopeless_settings_are_refused_with_the_arithmetic(folders):
    mixture = mixture_of(folders, (1, 1, 1))
    assert mixture.visits_per_epoch == 20 + 13 + 10
    mixture.check(30, 1)
    with pytest.raises(UserError, match=r"gives 10 clips per epoch, fewer than its share of a batch, 0.8 x 16"):
        mixture_of(folders, (1, 1, 8)).check(16, 1)
    mixture_of(folders, (1, 1, 0)).check(16, 1)
    with pytest.raises(UserError, match=r"24 videos give 43 clips per epoch, fewer than train.global_batch_size = 44"):
        mixture.check(44, 1)
    lanes = mixture_of(folders, (1, 1, 1), "lanes")
    lanes.check(8, 2)
    with pytest.raises(UserError, match=r"global_batch_size = 6 must be a multiple of data.lanes = 4"):
        lanes.check(6, 2)
    with pytest.raises(UserError, match=r"the 3 ranks one of 1, 2, 4"):
        lanes.check(12, 3)


def test_flips_and_text_must_be_there(folders):
    with pytest.raises(UserError, match=r"no latents of mirrored frames; extract them .* --flip"):
        open_data(config_of(f"data.shards={folders[0]}", "data.flip_probability=0.5"), "latents", FRAMES)
    with pytest.raises(UserError, match=r"model.context_dim = 8, but .* has no text features"):
        open_data(config_of(f"data.shards={folders[0]}", "model.context_dim=8"), "latents", FRAMES)
    assert (folders[0] / MANIFEST).is_file()
