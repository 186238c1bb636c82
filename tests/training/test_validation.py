"""Validation of the DiT: a fixed set of clips, shared by ranks, whatever the run; and what is refused."""

import dataclasses
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import all_latents, class_of, randomize, write_latents

from ardiff.config import load
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import open_data
from ardiff.diffusion.objective import DECILES, DiffusionObjective
from ardiff.errors import UserError
from ardiff.models import DiT
from ardiff.randomness import Stream, normals
from ardiff.training.evaluation import Share, attempt, combine, measure
from ardiff.training.stop import Interrupted
from ardiff.training.validation import SEED, HeldOutClips, HeldOutLoss, open_held_out, stratified
from launch.train import build_job

FRAMES = 4
TRAINED = ((9, 30, 4), (17, 2, 40))
HELD_OUT = ((11, 6), (3, 21, 8))  # of other lengths, so no video is one of the trained
SMALL = ("model.hidden_size=24", "model.depth=2", "model.num_heads=2", "model.tokens_per_frame=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Latents with held-out ones beside them, as extract_latents writes them."""
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, TRAINED)
    write_latents(folder / "validation", HELD_OUT)
    return folder


def configured(folder, *overrides):
    own = (f"model.num_frames={FRAMES}", f"data.shards={folder}", "train.validation_frames=56", *SMALL)
    return load("tiny", [*own, *overrides])


def objective_of(config):
    torch.manual_seed(1)
    return randomize(DiffusionObjective(DiT(config.model), config)).eval()


def held_out(config, source="validation"):
    data = dataclasses.replace(config.data, shards=str(Path(config.data.shards) / source), flip_probability=0.0)
    space = LatentSpace.of(open_data(config, "latents", FRAMES).manifest, config.data.normalize)
    return HeldOutClips(open_data(dataclasses.replace(config, data=data), "latents", FRAMES), space, config)


@torch.no_grad()
def figures(config, world_size=1, objective=None, source="validation"):
    loss = HeldOutLoss(held_out(config, source), config.train.micro_batch_size)
    objective = objective or objective_of(config)
    parts = [pickle.loads(pickle.dumps(loss.measure(objective, rank, world_size))) for rank in range(world_size)]
    return loss.combine(parts)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_number_of_ranks_changes_no_bit(folder, world_size):
    config = configured(folder)  # 14 clips in 4 micro-batches: rank 6 of 7 has none
    alone, shared = figures(config), figures(config, world_size)
    assert alone == shared
    assert set(alone) == {"validation_loss", "validation_loss_by_decile", "validation_loss_by_frame"}
    assert len(alone["validation_loss_by_decile"]) == DECILES and len(alone["validation_loss_by_frame"]) == FRAMES


def test_another_micro_batch_changes_rounding_only(folder):
    one, other = (figures(configured(folder, f"train.micro_batch_size={size}")) for size in (1, 8))
    assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-6)
    assert one["validation_loss_by_frame"] == pytest.approx(other["validation_loss_by_frame"], rel=1e-6)


def test_the_run_changes_nothing_but_the_videos_do(folder):
    config = configured(folder)
    other_run = (
        "train.seed=7",
        "train.label_dropout=1",
        "data.order=lanes",
        "data.lanes=2",
        "train.phases=[{steps: 3, lr: 1}]",
    )
    assert figures(config) == figures(configured(folder, *other_run))
    assert figures(config) == figures(config)  # nothing is used up
    assert figures(config) != figures(config, source=".")


def test_every_rank_reads_the_same_clips_again_and_again(folder):
    clips = held_out(configured(folder))
    whole = clips(clips.visits).tensors
    part = clips(type(clips.visits)(*(column[5:9] for column in clips.visits))).tensors
    for name, tensor in whole.items():
        assert torch.equal(tensor[5:9], part[name]), name


def test_the_loss_of_one_clip_by_hand(folder):
    config = configured(folder, f"train.validation_frames={FRAMES}")
    objective = objective_of(config)
    clips = held_out(config)
    assert len(clips) == 1
    # The middle one of 5 videos has 3 frames: all of them, and one that is masked.
    x0 = all_latents(HELD_OUT)[2].astype(np.float32)
    x0 /= np.linalg.norm(x0, axis=-1, keepdims=True)
    noise = normals(SEED, Stream.NOISE, 0, (FRAMES, 2, 4))
    u = stratified(SEED, 1, clips.timesteps.width)
    t = clips.timesteps.from_uniforms(u, np.array([3])).timesteps
    alpha = objective.schedule.alphas_cumprod[t[0]].numpy()[:, None, None]
    padded = np.concatenate([x0, np.zeros((1, 2, 4), np.float32)])
    x_t = torch.from_numpy((alpha**0.5 * padded + (1 - alpha) ** 0.5 * noise).astype(np.float32))
    with torch.no_grad():
        output = objective.network(x_t[None], t)[0, :3].numpy()
    errors = ((output - x0) ** 2).mean(axis=(1, 2))
    found = figures(config, objective=objective)
    assert found["validation_loss"] == pytest.approx(errors.mean(), rel=1e-4)
    assert found["validation_loss_by_frame"][:3] == pytest.approx(errors.tolist(), rel=1e-4)
    assert found["validation_loss_by_frame"][3] is None
    deciles = [errors[(t[0, :3] // 100 == decile).numpy()] for decile in range(DECILES)]
    expected = [part.mean() if len(part) else None for part in deciles]
    assert [value is None for value in expected] == [value is None for value in found["validation_loss_by_decile"]]
    known = [(a, b) for a, b in zip(expected, found["validation_loss_by_decile"], strict=True) if a is not None]
    assert [b for _, b in known] == pytest.approx([a for a, _ in known], rel=1e-4)


def test_every_video_is_used_before_any_is_used_again(folder):
    lengths = [length for part in HELD_OUT for length in part]
    for count in (1, 2, 3, 5, 7, 10, 23):
        clips = held_out(configured(folder, f"train.validation_frames={count * FRAMES + 1}"))
        uses = np.bincount(clips.visits.video, minlength=5)
        assert len(clips) == count == uses.sum() and uses.max() - uses.min() <= 1
        for video, first, _, frames in zip(*clips.visits, strict=True):
            assert first >= 0 and first + frames <= lengths[video] and frames == min(FRAMES, lengths[video])
        assert clips.num_videos == min(5, count)
    five = held_out(configured(folder, "train.validation_frames=20")).visits
    assert five.first_frame.tolist() == [4, 1, 0, 9, 2]  # the middle of each
    ten = held_out(configured(folder, "train.validation_frames=40")).visits
    starts = ten.first_frame[ten.video == 3]
    assert starts.tolist() == [18 // 4, 3 * 18 // 4]  # two stretches, evenly


def test_stratified_numbers_are_one_in_each_part():
    numbers = stratified(SEED, 37, 9)
    assert numbers.min() >= 0 and numbers.max() < 1
    cells = np.sort((numbers * 37).astype(int), axis=0)
    assert (cells == np.arange(37)[:, None]).all()
    correlation = np.corrcoef(numbers.T) - np.eye(9)
    assert np.abs(correlation).max() < 0.6  # columns are paired at random


@pytest.mark.parametrize("timesteps", ["fopp", "independent", "synchronous", "uniform_monotone", "fvdm"])
def test_every_decile_has_its_share(folder, timesteps):
    overrides = (f"diffusion.timesteps={timesteps}", "train.validation_frames=160")
    clips = held_out(configured(folder, *overrides))
    times = clips(clips.visits).tensors["timesteps"]
    shares = np.bincount(times.flatten() // 100, minlength=DECILES) / times.numel()
    # A uniform frame of non-decreasing ones is exactly uniform; 40 clips of 4 frames leave no decile short.
    assert shares.min() >= 0.05 and shares.max() <= 0.16, shares
    if timesteps == "fopp":  # the timestep of the frame that the others follow
        anchors = stratified(SEED, 40, clips.timesteps.width)[:, 1]
        assert (np.bincount((anchors * DECILES).astype(int), minlength=DECILES) == 4).all()


def test_labels_are_kept_and_numbered_as_in_training(folder, tmp_path):
    for source in (folder, folder / "validation"):
        shutil.copytree(source, tmp_path / "set" / source.name, ignore=shutil.ignore_patterns("validation"))
    training, other = tmp_path / "set" / folder.name, tmp_path / "set" / "validation"
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["classes"] = ["wave", "run", "sit"]  # the training data have run, sit, wave
    (other / "manifest.json").write_text(json.dumps(manifest))
    named = (f"data.validation={other}", "model.num_classes=3", "train.label_dropout=1", "train.validate_every=5")
    job = build_job(configured(training, *named, "train.validation_frames=20"))
    clips = job.validate.clips
    own = {"wave": 2, "run": 0, "sit": 1}
    expected = [3 if class_of(video) is None else own[manifest["classes"][class_of(video)]] for video in range(5)]
    assert clips(clips.visits).tensors["label"].tolist() == expected


def test_videos_shorter_than_a_clip_are_left_out_where_padding_would_be_read(folder):
    clips = held_out(configured(folder, "model.mask=bidirectional"))
    assert clips.num_left_out == 1 and 2 not in clips.visits.video
    assert (clips.visits.num_frames == FRAMES).all()
    with pytest.raises(UserError, match=r"no video of .* is as long as a clip \(61 frames\)"):
        held_out(configured(folder, "model.mask=bidirectional", "data.stride=20"))


def test_networks_in_bf16_are_measured(folder):
    config = configured(folder)
    full = figures(config)
    half = figures(config, objective=objective_of(config).to(torch.bfloat16))
    assert half["validation_loss"] == pytest.approx(full["validation_loss"], rel=0.05)


def test_a_rank_that_cannot_read_raises_and_a_bad_clip_is_replaced(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "set")
    config = configured(tmp_path / "set")
    loss = HeldOutLoss(held_out(config), 4)
    objective = objective_of(config)
    shard = tmp_path / "set" / "validation" / "latents-000000.tar"
    shard.write_bytes(b"")  # after it was found complete
    with caplog.at_level(logging.ERROR, "ardiff"):
        found = loss.combine([loss.measure(objective, 0, 1)])
    assert found["validation_loss"] > 0 and "latents-000000.tar" in caplog.text and "replaced" in caplog.text
    (shard.parent / "latents-000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="samples in a row cannot be used"):
        loss.measure(objective, 1, 2)


class Alone:
    """A validation that rank 0 makes by itself, as that of the AR-VAE."""

    def combine(self, parts):
        return parts[0]


def test_a_failing_rank_leaves_the_run_without_figures(folder, caplog):
    loss = HeldOutLoss(held_out(configured(folder)), 4)
    objective = objective_of(configured(folder))

    def share(validate, objective, rank):
        return attempt(lambda: measure(validate, objective, rank, 3), "validation", 5)

    shares = [share(loss, objective, rank) for rank in range(3)]
    assert all(share.problem is None for share in shares)
    assert combine(loss, shares, 5).keys() == figures(configured(folder)).keys()
    assert caplog.text == ""
    assert combine(Alone(), [Share({"psnr": 20.0}), Share(None)], 5) == {"psnr": 20.0}  # rank 1 has nothing to find
    broken = objective_of(configured(folder))
    broken.network.forward = None  # as a rank whose device fails
    shares[1] = share(loss, broken, 1)
    assert shares[1].found is None and "TypeError" in shares[1].problem
    assert combine(loss, shares, 5) == {} and "no validation at step 5: rank 1: TypeError" in caplog.text
    assert "no held-out data here" in share(None, objective, 2).problem
    caplog.clear()
    assert combine(loss, [Share({}, None)], 5) == {}  # what cannot be combined ends no run either
    assert "no validation at step 5" in caplog.text and "AssertionError" in caplog.text


def test_a_stop_is_no_failure(folder, caplog):
    def stop(*_):
        raise Interrupted

    loss, objective = HeldOutLoss(held_out(configured(folder)), 4), objective_of(configured(folder))
    objective.register_forward_pre_hook(stop)
    with caplog.at_level(logging.WARNING, "ardiff"):
        share = attempt(lambda: measure(loss, objective, 0, 1), "validation", 5)
    assert share.stopped and share.problem is None
    assert caplog.messages == ["no validation at step 5: the run was asked to stop"]
    assert combine(loss, [Share({}, None), share], 5) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_launch_with_held_out_latents(folder):
    job = build_job(configured(folder, "train.validate_every=5"))
    assert job.validate is not None and job.validate.identity == held_out(configured(folder)).data.identity
    assert job.notes[-1] == f"validation: {folder}/validation, 14 clips of 5 videos, every 5 steps"
    named = build_job(configured(folder, "train.validate_every=5", f"data.validation={folder}/validation"))
    assert named.validate.identity == job.validate.identity


def test_a_launch_without(folder, tmp_path):
    job = build_job(configured(folder, "train.validate_every=0"))
    assert job.validate is None and job.notes[-1] == "validation: never (train.validate_every = 0)"
    write_latents(tmp_path, TRAINED)
    job = build_job(configured(tmp_path, "train.validate_every=5"))
    assert job.validate is None and "none (no held-out latents" in job.notes[-1]


def test_what_is_trained_on_is_no_held_out_data(folder, tmp_path, caplog):
    for source in (folder, f"{folder}/latents-000001.tar"):  # all of it, or some of its shards
        with pytest.raises(UserError, match=r"data\.validation = .* is what is trained on"):
            build_job(configured(folder, f"data.validation={source}"))
    some = ((9, 6), (3, 21))  # its first video is the first of the training data
    write_latents(tmp_path, some)
    with caplog.at_level(logging.WARNING, "ardiff"):
        build_job(configured(folder, f"data.validation={tmp_path}", "train.validate_every=1"))
    assert "1 of 4 held-out videos have the latents of one that is trained on" in caplog.text


def changed(folder, tmp_path, **details):
    """A copy of the held-out latents whose manifest says something else."""
    shutil.copytree(folder / "validation", tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({**manifest, **details}))
    return tmp_path / "other"


def test_latents_that_do_not_fit_are_refused(folder, tmp_path):
    def refused(source, message, *overrides):
        with pytest.raises(UserError, match=message) as caught:
            build_job(configured(folder, f"data.validation={source}", *overrides))
        assert "\n" not in str(caught.value) and "data.validation" in str(caught.value)

    refused("/nope", r"^--data\.validation: /nope: no such folder")
    refused("/nope-*.tar", r"^--data\.validation: /nope-\*\.tar: no file matches")
    write_latents(tmp_path / "wide", HELD_OUT, tokens=3)
    refused(tmp_path / "wide", r"latents of 3 tokens x 4 channels, but model\.tokens_per_frame")
    refused(changed(folder, tmp_path / "a", arvae={"id": "f" * 16, "path": "x"}), r"of AR-VAE f{16}, .* of 0{16}")
    classes = changed(folder, tmp_path / "b", classes=["run", "sit", "swim"])
    refused(classes, r"has the class 'swim'", "model.num_classes=3")


def test_other_rates_are_told(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ardiff"):
        build_job(configured(folder, f"data.validation={changed(folder, tmp_path, stride=2)}"))
    assert "frames were taken at another rate" in caplog.text


def test_settings_of_the_training_data_do_not_bind_held_out_ones(folder):
    """Mirrored latents are needed of what is trained on only; and a mixture has no folder beside it."""
    config = configured(folder)
    trained = open_data(config, "latents", FRAMES)
    mirrored = dataclasses.replace(config, data=dataclasses.replace(config.data, flip_probability=0.5))
    opened = open_held_out(mirrored, trained, lambda other: open_data(other, "latents", FRAMES))
    assert opened is not None and len(opened) == 5
    mixed = load("tiny", [f"data.mixture=[{{shards: {folder}, weight: 1}}]", *SMALL])
    assert open_held_out(mixed, trained, lambda other: open_data(other, "latents", FRAMES)) is None
