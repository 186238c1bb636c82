"""The command line of launch/profile_throughput.py: mistakes are told in one line before anything starts."""

import sys

import pytest

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.monitor.throughput import dit_flops
from ardiff.profiling.synthetic import TEXT_TOKENS, write_latents
from launch import profile_throughput
from launch.train import build_job


def prepare(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["profile", "--config", "tiny", *(["--out", str(out)] if out else []), *words])
    monkeypatch.setenv("WORLD_SIZE", "1")
    return profile_throughput._prepare(profile_throughput._parser())


def test_options_become_a_plan(monkeypatch, tmp_path):
    words = ("--micro_batches", "4,2", "--checkpointing", "on", "--gpus", "8..32", "--steps", "3", "--train.seed", "7")
    config, ds_settings, plan = prepare(monkeypatch, tmp_path / "new" / "out", *words)
    assert plan.sizes == [2, 4] and plan.checkpointing == (True,) and plan.gpus == (8, 16, 32) and plan.steps == 3
    assert config.train.seed == 7 and ds_settings["zero_optimization"]["stage"] == 2
    assert prepare(monkeypatch, tmp_path)[2].sizes is None
    _, _, plan = prepare(monkeypatch, tmp_path, "--micro_batches", "none", "--checkpointing", "configured")
    assert plan.sizes == [] and plan.checkpointing == (False,) and plan.ranks_per_node is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--gpus", "512..8"], r"--gpus 512\.\.8: must be whole numbers above 0, as in 8\.\.512"),
        (["--micro_batches", "4,no"], "--micro_batches 4,no: must be whole numbers"),
        (["--micro_batches", "0"], "must be whole numbers above 0"),
        (["--gpus_per_node", "0"], "--gpus_per_node 0: must be at least 1"),
        (["--peak_tflops", "-3"], "--peak_tflops -3.0: must be above 0"),
        (["--checkpointing", "maybe"], "must be one of both, on, off, configured"),
        (["--train.micro_batch_size", "3"], "train.global_batch_size = 8 is no multiple"),
        (["--ds_config", "nowhere.json"], "no such file"),
    ],
)
def test_mistakes(monkeypatch, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        prepare(monkeypatch, tmp_path, *words)


def test_out_is_needed(monkeypatch):
    with pytest.raises(UserError, match="missing --out"):
        prepare(monkeypatch, None)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.num_classes=3", "data.flip_probability=0.5", "data.stride=3"],
        ["model.context_dim=8"],
    ],
)
def test_synthetic_latents_are_what_training_reads(tmp_path, settings):
    config = load("tiny", [*settings, f"data.shards={tmp_path}", "train.sample_every=0", "train.validate_every=0"])
    write_latents(tmp_path, config)
    feed = build_job(config).feeds[0]
    tensors = feed.collate(feed.data.visits(0, 4)).tensors
    model = config.model
    assert tensors["latents"].shape == (4, model.num_frames, model.tokens_per_frame, model.in_channels)
    assert tensors["mask"].all() and tensors["latents"].std() > 0
    if model.num_classes:
        assert set(tensors["label"].tolist()) <= {0, 1, 2, 3}
    context = TEXT_TOKENS if model.context_dim else 0
    assert feed.flops_per_clip == dit_flops(model, num_context=context)
    if model.context_dim:
        assert feed.flops_per_clip > dit_flops(model) and tensors["context"].shape == (4, TEXT_TOKENS, 8)
