"""Estimated memory against counted tensors, and against what DeepSpeed holds on two ranks."""

import pytest
import torch

from ardiff.config import load
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.monitor.estimates import (
    BUCKET,
    DEEPSPEED_BUCKET,
    FP32,
    GIB,
    Zero,
    activation_bytes,
    memory,
    memory_under,
    node_memory,
    num_parameters,
    step_seconds,
)
from ardiff.monitor.throughput import dit_flops
from ardiff.profiling.rates import hardware_flops
from tests.training.toy import run_ranks


def kept_for_backward(config, batch, dtype, num_context=0):
    """Bytes of the tensors that a forward pass saves, each storage once, without the parameters."""
    model = config.model
    objective = DiffusionObjective(build_dit(model), config).to(dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    shape = (batch, model.num_frames, model.tokens_per_frame, model.in_channels)
    data = {"latents": torch.randn(shape), "noise": torch.randn(shape)}
    data["timesteps"] = torch.zeros(shape[:2], dtype=torch.long)
    data["mask"] = torch.ones(shape[:2], dtype=torch.bool)
    if num_context:
        data["context"] = torch.randn(batch, num_context, model.context_dim)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(data)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("batch", "settings"),
    [
        (1, []),
        (4, ["model.depth=2"]),
        (2, ["model.hidden_size=64", "model.num_heads=2"]),
        (2, ["model.tokens_per_frame=8", "model.num_frames=4", "model.depth=6"]),
        (2, ["model.mask=bidirectional", "model.mlp_ratio=2.0"]),
        (1, ["model.qk_norm=false", "model.num_frames=16"]),
    ],
)
def test_activations_against_what_is_kept(batch, settings, precision):
    config = load("tiny", settings)
    kept = kept_for_backward(config, batch, torch.float32 if precision == "fp32" else torch.bfloat16)
    assert activation_bytes(config.model, batch, precision, on_gpu=False) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        ["model.context_dim=24"],
        ["model.context_dim=24", "model.mask=bidirectional", "model.context=leaky"],
    ],
)
def test_activations_with_text(settings, precision):
    config = load("tiny", ["model.depth=2", "model.num_frames=4", *settings])
    kept = kept_for_backward(config, 2, torch.float32 if precision == "fp32" else torch.bfloat16, 77)
    found = activation_bytes(config.model, 2, precision, on_gpu=False, num_context=77)
    assert found == pytest.approx(kept, rel=0.02)
    assert activation_bytes(config.model, 2, precision, on_gpu=False) < 0.8 * kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        ["model.depth=4"],
        ["model.qk_norm=true"],
        ["model.reference.positions=rotary"],
        ["model.qk_norm=true", "model.reference.positions=rotary"],
        ["model.reference.merge_mode=reproduce"],
        ["model.reference.merge_mode=sharenorm_shift_first_t"],
    ],
)
def test_activations_of_the_published_networks(settings, precision):
    """Their context tokens are counted without being asked for."""
    small = ["model.hidden_size=64", "model.num_heads=2", "model.depth=2", "model.num_frames=4"]
    config = load("reference_sky", [*small, *settings])
    kept = kept_for_backward(config, 2, torch.float32 if precision == "fp32" else torch.bfloat16)
    assert activation_bytes(config.model, 2, precision, on_gpu=False) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("depth", [2, 8])
def test_activations_with_checkpointing(depth):
    """Between forward and backward the blocks' inputs are kept; a whole block comes on top while one is recomputed."""
    config = load("tiny", [f"model.depth={depth}", "model.activation_checkpointing=true"])
    kept = kept_for_backward(config, 2, torch.float32)
    without = [activation_bytes(load("tiny", [f"model.depth={n}"]).model, 2, "fp32", on_gpu=False) for n in (1, 2)]
    block = without[1] - without[0]
    assert activation_bytes(config.model, 2, "fp32", on_gpu=False) - block == pytest.approx(kept, rel=0.1)


def test_kinds_of_memory_by_stage():
    config = load("ardiff_xl", ["train.extra_ema_decays=[0.999]"])
    parameters = num_parameters(config) * FP32 / GIB
    zero = {2: memory(config, 8, "bf16", 2, on_gpu=True), 1: memory(config, 8, "fp32", 1, on_gpu=True)}
    assert zero[2]["weights"] == pytest.approx(parameters / 2)
    assert zero[2]["optimizer"] == pytest.approx(3 * parameters / 8)
    assert zero[2]["ema"] == pytest.approx(2 * parameters / 8)
    assert zero[2]["gradients"] == pytest.approx(parameters / 8)
    assert zero[1]["gradients"] > 8 * zero[2]["gradients"]  # all of them, until the last micro-batch
    replicated = memory(config, 8, "fp32", 0, on_gpu=True)
    assert replicated["optimizer"] == pytest.approx(2 * parameters)
    with pytest.raises(UserError, match="stage = 1 is for fp32"):
        memory(config, 8, "bf16", 1)
    for kinds in (*zero.values(), replicated):
        assert kinds["total"] == pytest.approx(sum(size for kind, size in kinds.items() if kind != "total"))
    small = memory(config, 8, "bf16", micro_batch_size=4, activation_checkpointing=True, on_gpu=True)
    assert small["activations"] < zero[2]["activations"] / 20


def test_host_memory_counts_state_and_batches():
    config = load("ardiff_xl")
    found = node_memory(config, 8)
    assert found["checkpoint"] == pytest.approx(4 * FP32 * num_parameters(config) / 8 / GIB)
    assert found["total"] == pytest.approx(8 * found["per_rank"])


def test_step_seconds_adds_up():
    config = load("ardiff_xl")
    alone = step_seconds(config, 1, "bf16", 300e12)
    assert alone["total"] == alone["compute"] == pytest.approx(3 * dit_flops(config.model) * 1024 / (300e12 * 0.6))
    eight = step_seconds(config, 8, "bf16", 300e12, 100.0)
    size = 2 * num_parameters(config)
    assert eight["reduction"] == pytest.approx(8 * 2 * 7 / 8 * size / 100e9)
    assert eight["gather"] == pytest.approx(7 / 8 * size / 100e9)
    hidden = step_seconds(config, 8, "bf16", 300e12, 100.0, overlap=True)
    last = 1 / -(-num_parameters(config) // BUCKET)  # the last bucket, for which there is nothing left to hide behind
    assert hidden["reduction"] == pytest.approx(last * eight["reduction"])
    assert hidden["total"] == pytest.approx(hidden["compute"] + hidden["reduction"] + eight["gather"])
    slow = [step_seconds(config, 8, "bf16", 300e12, 1e-3, overlap=on)["reduction"] for on in (False, True)]
    assert slow[1] > 0.99 * slow[0]  # hardly anything can be hidden


def test_traffic_by_stage():
    """Stage 2 reduces after every micro-batch, stages 1 and 0 once, and stage 0 keeps all weights on all ranks."""
    config = load("tiny", ["train.global_batch_size=64", "train.micro_batch_size=4"])
    two, one, none = (step_seconds(config, 2, "fp32", 1e12, 1.0, stage=stage) for stage in (2, 1, 0))
    assert two["reduction"] == pytest.approx(8 * one["reduction"]) and one["reduction"] == none["reduction"] > 0
    assert two["gather"] == one["gather"] > 0 == none["gather"]
    assert two["compute"] == one["compute"] == none["compute"]


def test_only_blocks_are_computed_again():
    config = load("tiny", ["model.activation_checkpointing=true", "model.context_dim=24"])
    for num_context in (None, 77):
        found = step_seconds(config, 1, "fp32", 1e12, num_context=num_context)["compute"]
        flops = hardware_flops(config.model, num_context)
        assert found == pytest.approx(config.train.global_batch_size * flops / 0.6e12)


def test_what_a_ds_config_says():
    said = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e8, "overlap_comm": True},
    }
    assert Zero.of(said) == Zero("bf16", 2, 100_000_000, True)
    assert Zero.of({}) == Zero("fp32", 0, DEEPSPEED_BUCKET, False)
    config = load("tiny", ["model.context_dim=24"])
    under = memory_under(config, said, 4, on_gpu=True, num_context=77)
    assert under == memory(config, 4, "bf16", 2, bucket=100_000_000, overlap=True, on_gpu=True, num_context=77)
    assert under["activations"] > memory_under(config, said, 4, on_gpu=True)["activations"]


# What lives between the last backward pass and the update: gradients in their final form, the optimizer's state.
HELD = """
from ardiff.config import load
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.training.ema import ShardedEMA
config = load("tiny", ["model.depth=2", "train.global_batch_size=8", "train.micro_batch_size=2"])
model = config.model
found = {}
for name, stage, bf16 in (("bf16 2", 2, True), ("fp32 2", 2, False), ("fp32 1", 1, False)):
    settings = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000000}, "bf16": {"enabled": bf16}}
    engine = Engine(DiffusionObjective(build_dit(model), config), config, settings, world)
    zero = engine.deepspeed.optimizer
    original, seen = zero.step, {}
    def step(*rest, **more):
        groups = [part for group in zero.averaged_gradients.values() for part in group or []]
        attribute = [p.grad_accum for p in engine.objective.parameters() if getattr(p, "grad_accum", None) is not None]
        seen["gradients"] = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                                 for p in groups + attribute}.values())
        return original(*rest, **more)
    zero.step = step
    shape = (2, model.num_frames, model.tokens_per_frame, model.in_channels)
    def micro():
        return {"latents": torch.randn(shape), "noise": torch.randn(shape),
                "timesteps": torch.zeros(shape[:2], dtype=torch.long), "mask": torch.ones(shape[:2], dtype=torch.bool)}
    engine.step(GlobalBatch(0, 8, 8 * model.num_frames, [micro(), micro()]), 1)
    vectors = flat_state(engine).vectors()
    seen["optimizer"] = sum(v.nbytes for part in vectors.values() for v in part)
    seen["ema"] = sum(v.nbytes for part in ShardedEMA(engine.optimizers[0], [0.9]).vectors().values() for v in part)
    seen["weights"] = sum(p.nbytes for p in engine.objective.parameters())
    found[name] = seen
if world.is_main:
    print("RESULT", json.dumps(found))
"""


def test_states_against_what_deepspeed_holds(tmp_path):
    found = run_ranks(HELD, 2, tmp_path)
    config = load("tiny", ["model.depth=2", "train.global_batch_size=8", "train.micro_batch_size=2"])
    for name, seen in found.items():
        precision, stage = name.split()
        expected = memory(config, 2, precision, int(stage), on_gpu=False)
        for kind in ("weights", "optimizer", "ema"):
            assert seen[kind] / GIB == pytest.approx(expected[kind], rel=0.01), (name, kind)
        if name == "fp32 2":  # a flat copy for the optimizer comes on top
            assert 2 * seen["gradients"] / GIB == pytest.approx(expected["gradients"], rel=0.1)
        elif name == "bf16 2":
            assert seen["gradients"] / GIB == pytest.approx(expected["gradients"], rel=0.01)
        else:
            assert seen["gradients"] / GIB <= expected["gradients"]
