"""launch/profile_throughput.py as a user runs it: on two ranks with everything, on one, and the check of its model."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from processes import SMALL, launcher, run

from ardiff.config import load
from ardiff.profiling.rates import training_flops
from ardiff.profiling.synthetic import TEXT_TOKENS
from ardiff.profiling.timeline import PARTS
from launch import profile_throughput

pytestmark = pytest.mark.launcher
PROGRAM = [
    "launch/profile_throughput.py",
    "--ds_config",
    "ds_configs/zero2_cpu.json",
    *SMALL,
    "--model.context_dim",
    "8",
]
QUICK = ["--train.micro_batch_size", "2", "--steps", "6", "--warmup", "1"]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Folders of a profile on one rank and of one on two, with what they printed."""
    folder = tmp_path_factory.mktemp("profiles")
    found = {}
    for kind, ranks, more in (
        ("python", 1, ["--micro_batches", "none", "--peak_tflops", "0.1"]),
        ("ranks", 2, ["--trace", "--micro_batches", "1,3", "--checkpointing", "on"]),
    ):
        code, output = run([*launcher(kind, ranks), *PROGRAM, *QUICK, *more, "--out", str(folder / str(ranks))])
        assert code == 0, output
        found[ranks] = (folder / str(ranks), output)
    return found


def read(profiles, ranks):
    return json.loads((profiles[ranks][0] / "profile.json").read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_add_up_to_the_step(profiles, ranks):
    step = read(profiles, ranks)["step"]
    assert set(step["parts_ms"]) == set(PARTS) and len(step["parts_ms_by_rank"]) == ranks
    assert sum(step["parts_ms"].values()) == pytest.approx(step["timed_step_ms"], rel=0.05)  # the same steps
    # Medians of these and of other steps, without the stop-watch: alone on a machine 5 %, here other tests take turns.
    assert abs(step["sum_against_step"]) < 0.5, step
    assert len(step["step_ms_all"]) == 6
    for name in ("forward", "backward", "optimizer", "reduction"):
        assert step["parts_ms"][name] > 0, name
    assert (step["parts_ms"]["weight gather"] > 0) == (ranks > 1)
    assert step["parts_ms"]["logging"] > 0  # at least one report was made
    assert step["parts_ms"]["rest"] < 0.25 * step["timed_step_ms"]


def test_what_deepspeed_sends_is_what_the_model_takes(profiles):
    traffic = read(profiles, 2)["traffic"]
    assert traffic["reduced_bytes"] == pytest.approx(traffic["reduced_bytes_model"], rel=0.01)
    assert traffic["gathered_bytes"] == pytest.approx(traffic["gathered_bytes_model"], rel=0.01)


def test_figures_agree_with_each_other(profiles):
    found = read(profiles, 1)
    rates, step = found["rates"], found["step"]
    assert rates["clips_per_s"] == pytest.approx(8 / (step["step_ms"] / 1000))
    assert rates["mfu"] == pytest.approx(rates["tflops_per_device"] / 0.1)
    model = load("tiny", [*SMALL[2:], "--model.context_dim", "8"]).model
    assert rates["training_gflops_per_clip"] == pytest.approx(training_flops(model, TEXT_TOKENS) / 1e9)
    assert found["memory"]["held_gb"]["optimizer"] == pytest.approx(
        found["memory"]["estimated_gb"]["optimizer"], rel=0.05
    )
    assert sum(kernel["share"] for kernel in found["kernels"]) <= 1 + 1e-9
    assert read(profiles, 2)["rates"]["mfu"] is None  # nobody knows the peak of a CPU


def test_sweep_names_the_best(profiles):
    sweep = read(profiles, 2)["sweep"]
    measured = [one for one in sweep["candidates"] if one["clips_per_s"] is not None]
    assert {(one["micro_batch_size"], one["activation_checkpointing"]) for one in measured} == {(1, True)}
    assert sweep["best"]["clips_per_s"] == max(one["clips_per_s"] for one in measured)
    left_out = [one for one in sweep["candidates"] if one["micro_batch_size"] == 3]
    assert all("does not divide" in one["note"] for one in left_out)


def test_files(profiles):
    folder, output = profiles[2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "profile.png",
        "profile.txt",
        "trace",
        "training.log",
    ]
    words = (folder / "profile.txt").read_text()
    assert words in output and "Scaling by the model" in words
    assert Image.open(folder / "profile.png").size == (1400, 1220)
    with gzip.open(folder / "trace" / "rank0.pt.trace.json.gz", "rt") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert {"part: forward", "part: backward", "part: optimizer", "part: EMA", "aten::mm"} <= names


def test_the_model_is_checked_with_profiles_of_other_numbers_of_ranks(profiles, tmp_path, monkeypatch, capsys):
    folders = [str(folder) for folder, _ in profiles.values()]
    monkeypatch.setattr(sys, "argv", ["profile", "--compare", *folders, "--out", str(tmp_path)])
    assert profile_throughput.main() == 0
    assert "1 -> 2" in capsys.readouterr().out
    (check,) = json.loads((tmp_path / "scaling.json").read_text())
    measured = read(profiles, 2)["step"]["step_ms"]
    assert check["measured_ms"] == measured
    assert check["error"] == pytest.approx(check["predicted_ms"] / measured - 1)
    assert 0 < check["communication_ms"] < check["predicted_ms"]
