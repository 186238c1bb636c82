"""From videos to samples with the ordinary programs, as the README tells it, on a very small scale."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from processes import ROOT, environment, exact, exit_record, metrics, run, run_each

from ardiff.data.dataset import open_shards
from ardiff.ports import free_port
from ardiff.video import decode

pytestmark = pytest.mark.launcher
PYTHON = sys.executable


def succeed(*command: str) -> str:
    code, output = run([PYTHON, *command])
    assert code == 0, output
    return output


def fail(*command: str) -> str:
    """The one error line of a user's mistake."""
    code, output = run([PYTHON, *command])
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    return errors[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Everything up to a trained DiT."""
    work = tmp_path_factory.mktemp("pipeline")
    videos, corpus = str(work / "videos"), str(work / "corpus.jsonl")
    succeed("-m", "data_tools.make_demo_corpus", "--out", videos, "--num_videos", "12", "--num_frames", "12")
    succeed("-m", "data_tools.scan_videos", videos, "--out", corpus, "--validation_fraction", "0.2")
    succeed("-m", "data_tools.shard_videos", "--corpus", corpus, "--out", str(work / "frames"), "--size", "64")
    vae = ["launch/train_vae.py", "--config", "arvae_tiny", "--data.shards", str(work / "frames")]
    vae += ["--train.max_steps", "4", "--train.log_every", "1", "--train.sample_every", "4"]
    succeed(*vae, "--run_dir", str(work / "arvae"))
    extract = ["-m", "data_tools.extract_latents", "--corpus", corpus, "--arvae", str(work / "arvae")]
    succeed(*extract, "--out", str(work / "latents"), "--shard_mb", "0.02")
    dit = ["launch/train.py", "--config", "tiny", "--data.shards", str(work / "latents"), "--model.num_classes", "6"]
    dit += ["--model.hidden_size", "32", "--model.num_heads", "2", "--train.max_steps", "4", "--train.log_every", "1"]
    succeed(*dit, "--train.sample_every", "4", "--run_dir", str(work / "dit"))
    return work


def test_training_leaves_metrics_and_videos_in_tensorboard(work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, tag in (("arvae", "reconstruction/00"), ("dit", "samples/00")):
        assert exit_record(work / name)["reason"] == "finished"
        assert [line["step"] for line in metrics(work / name)] == [1, 2, 3, 4]
        board = EventAccumulator(str(work / name / "tensorboard")).Reload()
        assert tag in board.Tags()["images"]
        assert "train/loss" in board.Tags()["scalars"]


def test_previews_do_not_change_training(work, tmp_path):
    """They swap averaged weights in and out in the middle of a run."""
    dit = ["launch/train.py", "--config", "tiny", "--data.shards", str(work / "latents"), "--model.num_classes", "6"]
    dit += ["--model.hidden_size", "32", "--model.num_heads", "2", "--train.max_steps", "4", "--train.log_every", "1"]
    dit += ["--sampling.num_videos", "1", "--sampling.num_steps", "4"]
    succeed(*dit, "--train.sample_every", "2", "--run_dir", str(tmp_path / "dit"))
    assert exact(tmp_path / "dit") == exact(work / "dit")


def test_latents_are_those_of_the_encoder(work):
    """Every video of the corpus is in exactly one split, and its latents are what the AR-VAE gives."""
    import torch

    from ardiff.data.shards import read_samples
    from ardiff.training.weights import load_arvae
    from ardiff.video import resize_and_crop

    network, arvae_id = load_arvae(work / "arvae")
    entries = {json.loads(line)["id"]: json.loads(line) for line in (work / "corpus.jsonl").read_text().splitlines()}
    seen = []
    for folder, split in ((work / "latents", "train"), (work / "latents" / "validation", "validation")):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["arvae"]["id"] == arvae_id
        for shard in manifest["shards"]:
            for sample in read_samples(folder / shard["file"]):
                entry = entries[sample.key]
                assert entry["split"] == split and sample.info["label"] == entry["label"]
                seen.append(sample.key)
        first = open_shards(folder, "latents").read_latents(0, 0, 12)
        key = next(read_samples(folder / manifest["shards"][0]["file"])).key
        frames = np.stack([resize_and_crop(frame, 64) for frame in decode(Path(entries[key]["path"]))])
        with torch.no_grad():
            expected = network.encode(torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255)[0]
        np.testing.assert_allclose(first.astype(np.float32), expected.numpy(), atol=2e-3, rtol=2e-3)
    assert (
        sorted(seen) == sorted(entries) and len(json.loads((work / "latents/manifest.json").read_text())["shards"]) > 1
    )


def test_extraction_is_byte_identical_after_losing_half(work, tmp_path):
    """A shard without its done marker, and half a temporary file: both as a kill leaves them."""
    before = {path.name: path.read_bytes() for path in (work / "latents").glob("latents-*")}
    (work / "latents" / "latents-000001.done.json").unlink()
    (work / "latents" / "latents-000001.tar").write_bytes(b"half")
    extract = [
        "-m",
        "data_tools.extract_latents",
        "--corpus",
        str(work / "corpus.jsonl"),
        "--arvae",
        str(work / "arvae"),
    ]
    succeed(*extract, "--out", str(work / "latents"), "--shard_mb", "0.02")
    assert before == {path.name: path.read_bytes() for path in (work / "latents").glob("latents-*")}
    line = fail(*extract, "--out", str(work / "latents"), "--shard_mb", "0.03")
    assert "other settings (shard_mb 0.02 -> 0.03)" in line


def test_samples_are_videos_and_depend_on_the_seed_only(work, tmp_path):
    sample = ["launch/sample.py", "--run", str(work / "dit"), "--num_frames", "10", "--steps", "5", "--gap", "2"]
    succeed(*sample, "--num_videos", "3", "--guidance", "1.5", "--out", str(tmp_path / "a"))
    videos = sorted((tmp_path / "a").glob("video_*.mp4"))
    assert len(videos) == 3
    frames = np.stack(list(decode(videos[0])))
    assert frames.shape == (10, 64, 64, 3)
    with Image.open(tmp_path / "a" / "contact_sheet.png") as sheet:
        assert sheet.width > 10 * 64 and sheet.height > 3 * 64
    settings = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [video["label"] for video in settings["videos"]] == [0, 1, 2] and settings["sampling"]["gap"] == 2
    # Other batches, and an export instead of the run: the same latents.
    succeed("launch/export.py", "--run", str(work / "dit"), "--out", str(tmp_path / "exported"))
    sample[2] = str(tmp_path / "exported")
    same = ["--num_videos", "2", "--guidance", "1.5", "--batch_size", "1", "--out", str(tmp_path / "b")]
    succeed(*sample, *same)
    first, second = (np.load(tmp_path / name / "latents.npy") for name in "ab")
    np.testing.assert_allclose(first[:2].astype(np.float32), second.astype(np.float32), atol=2e-3)
    succeed(*sample, "--num_videos", "1", "--seed", "5", "--out", str(tmp_path / "c"))
    assert np.abs(np.load(tmp_path / "c" / "latents.npy").astype(np.float32)[0] - first[0]).max() > 1e-3


def test_ranks_share_the_videos(work, tmp_path):
    sample = ["launch/sample.py", "--run", str(work / "dit"), "--num_videos", "3", "--steps", "4", "--gap", "2"]
    succeed(*sample, "--out", str(tmp_path / "one"))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "--"]
    succeed(*launcher, *sample, "--out", str(tmp_path / "two"))
    one, two = (np.load(tmp_path / name / "latents.npy").astype(np.float32) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=2e-3)
    described = [json.loads((tmp_path / name / "samples.json").read_text())["videos"] for name in ("one", "two")]
    assert described[0] == described[1]
    # and any of them again by its own seed
    succeed(
        *sample[:3], *sample[5:], "--seeds", str(described[0][2]["seed"]), "--label", "2", "--out", str(tmp_path / "c")
    )
    again = np.load(tmp_path / "c" / "latents.npy").astype(np.float32)
    np.testing.assert_allclose(again[0], one[2], atol=2e-3)


@pytest.mark.slow
def test_a_long_video_goes_on_after_a_kill(work, tmp_path):
    sample = [
        "launch/sample.py",
        "--run",
        str(work / "dit"),
        "--num_videos",
        "2",
        "--num_frames",
        "64",
        "--steps",
        "8",
    ]
    sample += ["--gap", "4", "--sampling.window", "6", "--sampling.sink", "1", "--sampling.solver", "dpmpp"]
    saving = [*sample, "--save_every", "8", "--out", str(tmp_path / "killed")]
    state = tmp_path / "killed" / "state" / "batch_000000.safetensors"
    process = subprocess.Popen(
        [PYTHON, *saving], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not state.is_file():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    assert not (tmp_path / "killed" / "video_000000.mp4").exists()
    assert "the state of another generation" in fail(*saving, "--seed", "3")
    assert "goes on at frame" in succeed(*saving)
    succeed(*sample, "--out", str(tmp_path / "undisturbed"))
    names = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed").iterdir()}
    for name in names - {"samples.json"}:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_prompts_continue_clip_by_clip_and_schedules_are_drawn(work, tmp_path):
    entries = [json.loads(line) for line in (work / "corpus.jsonl").read_text().splitlines()[:3]]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"clip {i}||{entry['path']}\n" for i, entry in enumerate(entries)) + "no clip\n")
    sample = ["launch/sample.py", "--run", str(work / "dit"), "--num_frames", "6", "--steps", "4", "--gap", "1"]
    out = ["--grid", "--format", "png", "npz", "--out", str(tmp_path / "out")]
    succeed(*sample, "--prompts", str(prompts), "--prefix_frames", "2", *out)
    videos = json.loads((tmp_path / "out" / "samples.json").read_text())["videos"]
    assert [video["prompt"] for video in videos] == ["clip 0", "clip 1", "clip 2", "no clip"]
    assert [video["given_frames"] for video in videos] == [[2, 0], [2, 0], [2, 0], [0, 0]]
    assert len(list((tmp_path / "out" / "video_000002").glob("*.png"))) == 6
    assert np.stack(list(decode(tmp_path / "out" / "grid.mp4"))).shape == (6, 128, 128, 3)
    output = succeed(*sample, "--show_schedule", str(tmp_path / "schedule.png"))
    assert "9 rows, 29 frame-forwards a video (cached; all frames in all rows: 54)" in output
    assert (tmp_path / "schedule.png").is_file()


def test_a_clip_is_continued(work, tmp_path):
    entry = json.loads((work / "corpus.jsonl").read_text().splitlines()[0])
    sample = ["launch/sample.py", "--run", str(work / "dit"), "--num_videos", "2", "--steps", "4", "--gap", "4"]
    prefix = ["--prefix", entry["path"], "--prefix_frames", "3", "--num_frames", "6"]
    succeed(*sample, *prefix, "--out", str(tmp_path / "out"))
    latents = np.load(tmp_path / "out" / "latents.npy").astype(np.float32)
    np.testing.assert_array_equal(latents[0, :3], latents[1, :3])  # the given frames, in both videos
    assert np.abs(latents[0, 3:] - latents[1, 3:]).max() > 1e-3
    assert "must leave something of --num_frames 3" in fail(*sample, *prefix[:4], "--num_frames", "3", "--out", "x")


@pytest.mark.slow
def test_pavdm_is_trained_and_continues_a_clip(work, tmp_path):
    """Rectified flow, bidirectional attention, a staircase of chunks, windows of variable length."""
    train = ["launch/train.py", "--config", "pavdm", "--data.shards", str(work / "latents"), "--run_dir"]
    train += [str(tmp_path / "run"), "--ds_config", "ds_configs/zero2_cpu.json", "--train.max_steps", "2"]
    sizes = {"model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "model.num_frames": 8}
    sizes |= {"diffusion.staircase.block": 2, "diffusion.staircase.prefix": 2, "diffusion.staircase.num_steps": 6}
    sizes |= {"sampling.block": 2, "sampling.gap": 2, "sampling.num_steps": 6, "sampling.sliding": 8}
    sizes |= {"sampling.history": 2, "train.global_batch_size": 4, "train.micro_batch_size": 4, "train.warmup_steps": 0}
    succeed(*train, *(f"--{key}={value}" for key, value in sizes.items()), "--train.log_every", "1")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    clip = json.loads((work / "corpus.jsonl").read_text().splitlines()[0])["path"]
    sample = ["launch/sample.py", "--run", str(tmp_path / "run"), "--num_videos", "1", "--num_frames", "14"]
    succeed(*sample, "--prefix", clip, "--prefix_frames", "2", "--out", str(tmp_path / "out"))
    assert np.load(tmp_path / "out" / "latents.npy").shape == (1, 14, 32, 4)
    line = fail(*sample, "--sampling.sliding", "6", "--out", str(tmp_path / "x"))
    assert "ceil(6 / 2) * 2 + 2 = 8 frames are unfinished or history at a time" in line and "gap >= 3" in line


def test_evaluation_gives_distances(work, tmp_path):
    evaluate = ["launch/evaluate.py", "--run", str(work / "dit"), "--data", str(work / "latents" / "validation")]
    evaluate += ["--train_data", str(work / "latents")]
    output = succeed(*evaluate, "--num_videos", "4", "--steps", "4", "--gap", "1", "--out", str(tmp_path / "e.json"))
    distances = json.loads((tmp_path / "e.json").read_text())["frechet"]
    assert set(distances) == {"samples", "untrained network", "noise", "training clips"}
    assert distances["training clips"] < distances["noise"]
    assert all(distance > 0 for distance in distances.values())
    assert f"{distances['samples']:.4f}" in output


def test_the_run_of_another_program_is_recognised(work):
    dit = ["launch/train.py", "--config", "tiny", "--data.shards", str(work / "latents")]
    assert "holds a run of the AR-VAE, not of the DiT" in fail(*dit, "--run_dir", str(work / "arvae"))


def test_mistakes_in_sampling(work, tmp_path):
    sample = ["launch/sample.py", "--run", str(work / "dit"), "--out", str(tmp_path / "out")]
    cases = [
        ([*sample, "--steps", "5", "--gap", "9"], "gap = 9 must lie between"),
        ([*sample, "--label", "77"], "--label 77: must be a number below 6 or one of"),
        ([*sample[:2], str(work / "arvae"), *sample[3:]], "does not hold a diffusion transformer"),
        ([*sample[:2], str(tmp_path / "none"), *sample[3:]], "no such folder"),
        ([*sample, "--arvae", str(_other_arvae(work, tmp_path))], "cannot decode latents made by AR-VAE"),
    ]
    found = run_each([[sys.executable, *command] for command, _ in cases], tmp_path)
    for (_, message), (code, output) in zip(cases, found, strict=True):
        assert code == 2 and output.startswith("error: ") and output.count("\n") == 1 and message in output, output
    assert not (tmp_path / "out").exists()


def _other_arvae(work: Path, folder: Path) -> Path:
    """An export with one weight changed."""
    from safetensors.torch import load_file, save_file

    succeed("launch/export.py", "--run", str(work / "arvae"), "--out", str(folder / "other"))
    weights = load_file(folder / "other" / "ema.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, folder / "other" / "ema.safetensors")
    return folder / "other"


PROGRAMS = [
    *(f"data_tools.{path.stem}" for path in sorted((ROOT / "data_tools").glob("*.py"))),
    *(f"launch.{path.stem}" for path in sorted((ROOT / "launch").glob("*.py"))),
]
LIBRARIES = ("__init__", "common", "pool")


@pytest.mark.parametrize("module", [name for name in PROGRAMS if name.rpartition(".")[2] not in LIBRARIES])
def test_every_program_explains_itself_with_an_example(module):
    output = succeed("-m", module, "--help")
    assert "example:" in output and module.rpartition(".")[2] in output
