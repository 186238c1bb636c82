"""What the engine derives from settings; its numerics are in tests/end_to_end."""

import json

import pytest
import torch

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.training.adamw import parameter_groups
from ardiff.training.engine import accumulation_steps, learning_rate, read_ds_config


def test_learning_rate_phases_and_warm_up():
    phases = "[{steps: 10, lr: 1.0e-3}, {steps: 5, lr: 1.0e-4}]"
    config = load("tiny", ["train.warmup_steps=4", f"train.phases={phases}"])
    rates = [learning_rate(config, step) for step in range(1, 18)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:10] == [1e-3] * 6
    assert rates[10:15] == [1e-4] * 5
    assert rates[15:] == [1e-4] * 2  # max_steps may go beyond the phases
    assert config.max_steps == 15


def test_accumulation_follows_from_batches_and_ranks():
    config = load("tiny", ["train.global_batch_size=24", "train.micro_batch_size=4"])
    assert [accumulation_steps(config, world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UserError, match=r"24 is no multiple of .* 4 x 4 = 16"):
        accumulation_steps(config, 4)


def test_every_parameter_is_in_one_group():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, others = parameter_groups(network, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1, 1, 1] and others["weight_decay"] == 0.0
    assert len(parameter_groups(torch.nn.LayerNorm(4), 0.1)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 8, "zero_optimization": {"stage": 2}}, "set train.global_batch_size instead"),
        ({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}, "set train.betas"),
        ({"zero_optimization": {"stage": 3}}, "stage = 3"),
        ({"bf16": {"enabled": True}}, "stage = 0 is for fp32"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "use stage 2, or remove bf16"),
        ({"bfloat16": {"enabled": True}}, 'write "bf16"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "must be fp32"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 2}}, "not finite"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "use bf16"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "use stage 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
            "must be fp32",
        ),
        ({"zero_optimization": 2}, "must be a JSON object"),
        ([1], "must be a JSON object"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as error:
        read_ds_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"zero_optimization": {"stage": 0}}, {"bf16": {"enabled": False}}])
def test_stage_0_is_accepted_in_fp32(tmp_path, settings):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    assert read_ds_config(path) == settings


def test_unreadable_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_ds_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_ds_config(tmp_path / "bad.json")
