"""Norms by layer are parts of the norm, at every stage and on any number of ranks."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy import BATCH, Toy, run_ranks, samples

from ardiff.config import load
from ardiff.models import build_dit
from ardiff.models.build import build_arvae
from ardiff.training.grad_norms import layer_of

LAYERS = ["embed", "blocks.00", "blocks.01", "blocks.02", "final"]

MEASURE = """
from contextlib import contextmanager
measured = {}
for stage, bf16, accumulation in ((0, False, 1), (1, False, 2), (2, False, 2), (2, True, 2)):
    engine = build(world, stage, accumulation, bf16)
    found = []
    for step in range(1, 4):
        train(engine, step, measure=True)
        found.append((engine.layer_norms(), float(engine.grad_norm())))
    train(engine, 4)
    unmeasured = engine.layer_norms()
    changed = train(engine, 5, measure=True, broken=True)[1]
    broken = engine.layer_norms()
    train(engine, 6)
    unmeasured |= engine.layer_norms()
    train(engine, 7, measure=True)
    found.append((engine.layer_norms(), float(engine.grad_norm())))
    timed = []
    @contextmanager
    def timer():
        yield
        timed.append(engine.deepspeed.micro_steps - 7 * accumulation)
    engine.forward_timer = timer
    train(engine, 8)
    assert timed == list(range(accumulation)), timed
    measured[f"stage {stage}, bf16 {bf16}"] = [found, unmeasured, changed, broken]
if world.is_main:
    print("RESULT", json.dumps(measured), "RESULT")
"""

ADVERSARIAL = """
from ardiff.models.discriminator import PatchDiscriminator
from ardiff.models.reconstruction import ReconstructionObjective

sizes = ["image_size=16", "patch_size=4", "num_tokens=4", "hidden_size=16", "encoder_depth=1", "decoder_depth=2",
         "num_heads=2", "perceptual_weight=0", "discriminator_width=8", "discriminator_layers=2"]
phases = "[{steps: 9, lr: 1e-3, stage: adversarial}]"
config = load("arvae_tiny", [f"vae.{size}" for size in sizes] + [f"train.phases={phases}",
              f"train.global_batch_size={BATCH}", "train.micro_batch_size=2", "train.warmup_steps=0"])
results = {}
for stage in (2, 0):
    torch.manual_seed(0)
    objective, judge = ReconstructionObjective(config.vae), PatchDiscriminator.of(config.vae)
    engine = Engine(objective, config, {"zero_optimization": {"stage": stage}}, world, judge)
    curve, share = [], BATCH // world.size
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        video = torch.rand(BATCH, 1, 3, 16, 16, generator=generator)
        noise = torch.randn(BATCH, 1, 4, config.vae.channels, generator=generator)
        mine = slice(world.rank * share, (world.rank + 1) * share)
        micro_batches = [{"video": v, "noise": n, "mask": torch.ones(len(v), 1, dtype=torch.bool)}
                         for v, n in zip(video[mine].split(2), noise[mine].split(2))]
        terms, applied = engine.step(GlobalBatch(0, BATCH, BATCH, micro_batches), step, step == 4)
        assert applied.everything
        sums = [sum(part[name][0].double() for part in terms) for name in ("loss", "discriminator_loss")]
        curve.append(world.sum(torch.stack(sums)).tolist())
    adversary = engine.adversary.deepspeed
    norms = [float(engine.grad_norm()), float(adversary.get_global_grad_norm())]
    results[stage] = [curve, engine.layer_norms(), norms, adversary.skipped_steps, flat_state(engine).adam_steps()]
if world.is_main:
    print("RESULT", json.dumps(results), "RESULT")
"""


def total(norms: dict[str, float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms.values()))


@pytest.mark.launcher
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_add_up_to_the_norm(tmp_path, ranks):
    measured = run_ranks(MEASURE, ranks, tmp_path)
    for name, (found, unmeasured, changed, broken) in measured.items():
        for norms, norm in found:
            assert list(norms) == LAYERS and min(norms.values()) > 0, name
            assert total(norms) == pytest.approx(norm, rel=1e-5), name
        assert unmeasured == {}, name  # nothing is left of other steps
        assert changed is False and all(norm == math.inf for norm in broken.values()), name
    first = {name: found[0][0] for name, (found, *_) in measured.items()}
    expected = norms_of_plain_torch()
    for name, norms in first.items():
        assert norms == pytest.approx(expected, rel=3e-2 if "True" in name else 1e-5), name


def norms_of_plain_torch() -> dict[str, float]:
    """Of step 1, by hand."""
    objective = Toy()
    total, count = objective(samples(1))["loss"]
    assert float(count) == 3 * BATCH
    (total / count).backward()
    network = objective.network
    parts = dict(zip(LAYERS, [network.embed, *network.blocks, network.final], strict=True))
    return {
        name: float(torch.cat([p.grad.flatten() for p in part.parameters()]).norm()) for name, part in parts.items()
    }


@pytest.mark.launcher
def test_the_discriminator_has_norms_of_its_own_and_stage_0_trains_it_too(tmp_path):
    results = run_ranks(ADVERSARIAL, 2, tmp_path)
    for _, norms, (generator, discriminator), skipped, adam_steps in results.values():
        judge = {name: norm for name, norm in norms.items() if name.startswith("discriminator.")}
        rest = {name: norm for name, norm in norms.items() if name not in judge}
        assert {"encoder.00", "decoder.00", "decoder.01", "patch_embed", "to_pixels"} <= rest.keys()
        assert {"discriminator.stages.00", "discriminator.to_logits"} <= judge.keys()
        assert total(rest) == pytest.approx(generator, rel=1e-5)
        assert total(judge) == pytest.approx(discriminator, rel=1e-5)
        assert skipped == 0 and set(adam_steps) == {4}
    two, zero = results["2"], results["0"]
    for ours, theirs in zip(zero[0], two[0], strict=True):  # the losses of both networks in each step
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert zero[1] == pytest.approx(two[1], rel=1e-3)


def layers(network: torch.nn.Module) -> set[str]:
    return {layer_of(f"network.{name}") for name, _ in network.named_parameters()}


def test_names_of_layers():
    config = load("tiny", ["model.depth=2", "model.num_classes=3"])
    blocks = {"blocks.00", "blocks.01"}
    embeddings = {"slot_embed", "x_embed", "t_embed", "label_embed"}
    assert layers(build_dit(config.model, "x0")) == blocks | embeddings | {"final_modulation", "final"}
    config = load("arvae_tiny", ["vae.encoder_depth=1", "vae.decoder_depth=2", "vae.temporal=true"])
    found = layers(build_arvae(config.vae))
    assert {"encoder.00", "decoder.00", "decoder.01", "decoder_norm", "to_latents", "fine_temporal_blocks.00"} <= found
    assert layer_of("network.dit.blocks.11.attn.qkv.weight") == "blocks.11"
    assert layer_of("network.dit.t_embedder.mlp.0.weight") == "t_embedder"
    assert layer_of("network.encoder.transformer.3.attn.in_proj_weight") == "encoder.transformer.03"
    assert layer_of("network.pixel_decoder.up.1.block.0.conv1.weight") == "pixel_decoder.up.01"
    assert layer_of("weight") == "weight"
