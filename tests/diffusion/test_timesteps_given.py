"""Given frames on top of any distribution, what the loss counts, and that ranks agree on it."""

import itertools

import numpy as np
import pytest
import torch
from data_helpers import chi_square, write_latents

from ardiff.config import ConditioningConfig, DiffusionConfig, StaircaseConfig, load
from ardiff.data.clips import LatentClips
from ardiff.data.dataset import open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture, open_data
from ardiff.data.plan import Plan
from ardiff.data.stream import BatchStream
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.diffusion.timesteps import DISTRIBUTIONS, Timesteps
from ardiff.errors import UserError
from ardiff.models import DiT
from ardiff.randomness import Stream, hashed

COUNT = 8000


def conditioned(where, probability=1.0, max_frames=3, num_frames=4, lengths=None, **options):
    options = {"timesteps": "synchronous", **options}
    settings = DiffusionConfig(conditioning=ConditioningConfig(probability, max_frames, where), **options)
    distribution = Timesteps(settings, num_frames)
    draw = distribution.from_generator(COUNT, lengths=lengths)
    return draw, distribution.trained(draw, lengths)


def assert_frequencies(patterns, expected):
    """Rows of booleans [B, F] against {frames: probability}."""
    found, counts = patterns.unique(dim=0, return_counts=True)
    observed = {tuple(row.nonzero()[:, 0].tolist()): n for row, n in zip(found, counts.tolist(), strict=True)}
    assert observed.keys() == expected.keys()
    expectation = np.array(list(expected.values())) * len(patterns)
    assert chi_square(np.array([observed[key] for key in expected]), expectation) < 1


def test_a_prefix_has_any_length_up_to_its_limit():
    draw, trained = conditioned("prefix", probability=0.6)
    assert_frequencies(draw.given, {(): 0.4, (0,): 0.2, (0, 1): 0.2, (0, 1, 2): 0.2})
    assert torch.equal(trained, ~draw.given)


def test_ends_are_split_between_start_and_end():
    draw, _ = conditioned("ends", max_frames=2)
    assert_frequencies(draw.given, {(0,): 1 / 4, (3,): 1 / 4, (0, 1): 1 / 6, (0, 3): 1 / 6, (2, 3): 1 / 6})


def test_any_frames_are_all_alike():
    draw, _ = conditioned("anywhere", max_frames=3)
    expected = {}
    for count in (1, 2, 3):
        subsets = list(itertools.combinations(range(4), count))
        expected |= {subset: 1 / 3 / len(subsets) for subset in subsets}
    assert_frequencies(draw.given, expected)


@pytest.mark.parametrize("where", ["prefix", "ends", "anywhere"])
def test_a_short_clip_gives_less_than_it_has(where):
    lengths = torch.tensor([1, 2, 3, 4]).repeat(COUNT // 4)
    draw, trained = conditioned(where, lengths=lengths)
    frame = torch.arange(4)
    assert not (draw.given & (frame >= lengths[:, None])).any()
    assert trained.any(dim=1).all()
    assert torch.equal(trained.sum(dim=1) + draw.given.sum(dim=1), lengths)
    assert not draw.given[lengths == 1].any()
    if where == "ends":
        assert_frequencies(draw.given[lengths == 2], {(0,): 0.5, (1,): 0.5})


@pytest.mark.parametrize(("process", "clean"), [("ddpm", 1), ("rectified_flow", 0)])
@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "mixture"])
def test_given_frames_carry_the_label_of_finished_ones(name, process, clean):
    stairs = StaircaseConfig(num_steps=12, gap=3)
    draw, _ = conditioned("prefix", 0.5, timesteps=name, process=process, staircase=stairs)
    assert draw.given.any()
    assert (draw.timesteps[draw.given] == clean).all()


@pytest.mark.parametrize("name", ["fopp", "independent", "fvdm"])
def test_the_other_frames_keep_their_timesteps(name):
    settings = DiffusionConfig(timesteps=name)
    seeds = np.arange(500, dtype=np.uint64)
    plain = Timesteps(settings, 8).from_seeds(seeds)
    settings.conditioning = ConditioningConfig(0.7, 5)
    draw = Timesteps(settings, 8).from_seeds(seeds)
    assert 0.1 < draw.given.double().mean() < 0.5
    assert torch.equal(draw.timesteps[~draw.given], plain.timesteps[~draw.given])


def test_what_is_given_does_not_depend_on_the_noise():
    draw, _ = conditioned("prefix", 0.5)
    for count in range(4):
        chosen = draw.timesteps[draw.given.sum(dim=1) == count][:, -1].double()
        assert chi_square(torch.histc(chosen, 10, 0, 1000).numpy(), np.full(10, len(chosen) / 10)) < 1


@pytest.mark.parametrize("name", ["pavdm", "rolling", "ad_matched", "teacher_forced"])
@pytest.mark.parametrize("process", ["ddpm", "rectified_flow"])
def test_every_clip_trains_something(name, process):
    # an image among clips whose first frames are given, a short video in a row that finds all its frames finished
    stairs = StaircaseConfig(num_steps=12, gap=6, block=2, prefix=4, variable_length=0.5)
    settings = DiffusionConfig(process=process, timesteps=name, staircase=stairs)
    lengths = torch.arange(1, 13).repeat(400)
    distribution = Timesteps(settings, 12)
    draw = distribution.from_generator(len(lengths), lengths=lengths)
    trained = distribution.trained(draw, lengths)
    assert trained.any(dim=1).all()
    assert not (trained & draw.given).any()
    images = draw.timesteps[lengths == 1][:, 0].double()
    assert chi_square(torch.histc(images, 10, 0, 1000).numpy(), np.full(10, 40.0)) < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion.conditioning.max_frames=8"], "max_frames = 8 must lie between 1 and model.num_frames - 1 = 7"),
        (["diffusion.conditioning.max_frames=0"], "max_frames = 0"),
        (["diffusion.conditioning.where=ends"], "needs model.mask = bidirectional"),
        (["diffusion.conditioning.where=anywhere", "model.mask=block_causal"], "needs model.mask = bidirectional"),
        (["diffusion.conditioning.where=middle"], "must be one of prefix, ends, anywhere"),
        (["diffusion.conditioning.probability=1.1"], "probability = 1.1 must lie between 0 and 1"),
    ],
)
def test_impossible_conditioning_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        load("tiny", ["diffusion.conditioning.probability=0.5", *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion.timesteps=mixture"], "at least one weight above 0"),
        (["diffusion.mixture=[{timesteps: fopp}]"], "has a meaning only with diffusion.timesteps = mixture"),
        (["diffusion.timesteps=mixture", "diffusion.mixture=[{timesteps: fop}]"], "needs one of fopp"),
        (["diffusion.timesteps=mixture", "diffusion.mixture=[{timesteps: mixture}]"], "needs one of fopp"),
        (["diffusion.timesteps=mixture", "diffusion.mixture=[{timesteps: fopp, weight: -1}]"], "a weight >= 0"),
        (["diffusion.timesteps=fvdm", "diffusion.shared_probability=2"], "shared_probability = 2.0"),
        (["diffusion.timesteps=pavdm"], "is no multiple of the 8 chunks"),
        (
            ["diffusion.timesteps=ad_matched", "model.mask=block_causal", "model.block=2"],
            "must be multiples of model.block = 2",
        ),
    ],
)
def test_impossible_distributions_are_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        load("tiny", overrides)
    assert message in str(caught.value)


# Through the loader

FRAMES, TOKENS, GLOBAL = 4, 2, 16
CASES = {
    "prefix": ["diffusion.conditioning.probability=0.7", "diffusion.conditioning.max_frames=3"],
    "ends": [
        *("model.mask=bidirectional", "diffusion.conditioning.probability=0.7"),
        *("diffusion.conditioning.max_frames=2", "diffusion.conditioning.where=ends"),
    ],
    "ad_matched": ["diffusion.timesteps=ad_matched", "diffusion.staircase.variable_length=0.5"],
    "pavdm": [
        *("diffusion.timesteps=pavdm", "diffusion.process=rectified_flow", "diffusion.prediction=v"),
        *("diffusion.staircase.num_steps=6", "diffusion.staircase.prefix=1", "diffusion.staircase.variable_length=0.6"),
    ],
    "mixture": [
        "diffusion.timesteps=mixture",
        "diffusion.mixture=[{timesteps: fopp}, {timesteps: teacher_forced, weight: 2}]",
    ],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    write_latents(folder, tokens=TOKENS)
    return open_shards(folder, "latents")


def config_of(case):
    model = ["hidden_size=24", "depth=2", "num_heads=2", f"num_frames={FRAMES}", f"tokens_per_frame={TOKENS}"]
    return load("tiny", [*(f"model.{setting}" for setting in model), "train.seed=5", *CASES.get(case, [])])


def batches(shards, config, world, count=3, micro=2):
    """For every rank its share of the next batches."""
    mixture = Mixture([Plan(shards, config.train.seed, num_frames=FRAMES)], [1.0])
    clips = LatentClips(mixture, LatentSpace.of(shards.manifest, "unit"), config)
    ranks = []
    for rank in range(world):
        sizes = {"global_batch_size": GLOBAL, "micro_batch_size": micro, "rank": rank, "world_size": world}
        stream = BatchStream(mixture, clips, **sizes)
        ranks.append([next(stream) for _ in range(count)])
        stream.close()
    return ranks


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_divide_by_the_same_count(shards, case):
    config = config_of(case)
    alone = batches(shards, config, 1, micro=GLOBAL)[0]
    real = [int((batch.micro_batches[0]["latents"] != 0).any(-1).any(-1).sum()) for batch in alone]
    assert all(batch.num_frames < count for batch, count in zip(alone, real, strict=True))
    for world in (1, 2, 4):
        ranks = batches(shards, config, world)
        for number, shares in enumerate(zip(*ranks, strict=True)):
            pieces = [piece for share in shares for piece in share.micro_batches]
            for name, expected in alone[number].micro_batches[0].items():
                together = torch.cat([piece[name] for piece in pieces])
                assert together.dtype == expected.dtype
                assert together.numpy().tobytes() == expected.numpy().tobytes(), name
            counted = sum(int(piece["mask"].sum()) for piece in pieces)
            assert {share.num_frames for share in shares} == {counted}


@pytest.mark.parametrize("case", ["plain", *CASES])
def test_a_batch_says_which_frames_are_given_and_how_long_windows_are(shards, case):
    config = config_of(case)
    mixture = Mixture([Plan(shards, config.train.seed, num_frames=FRAMES)], [1.0])
    visits = mixture.visits(0, 64)
    tensors = LatentClips(mixture, LatentSpace.of(shards.manifest, "unit"), config)(visits).tensors
    draw = Timesteps(config.diffusion, FRAMES).from_seeds(
        hashed(5, Stream.TIMESTEPS, visits.position), visits.num_frames
    )
    real = torch.arange(FRAMES) < torch.from_numpy(visits.num_frames)[:, None]
    inside = torch.arange(FRAMES) < draw.window[:, None]
    assert torch.equal(tensors["timesteps"], draw.timesteps)
    assert torch.equal(tensors["mask"], real & inside & ~draw.given)
    assert ("given" in tensors) == draw.given.any() == (case != "plain")
    assert ("window" in tensors) == (~inside).any() == (case in ("ad_matched", "pavdm"))
    for name, values in (("given", draw.given), ("window", draw.window)):
        if name in tensors:
            assert torch.equal(tensors[name], values)


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_number_of_ranks(shards, case):
    config = config_of(case)
    torch.manual_seed(3)
    objective = DiffusionObjective(DiT(config.model), config)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    results = []
    for world in (1, 2, 4):
        objective.zero_grad()
        # micro-batches in the order of the global batch: summed in one order, the gradients are equal to the bit
        for share in batches(shards, config, world, count=1):
            for piece in share[0].micro_batches:
                scale = share[0].num_frames * objective.elements_per_frame
                (objective(piece)["loss"][0] / scale).backward()
        results.append([parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None])
    assert any(gradient.abs().max() > 0 for gradient in results[0])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_images_are_mixed_with_videos_by_weight(tmp_path):
    write_latents(tmp_path / "videos", ((9, 8, 12, 20), (16, 7)), tokens=TOKENS)
    write_latents(tmp_path / "images", ((1,) * 30, (1,) * 20), tokens=TOKENS)
    config = load(
        "tiny",
        [
            f"data.mixture=[{{shards: {tmp_path}/videos, weight: 0.75}}, {{shards: {tmp_path}/images, weight: 0.25}}]",
            *("model.hidden_size=24", "model.depth=2", "model.num_heads=2", "train.global_batch_size=8"),
            *(f"model.num_frames={FRAMES}", f"model.tokens_per_frame={TOKENS}"),
            *("diffusion.conditioning.probability=0.5", "diffusion.conditioning.max_frames=2"),
        ],
    )
    data = open_data(config, "latents", FRAMES)
    data.check(8, 1)
    clips = LatentClips(data, LatentSpace.of(data.manifest, "unit"), config)
    stream = BatchStream(data, clips, global_batch_size=8, micro_batch_size=4)
    objective = DiffusionObjective(DiT(config.model), config)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    for batch in (next(stream) for _ in range(5)):
        together = {name: torch.cat([part[name] for part in batch.micro_batches]) for name in batch.micro_batches[0]}
        frames = (together["latents"] != 0).any(-1).any(-1).sum(dim=1)
        images = frames == 1
        assert images.sum() == 2  # a quarter of every batch
        assert torch.equal(together["mask"][images], (torch.arange(FRAMES) == 0).expand(2, FRAMES))
        for part in batch.micro_batches:
            total, _ = objective(part)["loss"]
            (total / batch.num_frames / objective.elements_per_frame).backward()
            padding = ~(part["latents"] != 0).any(-1).any(-1)
            changed = {**part, "latents": part["latents"] + 7 * padding[:, :, None, None]}
            assert torch.equal(objective(changed)["loss"][0], total)  # no real frame reads the padding
        optimizer.step()
        optimizer.zero_grad()
    stream.close()
    assert any(not torch.equal(one, two) for one, two in zip(before, objective.parameters(), strict=True))
