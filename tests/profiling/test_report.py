"""What a profile looks like: every figure is in the text, the picture shows every part, also of a poor profile."""

import copy

import numpy as np
import pytest

from ardiff.profiling import plots, report
from ardiff.profiling.comparing import Check
from ardiff.profiling.timeline import BACKWARD, PARTS

PARTS_MS = {name: 10.0 * (number + 1) for number, name in enumerate(PARTS)}


def candidate(size, recompute, rate, note=""):
    return {
        "micro_batch_size": size,
        "activation_checkpointing": recompute,
        "clips_per_s": rate,
        "step_ms": None if rate is None else 1000 / rate,
        "peak_gb": None if rate is None else 3.25,
        "estimated_gb": 3.0,
        "fits": rate is not None,
        "note": note,
    }


def predicted(ranks):
    return {
        "ranks": ranks,
        "micro_batch_size": 16,
        "global_batch_size": 128 * ranks,
        "compute_ms": 400.0,
        "reduction_ms": 12.5,
        "gather_ms": 3.0,
        "waiting_ms": 0.0,
        "step_ms": 415.5,
        "clips_per_s": 300.0 * ranks,
        "efficiency": 1.0 - ranks / 4096,
    }


@pytest.fixture
def profile():
    best = candidate(32, False, 812.0)
    return {
        "machine": {"ranks": 2, "device": "NVIDIA A800-SXM4-80GB", "threads_per_rank": 4},
        "setting": {
            "model": {"parameters": 673_676_356},
            "precision": "bf16",
            "zero_stage": 2,
            "global_batch_size": 256,
            "micro_batch_size": 16,
            "accumulation": 8,
            "activation_checkpointing": False,
            "data": "synthetic latents",
            "steps": 20,
            "warmup": 5,
            "report_every": 21,
            "left_out": "checkpoints",
        },
        "step": {
            "step_ms": 560.0,
            "step_ms_median": 555.0,
            "parts_ms": PARTS_MS,
            "parts_ms_by_rank": [PARTS_MS, {name: 2 * ms for name, ms in PARTS_MS.items()}],
            "parts_ms_sum": sum(PARTS_MS.values()),
            "sum_against_timed_step": -0.0123,
            "sum_against_step": 0.0234,
            "overhead_of_timing": 0.0345,
        },
        "rates": {
            "clips_per_s": 457.1,
            "tokens_per_s": 234_057.0,
            "tflops_per_device": 330.5,
            "hardware_tflops_per_device": 330.5,
            "tflops_per_device_dense": 341.3,
            "hardware_tflops_per_device_dense": 341.3,
            "mfu": 0.531,
            "hfu": 0.531,
            "mfu_dense": 0.548,
            "hfu_dense": 0.548,
            "convention": "a multiply-add is 2 FLOPs",
            "peak_tflops": 312.0,
            "peak_from": "the data sheet",
            "matmul_tflops": 270.0,
            "of_matmul": 0.64,
        },
        "memory": {
            "estimated_gb": {"weights": 1.25, "optimizer": 3.75, "total": 17.5},
            "held_gb": {"weights": 1.26, "optimizer": 3.76},
            "peak_gb": 18.25,
            "host_estimated_gb": {"loader": 0.125, "checkpoint": 1.5},
            "peak_of": "allocated on the GPU",
        },
        "kernels": [{"name": "gemm" * 30, "calls": 4.0, "ms": 12.0, "share": 0.5}],
        "trace": "profiles/trace",
        "sweep": {
            "candidates": [
                candidate(16, False, 457.1),
                best,
                candidate(64, False, None, "out of memory"),
                candidate(16, True, 350.0),
                candidate(32, True, 360.0),
                candidate(64, True, None, "left out: a smaller one does not fit"),
            ],
            "margin": 0.08,
            "best": best,
            "best_settings": "--train.micro_batch_size 32",
        },
        "traffic": {
            "reduced_bytes": 10_780_000,
            "reduced_bytes_model": 10_770_000,
            "gathered_bytes": 1_347_000,
            "gathered_bytes_model": 1_348_000,
        },
        "scaling": {
            "weak": [predicted(ranks) for ranks in (8, 64, 512)],
            "strong": [predicted(8)],
            "assumptions": ["the weather is fine"],
        },
    }


def test_text_holds_every_figure(profile):
    words = report.text(profile)
    figures = "0.125 1.500 457.1 234,057 330.500 53.1% 54.8% 560.0 64.0% 1.260 3.760 18.250 812.0 415.5 10.78 1.35"
    for figure in (
        *figures.split(),
        *PARTS,
        "-1.23%",
        "+2.34%",
        "out of memory",
        "the weather is fine",
        "--train.micro_batch_size 32",
    ):
        assert figure in words, figure
    assert max(map(len, words.splitlines())) < 160


def test_text_without_peak_sweep_and_scaling(profile):
    poor = copy.deepcopy(profile)
    poor["machine"] = {"ranks": 1, "device": "CPU", "threads_per_rank": 1}
    poor["rates"] |= {"mfu": None, "hfu": None, "mfu_dense": None, "hfu_dense": None, "peak_tflops": None}
    poor["sweep"] = {"candidates": [], "margin": 0.08, "best": None, "best_settings": None}
    poor["scaling"] |= {"weak": [], "strong": []}
    words = report.text(poor)
    assert "none is known" in words and "Sweep" not in words and "Scaling" not in words
    image = plots.picture(poor)
    assert image.size == (plots.WIDTH, plots.HEIGHT)


def test_picture_shows_parts_in_proportion(profile):
    pixels = np.asarray(plots.picture(profile))
    bar = pixels[plots.BAR[0] + 8]
    total = sum(PARTS_MS.values())
    for name, ms in PARTS_MS.items():
        wide = (bar == plots.COLOURS[name]).all(axis=-1).sum()
        assert wide == pytest.approx((plots.WIDTH - 2 * plots.EDGE) * ms / total, abs=4), name
    assert plots.COLOURS[BACKWARD] == (0, 114, 178)


@pytest.mark.parametrize("mode", [False, True])
def test_picture_of_one_mode_has_its_colour(profile, mode):
    """Bars have the colour of the legend, also where only one kind was swept."""
    profile["sweep"]["candidates"] = [candidate(16, mode, 457.1), candidate(32, mode, 812.0)]
    profile["scaling"] |= {"weak": [], "strong": []}
    pixels = np.asarray(plots.picture(profile))
    drawn, other = ((pixels == plots.LINES[int(kind)]).all(axis=-1).sum() for kind in (mode, not mode))
    bar = (pixels == plots.COLOURS[BACKWARD]).all(axis=-1).sum() if plots.COLOURS[BACKWARD] in plots.LINES else 0
    assert drawn > 5000 and other <= bar


def test_picture_names_what_each_curve_is_a_share_of(profile, monkeypatch):
    said = []
    monkeypatch.setattr(plots._Sheet, "turned", lambda sheet, at, words: said.append(words))
    profile["scaling"]["strong"] = [predicted(24), predicted(48)]
    plots.picture(profile)
    assert "share of that on 8, 24" in said


def test_comparison_names_ranks_and_errors():
    words = report.comparison([Check(1, 2, 2, 90.0, 100.0, 75.0, 15.0, 17.0)])
    assert "1 -> 2" in words and "-10.0%" in words and "17.0" in words
