"""The model of a step on any number of ranks, by hand."""

import pytest

from ardiff.errors import UserError
from ardiff.files import write_json
from ardiff.profiling.comparing import compare, read
from ardiff.profiling.links import Link, Links
from ardiff.profiling.scaling import Compute, compute_of, efficiencies, gpus, predict, strong, weak, with_waiting
from ardiff.profiling.timeline import BACKWARD, COPY, DATA, EMA, FORWARD, LOGGING, OPTIMIZER, PARTS, REST

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


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no profile.json"), ("{", "cannot be read"), ('{"version": 0}', "not a profile of version 1")],
)
def test_folders_without_a_profile_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)
