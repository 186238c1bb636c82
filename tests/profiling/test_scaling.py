"""The model of a step on any number of ranks, by hand."""

import math

import numpy as np
import pytest

from ardiff.errors import UserError
from ardiff.files import write_json
from ardiff.profiling.comparing import SAME, compare, read
from ardiff.profiling.links import PASSES, Link, Links, Measured, fit
from ardiff.profiling.program import Plan, _scaling_json, model_nodes
from ardiff.profiling.scaling import Compute, compute_of, efficiencies, gpus, predict, strong, weak, with_waiting
from ardiff.profiling.timeline import (
    BACKWARD,
    COPY,
    DATA,
    EMA,
    FORWARD,
    GATHER,
    LOGGING,
    OPTIMIZER,
    PARTS,
    REDUCTION,
    REST,
)

# Bandwidths that make one reduction of 1 GB among 2 ranks take 10 ms, a gather 5.
OPS = {"all_reduce": Link("all_reduce", 2, 0.0, 100.0), "all_gather": Link("all_gather", 2, 0.0, 100.0)}
LINKS = Links(8, OPS, OPS, [], [])


def compute(**changes):
    known = {
        "ranks": 1,
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "stage": 2,
        "overlap": False,
        "gradient_bytes": 10**9,
        "weight_bytes": 10**9,
        "bucket_bytes": 10**8,
        "gathers": 1,
        "small_reductions": 0,
        "speed": 0.0,
        "forward_ms": 10.0,
        "backward_ms": 20.0,
        "sharded_ms": 8.0,
        "fixed_ms": 1.0,
    }
    return Compute(**{**known, **changes})


def test_parts_of_a_step_become_its_model():
    parts = dict.fromkeys(PARTS, 0.0) | {COPY: 4, FORWARD: 36, BACKWARD: 80, OPTIMIZER: 6, EMA: 2}
    parts |= {DATA: 0.5, LOGGING: 0.25, REST: 0.25}
    sizes = {"parameters": 10**6, "width": 2, "bucket": 10**5, "gathers": 2, "reduce_calls": 43}
    found = compute_of(parts, 1, 4, 16, stage=2, overlap=False, speed=0.0, **sizes)
    assert (found.forward_ms, found.backward_ms, found.sharded_ms, found.fixed_ms) == (10.0, 20.0, 8.0, 1.0)
    assert found.gradient_bytes == found.weight_bytes == 10 * found.bucket_bytes == 2 * 10**6
    assert found.small_reductions == 3  # four micro-steps of ten buckets


def test_alone_it_is_what_was_measured():
    found = predict(compute(), LINKS, 1, 16)
    assert found.step_ms == pytest.approx(4 * 30 + 8 + 1) and found.reduction_ms == found.gather_ms == 0


def test_two_ranks_halve_the_work_and_reduce_at_every_micro_step():
    found = predict(compute(), LINKS, 2, 16)
    assert found.compute_ms == pytest.approx(2 * 30 + 4 + 1)
    assert found.reduction_ms == pytest.approx(2 * 10) and found.gather_ms == pytest.approx(5)
    assert found.clips_per_s == pytest.approx(16 / 0.090)
    assert predict(compute(stage=1), LINKS, 2, 16).reduction_ms == pytest.approx(10)
    replicated = predict(compute(stage=0, weight_bytes=0), LINKS, 2, 16)
    assert replicated.compute_ms == pytest.approx(2 * 30 + 8 + 1) and replicated.gather_ms == 0


def test_overlap_exposes_the_last_bucket_and_what_the_backward_pass_cannot_hide():
    hidden = predict(compute(overlap=True), LINKS, 2, 16)
    assert hidden.reduction_ms == pytest.approx(2 * 1.0)  # nine of ten buckets fit into 20 ms
    short = predict(compute(overlap=True, backward_ms=5.0), LINKS, 2, 16)
    assert short.reduction_ms == pytest.approx(2 * (1.0 + 9 - 4.5))


def test_calls_cost_their_latency():
    late = Links(8, *({op: Link(op, 2, 1e-3, 100.0) for op in OPS} for _ in range(2)), [], [])
    plain, many = (
        predict(compute(gathers=gathers, small_reductions=small), late, 2, 16) for gathers, small in ((1, 0), (3, 5))
    )
    assert many.gather_ms - plain.gather_ms == pytest.approx(2)
    assert many.reduction_ms - plain.reduction_ms == pytest.approx(5)


def test_waiting_is_what_collectives_do_not_explain():
    two = compute(ranks=2, global_batch_size=16)  # 2 x 10 ms of reductions and 5 of gathering by themselves
    assert with_waiting(two, LINKS, 33.0).waiting_ms == pytest.approx(8)
    assert with_waiting(two, LINKS, 20.0).waiting_ms == 0 and with_waiting(compute(), LINKS, 9.0).waiting_ms == 0
    waits = with_waiting(two, LINKS, 33.0)
    same = predict(waits, LINKS, 2, 16)
    assert same.step_ms == pytest.approx(2 * 30 + 8 + 1 + 33)
    half = predict(waits, LINKS, 4, 16)
    assert half.waiting_ms == pytest.approx(8 * (30 + 4 + 1) / (60 + 8 + 1))


def test_ranks_that_share_cores_are_slower():
    found = predict(compute(speed=1e9), LINKS, 4, 16, speed=5e8)
    assert found.compute_ms == pytest.approx(2 * 30 + 2 * 8 / 4 + 1)


def test_weak_and_strong():
    found = weak(compute(), LINKS, [1, 2, 8])
    assert [one.global_batch_size for one in found] == [16, 32, 128]
    shares = efficiencies(found)
    assert shares[0] == 1 and shares[1] == pytest.approx(129 / found[1].step_ms)
    split = strong(compute(), LINKS, [1, 2, 3, 8, 16])
    assert [(one.ranks, one.micro_batch_size) for one in split] == [(1, 4), (2, 4), (8, 2), (16, 1)]


def test_numbers_of_gpus():
    assert gpus("8..512") == [8, 16, 32, 64, 128, 256, 512]
    assert gpus("8..100") == [8, 16, 32, 64] and gpus("8,24") == [8, 24]
    for wrong in ("", "0", "9..8", "eight", "-1"):
        with pytest.raises(ValueError):
            gpus(wrong)


def profile(ranks, step_ms):
    parts = dict.fromkeys(PARTS, 0.0) | {"reduction": 21.0, "weight gather": 6.0}
    return {
        "version": 1,
        "machine": {"ranks": ranks},
        "compute": compute(ranks=ranks).as_json(),
        "links": LINKS.as_json(),
        "setting": dict.fromkeys(SAME, 1),
        "step": {"step_ms": step_ms, "parts_ms": parts},
    }


def test_profiles_check_each_other(tmp_path):
    for ranks, step_ms in ((1, 129.0), (2, 100.0), (4, 60.0)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        write_json(folder / "profile.json", profile(ranks, step_ms))
    checks = compare([read(tmp_path / name) for name in ("4", "1", "2")])
    assert [(one.source, one.links_from, one.ranks) for one in checks] == [(1, 2, 2), (1, 4, 4), (2, 4, 4), (2, 2, 4)]
    assert checks[0].predicted_ms == pytest.approx(90) and checks[0].error == pytest.approx(-0.1)
    assert checks[0].measured_communication_ms == pytest.approx(27)


def test_profiles_of_different_trainings_are_refused():
    other = profile(2, 100.0)
    other["setting"]["precision"] = 2
    with pytest.raises(UserError, match="different trainings: precision is 1 in one and 2 in another"):
        compare([profile(1, 129.0), other])


def test_a_prediction_is_for_the_nodes_of_the_measured_step():
    slow = {op: Link(op, 2, 0.0, 10.0) for op in OPS}
    one, two = profile(1, 129.0), profile(2, 300.0)
    for found, per_node in ((one, 1), (two, 1)):
        found["links"] = Links(per_node, OPS, slow, [], []).as_json()
    assert compare([one, two])[0].communication_ms == pytest.approx(10 * (2 * 10 + 5))
    two["links"]["ranks_per_node"] = 2
    assert compare([one, two])[0].communication_ms == pytest.approx(2 * 10 + 5)


def test_larger_clusters_have_nodes_as_here():
    """Where several hosts were measured; a profile on one says nothing of others."""
    slow = {op: Link(op, 8, 0.0, 10.0) for op in OPS}
    for per_node, ranks, expected in ((4, 8, 4), (1, 2, 1), (2, 2, 8), (16, 16, 16)):
        linked = Links(per_node, OPS, slow, [], [])
        assert model_nodes(linked, ranks) == expected
        found = _scaling_json(compute(ranks=ranks, global_batch_size=4 * ranks), linked, Plan(gpus=(8, 16)))
        inside = found["weak"][0]["reduction_ms"] == pytest.approx(2 * 7 / 8 * 10)
        assert inside == (expected >= 8) and f"{expected} rank(s) on every node" in found["assumptions"]


def simulated(ranks, noise, steps=20, total=16, size=4 * 10**6, buckets=4):
    """The profile of a made-up machine, step by step: ranks differ, and wait for the slowest in every collective."""
    draw = np.random.default_rng(ranks)

    def seconds(op, size):
        passes = PASSES[op] * (ranks - 1) / ranks
        return 1e-3 * (math.log2(ranks) * 0.2 + passes * size / 1e6) if ranks > 1 else 0.0

    def work(ms):
        return ms * np.exp(noise * draw.standard_normal(ranks))

    parts, micro_steps = dict.fromkeys(PARTS, 0.0), total // ranks
    for _ in range(steps):
        for _ in range(micro_steps):
            forward, backward = work(10.0), work(20.0)
            alone = forward + backward
            parts[FORWARD] += forward.mean()
            parts[BACKWARD] += backward.mean()
            parts[REDUCTION] += (alone.max() - alone).mean()
            parts[REDUCTION] += 1000 * buckets * seconds("all_reduce", size / buckets)
        own = work(8.0 / ranks)
        parts[OPTIMIZER] += own.mean()
        parts[GATHER] += (own.max() - own).mean() + 1000 * seconds("all_gather", size)
        parts[REST] += 1.0
    parts = {name: ms / steps for name, ms in parts.items()}
    sizes = [2**power for power in range(14, 23, 2)]
    taken = [Measured(op, one, ranks, seconds(op, one) * 1.02, 0.0) for op in PASSES for one in sizes]
    linked = fit(taken) if ranks > 1 else OPS
    linked = Links(ranks, linked, linked, [], [])
    known = {"parameters": size // 4, "width": 4, "bucket": size // 4 // buckets, "gathers": 1, "speed": 0.0}
    calls = buckets * micro_steps if ranks > 1 else 0
    made = compute_of(parts, ranks, 1, total, stage=2, overlap=False, reduce_calls=calls, **known)
    made = with_waiting(made, linked, parts[REDUCTION] + parts[GATHER])
    step = {"step_ms": sum(parts.values()), "parts_ms": parts}
    found = {"version": 1, "machine": {"ranks": ranks}, "compute": made.as_json(), "links": linked.as_json()}
    return {**found, "step": step, "setting": dict.fromkeys(SAME, 1)}


@pytest.mark.parametrize(("noise", "from_one", "from_more"), [(0.0, 0.01, 0.01), (0.05, 0.05, 0.03)])
def test_errors_on_a_made_up_machine(noise, from_one, from_more):
    """By the collectives measured there; a run on one rank knows nothing of waiting for others."""
    checks = [
        check
        for check in compare([simulated(ranks, noise) for ranks in (1, 2, 4, 8)])
        if check.links_from == check.ranks
    ]
    assert len(checks) == 6
    for check in checks:
        assert abs(check.error) < (from_one if check.source == 1 else from_more), check


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no profile.json"),
        ("{", "cannot be read"),
        ('{"version": 0}', "not a profile of version 1"),
        ('{"version": 1}', "not a whole profile .*'compute'.*; profile again"),
        ('{"version": 1, "compute": []}', "not a whole profile"),
    ],
)
def test_folders_without_a_profile_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)
