"""launch/evaluate.py --arvae: what it reports, and mistakes that are refused before any work."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_frames, write_latents
from PIL import Image

import launch.evaluate
from ardiff.config import load
from ardiff.data.dataset import open_shards
from ardiff.errors import UserError
from ardiff.metrics import comparison
from ardiff.metrics.comparison import choose_clips, video_id
from ardiff.metrics.reconstruction import reconstruction_metrics
from ardiff.models import build_arvae
from ardiff.training.weights import Stored, load_arvae, write_export

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = ((3, 1), (6,))  # frames of the held-out videos
SIZES = {"image_size": 16, "patch_size": 8, "num_tokens": 4, "channels": 2, "hidden_size": 16, "num_heads": 2}


def write_arvae(folder, **more):
    """An export of a small random AR-VAE."""
    config = load("arvae_tiny", [f"vae.{key}={value}" for key, value in {**SIZES, **more}.items()])
    weights = build_arvae(config.vae).state_dict()
    write_export(folder, lambda vector: Stored(weights, config, folder, None))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An AR-VAE, training and held-out frames; more frames than numbers, so that PCA has all of its components."""
    work = tmp_path_factory.mktemp("evaluate")
    write_arvae(work / "arvae")
    write_frames(work / "frames", ((20, 9), (11,)))
    write_frames(work / "held_out", LENGTHS)
    return work


@pytest.fixture
def evaluate(work, tmp_path, monkeypatch, capsys):
    """Runs the program; returns its record and its output."""

    def run(*words, **changed):
        options = {"arvae": work / "arvae", "data": work / "held_out", "out": tmp_path / "out.json"} | changed
        named = [str(word) for key, value in options.items() if value is not None for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *named, *map(str, words)])
        assert launch.evaluate.main() == 0
        return json.loads(Path(options["out"]).read_text()), capsys.readouterr().out

    return run


def test_report_of_all_methods(work, evaluate, tmp_path):
    record, output = evaluate(train_data=work / "frames", sheet=tmp_path / "sheet.png")
    assert {name: row["numbers"] for name, row in record["methods"].items()} == {
        **{"mean colour": 3, "PCA": 8, "DCT": 8},
        "AR-VAE": 8,
    }
    shards = open_shards(work / "held_out", "frames")
    videos = [shards.read_frames(i, 0, int(shards.frames[i])) for i in range(3)]
    network, identity = load_arvae(work / "arvae")
    expected = reconstruction_metrics(network, videos)
    for name, value in record["methods"]["AR-VAE"].items():
        assert name == "numbers" or value == pytest.approx(expected[name], rel=1e-5)
    assert record["latents"]["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-5)
    assert record["methods"]["PCA"]["psnr"] > record["methods"]["mean colour"]["psnr"] + 3
    assert record["methods"]["DCT"]["psnr"] > record["methods"]["mean colour"]["psnr"]
    assert [(video["id"], video["frames"]) for video in record["videos"]] == [
        ("000000", 3),
        ("000001", 1),
        ("000002", 6),
    ]
    assert ["flicker" in video for video in record["videos"]] == [True, False, True]
    for method, row in record["methods"].items():  # the whole is the mean over all frames of the videos
        mean = sum(video["frames"] * video["psnr"][method] for video in record["videos"]) / 10
        assert row["psnr"] == pytest.approx(mean, rel=1e-9)
        assert f"{row['psnr']:.2f}" in output
    assert record["arvae"]["id"] == identity and record["data"]["identity"] == shards.identity
    assert record["settings"]["training_frames"] == 40 and record["frames_per_second"] > 0


def test_the_sheet_shows_originals_and_reconstructions(work, evaluate, tmp_path):
    evaluate(train_data=work / "frames", sheet=tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    pitch = 16 * 6 + 2  # frames are enlarged six times, with a gap between them
    left = sheet.shape[1] - 8 * pitch - 2  # two frames of: original, PCA, DCT, AR-VAE
    assert left > 40 and sheet.shape[0] == 18 + 3 * pitch + 2
    assert (sheet[:18, left:] < 255).any() and (sheet[18:, :left] < 255).any()  # titles and labels
    shards = open_shards(work / "held_out", "frames")
    for row, (first, last) in enumerate([(0, 2), (0, 0), (0, 5)]):
        for column, frame in ((0, first), (4, last)):
            top, start = 18 + 2 + row * pitch, left + 2 + column * pitch
            shown = sheet[top : top + 96 : 6, start : start + 96 : 6]
            assert np.array_equal(shown, shards.read_frames(row, frame, 1)[0])


def test_without_training_data_only_the_mean_colour_is_beside_it(evaluate):
    record, output = evaluate("--max_frames", "5", "--num_frames", "2")
    assert list(record["methods"]) == ["AR-VAE", "mean colour"] and "PCA" not in output
    assert record["data"]["frames"] <= 5 and all(video["frames"] <= 2 for video in record["videos"])


def test_lpips_is_reported_where_its_weights_are_given(evaluate, monkeypatch):
    class Distance(torch.nn.Module):
        def __init__(self, path):
            super().__init__()
            assert path == Path("weights.pth")

        def forward(self, a, b):
            return (a - b).square().flatten(1).mean(1)

    monkeypatch.setattr(launch.evaluate, "LPIPS", Distance)
    record, output = evaluate(lpips="weights.pth")
    assert record["settings"]["lpips"] == "weights.pth" and "LPIPS" in output
    for row in record["methods"].values():  # PSNR is convex in the mean squared error
        assert 10 ** (-row["psnr"] / 10) <= row["lpips"] < 1


def test_pieces_of_long_videos_and_a_temporal_decoder(work, evaluate, tmp_path, monkeypatch):
    folder = write_arvae(tmp_path / "temporal", temporal=True, window=2)
    whole, _ = evaluate(arvae=folder)
    monkeypatch.setattr(comparison, "PIECE", 2)
    cut, _ = evaluate(arvae=folder, sheet=tmp_path / "sheet.png")
    for name, value in whole["methods"]["AR-VAE"].items():
        assert cut["methods"]["AR-VAE"][name] == pytest.approx(value, rel=1e-5)


def test_choice_of_clips():
    assert choose_clips([5, 30, 2], None) == [(0, 5), (1, 30), (2, 2)]
    assert choose_clips([5, 30, 2], None, 4) == [(0, 4), (1, 4), (2, 2)]
    assert choose_clips([5, 30, 2], 100) == [(0, 5), (1, 30), (2, 2)]
    assert choose_clips([40, 30, 2], 50) == [(0, 16 + 8), (1, 24), (2, 2)]
    chosen = choose_clips([100] * 50, 256)
    assert len(chosen) == 16 and sum(frames for _, frames in chosen) == 256
    assert chosen[0][0] == 0 and chosen[-1][0] == 49
    assert choose_clips([100] * 50, 3) == [(0, 3)]
    assert len(choose_clips([1] * 50, 20)) <= 20
    for limit in range(1, 90):
        assert 0 < sum(frames for _, frames in choose_clips([7, 1, 40, 20, 3], limit, 11)) <= limit


def test_ids_are_those_of_the_samples(work):
    shards = open_shards(work / "held_out", "frames")
    assert [video_id(shards, i) for i in range(3)] == ["000000", "000001", "000002"]


MISTAKES = {
    "neither": ({"arvae": None}, [], "missing --run DIR .* or --arvae CHECKPOINT"),
    "both": ({"run": "somewhere"}, [], "--run and --arvae: evaluate one at a time"),
    "of samples": ({}, ["--steps", "4"], "--steps: belongs to --run, not to --arvae"),
    "of samples, with its default": ({}, ["--weights=ema"], "--weights: belongs to --run"),
    "a setting": ({}, ["--sampling.window", "4"], "'--sampling.window': an AR-VAE is evaluated as it is"),
    "of an AR-VAE": (
        {"arvae": None, "run": "x"},
        ["--max_frames", "4"],
        "--max_frames: belongs to --arvae, not to --run",
    ),
    "no frames": ({}, ["--max_frames", "0"], "--max_frames 0: must be at least 1"),
    "negative seed": ({}, ["--seed", "-1"], "--seed -1: must be at least 0"),
    "no such run": ({"arvae": "nowhere"}, [], "nowhere: no such folder"),
    "latents": ({"data": "latents"}, [], "holds latents, but frames are needed .made by data_tools.shard_videos"),
    "other frames": ({"data": "large"}, [], "--data .*large: frames of 24 x 24, but the AR-VAE is for 16 x 16"),
    "other training frames": ({"train_data": "large"}, [], "--train_data .*large: frames of 24 x 24"),
    "remote": ({"data": "s3://bucket/frames"}, [], "--data s3://bucket/frames: .* copy the shards"),
    "no weights of LPIPS": ({"lpips": "none.pth"}, [], r"^--lpips.*none\.pth"),
    "no picture": ({"sheet": "sheet.jpg"}, [], r"--sheet .*sheet.jpg: must be the name of a .png file"),
    "a folder": ({"out": "latents"}, [], "--out .*latents: is a folder"),
    "below a file": ({"out": "file/out.json"}, [], "--out .*file is not a folder that can be written to"),
    "a sheet below a file": ({"sheet": "file/deep/sheet.png"}, [], "--sheet .*file is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_one_line(name, work, evaluate, tmp_path, monkeypatch):
    changed, words, expected = MISTAKES[name]
    write_latents(tmp_path / "latents")
    write_frames(tmp_path / "large", ((2,),), size=24)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.evaluate, "compare", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(UserError, match=expected) as error:
        evaluate(*words, **changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_codes_are_not_fitted_on_the_frames_they_are_measured_on(work, evaluate):
    with pytest.raises(UserError, match=r"--train_data .*held_out: is what --data names"):
        evaluate(train_data=work / "held_out")


def test_results_are_written_before_anybody_stops_reading(work, evaluate, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        evaluate(sheet=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file() and json.loads((tmp_path / "out.json").read_text())["methods"]


def test_numbers_that_are_not_finite_are_refused(work, evaluate, tmp_path):
    config = load("arvae_tiny", [f"vae.{key}={value}" for key, value in SIZES.items()])
    weights = {name: torch.full_like(value, torch.nan) for name, value in build_arvae(config.vae).state_dict().items()}
    write_export(tmp_path / "broken", lambda vector: Stored(weights, config, tmp_path, None))
    with pytest.raises(UserError, match="broken: its reconstructions hold numbers that are not finite"):
        evaluate(arvae=tmp_path / "broken")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.launcher
def test_the_program_ends_with_2_and_one_line_for_a_mistake(work, tmp_path):
    command = [sys.executable, "launch/evaluate.py", "--arvae", str(work / "arvae"), "--data", str(work / "frames")]
    command += ["--guidance", "2", "--out", str(tmp_path / "x.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: --guidance: belongs to --run, not to --arvae; leave it out\n"
