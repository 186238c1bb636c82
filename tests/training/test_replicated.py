"""Stage 0 trains as ZeRO does, and its state goes to and fro between stages and numbers of ranks."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from toy import run_ranks

pytestmark = pytest.mark.launcher

CURVES = """
curves = {}
for stage in (2, 1, 0):
    for accumulation in (1, 2):
        engine = build(world, stage, accumulation)
        curve = [(train(engine, step)[0], float(engine.grad_norm())) for step in range(1, 21)]
        curves[f"stage {stage}, {accumulation} micro-batches"] = [list(part) for part in zip(*curve)]

# A step whose gradients are not finite changes nothing and is counted; the next ones go on; frozen groups keep still.
skips = {}
for stage in (2, 0):
    engine = build(world, stage)
    train(engine, 1)
    before = export(engine)
    changed = [train(engine, 2, broken=True)[1]]
    norm, same = float(engine.grad_norm()), export(engine) == before
    for parameter in engine.objective.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    changed += [train(engine, 3)[1], train(engine, 4)[1]]
    after = export(engine)
    frozen = [all(after["vectors"][f"group{g}.{name}"] == before["vectors"][f"group{g}.{name}"]
                  for name in ("master", "exp_avg", "exp_avg_sq")) for g in (0, 1)]
    skips[stage] = [changed, engine.skipped_steps, norm, same, frozen, after["adam_steps"], train(engine, 5)[0]]

# Every rank holds the same weights and moments, and the model computes with them.
held = [vector.tolist() for vector in engine.optimizers[0]._vectors]
held += [moment.tolist() for state in engine.optimizers[0]._adam.state.values() for moment in state.values()]
if world.is_main:
    weights = torch.cat([p.flatten() for group in engine._parameters for p in group]).tolist()
    together = [number for vector, group in zip(held, engine._parameters)
                for number in vector[:sum(p.numel() for p in group)]]
equal = all(other == held for other in world.gather(held)) and (not world.is_main or weights == together)
if world.is_main:
    print("RESULT", json.dumps([curves, skips, equal]), "RESULT")
"""

CHAIN = """
straight = build(world, 2)
whole = [train(straight, step)[0] for step in range(1, 16)]
engine, pieces, states = build(world, 2), [], []
for number, stage in enumerate((0, 2, 1, 0, None)):
    pieces += [train(engine, step)[0] for step in range(3 * number + 1, 3 * number + 4)]
    if stage is not None:
        states.append(export(engine))
        engine = build(world, stage)
        restore(engine, states[-1])
        assert export(engine) == states[-1], stage
if world.is_main:
    print("RESULT", json.dumps([whole, pieces, states]), "RESULT")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_0_gives_the_curve_of_stage_2(tmp_path, ranks):
    curves, skips, equal = run_ranks(CURVES, ranks, tmp_path)
    losses, norms = curves.pop("stage 2, 1 micro-batches")
    assert min(norms) > 0.5 and losses[-1] < losses[0]  # clipping is at work
    for name, (other_losses, other_norms) in curves.items():
        assert other_losses == pytest.approx(losses, rel=1e-6), name
        assert other_norms == pytest.approx(norms, rel=1e-6), name
    for changed, skipped, norm, same, frozen, adam_steps, _ in skips.values():
        assert changed == [False, True, True] and skipped == 1 and norm == math.inf and same
        assert frozen == [False, True] and adam_steps == [3, 1]
    assert skips["0"][-1] == pytest.approx(skips["2"][-1], rel=1e-6)
    assert equal


@pytest.mark.slow
def test_a_run_may_change_its_stage_and_its_ranks(tmp_path):
    """3 steps each with stage 2, 0, 2, 1, 0 on two ranks; then from each of their states with one rank."""
    whole, pieces, states = run_ranks(CHAIN, 2, tmp_path)
    assert pieces == pytest.approx(whole, rel=1e-6)
    alone = f"""
states, curves = {states!r}, []
for stage, state in zip((0, 2, 0, 1), states):
    engine = build(world, stage)
    restore(engine, state)
    first = 3 * len(curves) + 4
    curves.append([train(engine, step)[0] for step in range(first, first + 3)])
    assert export(engine)["adam_steps"] == [first + 2] * 2
print("RESULT", json.dumps(curves), "RESULT")
"""
    curves = run_ranks(alone, 1, tmp_path)
    assert [loss for curve in curves for loss in curve] == pytest.approx(whole[3:], rel=1e-6)
