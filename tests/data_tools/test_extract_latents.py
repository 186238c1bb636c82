"""extract_latents: what lies in the shards, on one process and several, undisturbed and killed."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_helpers import contents, entry, make_corpus, make_video, run_sabotaged, samples_in
from safetensors.torch import save_file

from ardiff.config import load, to_yaml
from ardiff.data.corpus import SPLITS, CorpusEntry, read_corpus, write_corpus
from ardiff.data.dataset import open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.shards import Sample, read_manifest
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.models import ARVAE
from ardiff.training.weights import load_arvae
from ardiff.video import decode, resize_and_crop
from data_tools import shard_videos
from data_tools.common import split_folder
from data_tools.extract_latents import main

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SIZE = 32


def make_arvae(folder: Path, size: int = SIZE, bias: float = 0.0) -> Path:
    """An untrained auto-encoder, as an export."""
    small = [f"vae.image_size={size}", "vae.hidden_size=16", "vae.num_tokens=4", "vae.num_heads=2"]
    config = load("arvae_tiny", small)
    torch.manual_seed(0)
    network = ARVAE(config.vae)
    with torch.no_grad():
        network.to_latents.bias.add_(bias)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "ema.safetensors")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A corpus and an AR-VAE."""
    folder = tmp_path_factory.mktemp("given")
    make_corpus(folder)
    make_arvae(folder / "arvae")
    return folder


def arguments(given: Path, out: Path, *more: str) -> list[str]:
    source = [] if "--frames" in more or "--corpus" in more else ["--corpus", str(given / "corpus.jsonl")]
    rest = ["--shard_mb", "0.012", "--batch_size", "8", "--decode_workers", "1"]
    return [*source, "--arvae", str(given / "arvae"), "--out", str(out), *rest, *more]


@pytest.fixture(scope="module")
def latents(given, tmp_path_factory) -> Path:
    """All videos, mirrored as well."""
    out = tmp_path_factory.mktemp("latents") / "out"
    assert main(arguments(given, out, "--flip", "--decode_workers", "2")) == 0
    return out


def array(sample: Sample, member: str = "latents.npy") -> np.ndarray:
    return np.load(io.BytesIO(sample.members[member]), allow_pickle=False)


def encoded(given: Path, video: CorpusEntry, stride: int = 1, flip: bool = False) -> np.ndarray:
    network = load_arvae(given / "arvae")[0]
    frames = decode(Path(video.path), video.first_frame, video.num_frames, stride)
    pixels = torch.from_numpy(np.stack([resize_and_crop(frame, SIZE) for frame in frames])).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        return network.encode((pixels.flip(-1) if flip else pixels).float() / 255)[0].numpy()


def test_latents_are_those_of_the_encoder(given, latents):
    entries = read_corpus(given / "corpus.jsonl")
    for split in SPLITS:
        samples = {sample.key: sample for sample in samples_in(split_folder(latents, split))}
        videos = [video for video in entries if video.split == split]
        assert sorted(samples) == [video.id for video in videos]
        for video in videos:
            for member, flip in (("latents.npy", False), ("flipped.npy", True)):
                found, wanted = array(samples[video.id], member), encoded(given, video, flip=flip)
                assert found.dtype == np.float16 and found.shape == (video.num_frames, 4, 4)
                np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=2e-3)
            info = samples[video.id].info
            assert (info["label"], info["num_frames"], info["stride"]) == (video.label, video.num_frames, 1)
            assert info["arvae"] == load_arvae(given / "arvae")[1]


def test_manifest_says_what_training_needs(given, latents):
    for split in SPLITS:
        folder = split_folder(latents, split)
        manifest = read_manifest(folder)
        everything = np.concatenate([array(sample).reshape(-1, 4) for sample in samples_in(folder)]).astype(np.float64)
        details = manifest.details
        np.testing.assert_allclose(details.pop("mean"), everything.mean(0), rtol=1e-9)
        np.testing.assert_allclose(details.pop("std"), everything.std(0), rtol=1e-9)
        arvae = {"id": load_arvae(given / "arvae")[1], "path": str(given / "arvae")}
        assert details == {
            **{"tokens": 4, "channels": 4, "size": SIZE, "flipped": True, "arvae": arvae, "split": split},
            **{"fps": 8.0, "stride": 1, "sampled_fps": None, "corpus_sha256": sha256(given / "corpus.jsonl")},
        }
    assert manifest.classes == ["jump", "run", "walk"]
    shards = open_shards(latents, "latents")
    assert len(shards.manifest.shards) > 2 and shards.has_flipped and not shards.has_text
    assert all(0.5 * 12_000 < shard.bytes < 2 * 12_000 for shard in shards.manifest.shards)


def test_frames_at_a_chosen_rate(given, tmp_path):
    for name, options in (("fps", ("--fps", "4")), ("stride", ("--stride", "2"))):
        assert main(arguments(given, tmp_path / name, *options)) == 0
    by_fps, by_stride = ({s.key: s for s in samples_in(tmp_path / name)} for name in ("fps", "stride"))
    for video in read_corpus(given / "corpus.jsonl"):
        if video.split == "train":
            assert by_fps[video.id].members == by_stride[video.id].members
            np.testing.assert_allclose(array(by_fps[video.id]), encoded(given, video, 2), atol=2e-3, rtol=2e-3)
    assert by_fps["000000"].info["sampled_fps"] == "4/1" and by_stride["000000"].info["stride"] == 2
    spaces = [LatentSpace.of(read_manifest(tmp_path / name), "unit") for name in ("fps", "stride")]
    assert [(space.fps, space.stride) for space in spaces] == [(4.0, 1), (4.0, 2)]


def test_shards_of_pictures_give_the_same_latents(given, tmp_path):
    made = ["--corpus", f"{given}/corpus.jsonl", "--size", str(SIZE), "--format", "png", "--fps", "4"]
    shard_videos.main([*made, "--out", f"{tmp_path}/frames", "--shard_mb", "0.05", "--workers", "1"])
    assert len(list((tmp_path / "frames").glob("*.tar"))) > 2
    assert main(arguments(given, tmp_path / "a", "--frames", f"{tmp_path}/frames")) == 0
    assert main(arguments(given, tmp_path / "b", "--fps", "4")) == 0
    for split in SPLITS:
        found, wanted = (
            {s.key: (s.info, s.members) for s in samples_in(split_folder(tmp_path / name, split))} for name in "ab"
        )
        assert found == wanted
        folders = (split_folder(tmp_path / name, split) for name in "ab")
        details, expected = (read_manifest(folder).details for folder in folders)
        for of_order in (details, expected):
            of_order["mean"], of_order["std"] = np.round(of_order["mean"], 6).tolist(), None
        assert details == expected

    (tmp_path / "frames" / "frames-000001.tar").open("r+b").write(b"?")
    assert main(arguments(given, tmp_path / "c", "--frames", f"{tmp_path}/frames")) == 1
    assert 0 < len(list(samples_in(tmp_path / "c"))) < len(list(samples_in(tmp_path / "a")))
    with pytest.raises(UserError, match=r"pictures of 32 x 32, but the AR-VAE is for 16 x 16; .* --size 16"):
        other = make_arvae(tmp_path / "arvae", 16)
        main(arguments(given, tmp_path / "d", "--frames", f"{tmp_path}/frames", "--arvae", str(other)))


def test_text_features_are_stored_beside_the_latents(given, tmp_path):
    videos = read_corpus(given / "corpus.jsonl")
    for number, video in enumerate(videos):
        np.save(tmp_path / f"{video.id}.npy", np.full((number + 1, 6), number, np.float32))
    assert main(arguments(given, tmp_path / "out", "--text", str(tmp_path))) == 0
    details = read_manifest(tmp_path / "out").details
    assert (details["text_dim"], details["text_tokens"]) == (6, 12)
    assert read_manifest(tmp_path / "out" / "validation").details["text_tokens"] == 5
    for sample in samples_in(tmp_path / "out"):
        number = int(sample.key)
        assert np.array_equal(array(sample, "text.npy"), np.full((number + 1, 6), number, np.float16))
    assert open_shards(tmp_path / "out", "latents").has_text
    (tmp_path / "000004.npy").unlink()
    with pytest.raises(UserError, match=r"no features for 1 of 12 videos \(the first is 000004\)"):
        main(arguments(given, tmp_path / "more", "--text", str(tmp_path)))


@pytest.mark.launcher
def test_unusable_videos_leave_the_others_as_they_are(given, latents, tmp_path):
    """One is changed, one breaks off in the middle, one brings its decoder down, one never answers."""
    shutil.copytree(given, tmp_path / "given")
    entries = [
        replace(video, path=video.path.replace(str(given), str(tmp_path / "given")))
        for video in read_corpus(given / "corpus.jsonl")
    ]
    changed, short = Path(entries[1].path), Path(entries[7].path)
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    entries[7] = replace(entries[7], num_frames=entries[7].num_frames + 50)  # more than it has
    for number, name in enumerate(("crash", "hang"), len(entries)):
        entries.append(entry(number, make_video(tmp_path / "given" / f"{name}.mp4", 5, number), 5))
    write_corpus(tmp_path / "given" / "corpus.jsonl", entries)
    run = arguments(tmp_path / "given", tmp_path / "out", "--flip", "--timeout", "6", "--shard_mb", "1")
    done = run_sabotaged(tmp_path, "data_tools.extract_latents", run)
    errors = done.stderr
    assert done.returncode == 1
    assert f"skipped {changed}: has changed since it was scanned" in errors
    assert f"skipped {short}: has 6 frames, so there is no frame 55" in errors
    assert f"{tmp_path}/given/crash.mp4: cannot be decoded (its process died (signal SIGSEGV))" in errors
    assert f"{tmp_path}/given/hang.mp4: cannot be decoded (no answer within 6 s)" in errors
    assert errors.endswith("4 files skipped\n")
    members = {sample.key: sample.members for sample in samples_in(latents)}
    assert {sample.key: sample.members for sample in samples_in(tmp_path / "out")} == {
        key: value for key, value in members.items() if key not in ("000001", "000007")
    }
    assert not [name for name in contents(tmp_path / "out") if ".tmp." in name]


def test_a_second_run_encodes_nothing(given, latents, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")}
    kept = contents(latents)
    monkeypatch.setattr("data_tools.sharding.encoding.Encoder.submit", lambda *_: pytest.fail("encodes"))
    assert main(arguments(given, latents, "--flip")) == 0
    assert {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")} == before
    assert contents(latents) == kept
    assert "frames/s" not in capsys.readouterr().out


def launcher(kind: str) -> list[str]:
    """A program on two ranks or, under plain python, on one."""
    if kind == "python":
        return [sys.executable, "-m", "data_tools.extract_latents"]
    port = str(random.SystemRandom().randint(20_000, 60_000))
    if kind == "torchrun":
        start = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port]
        return [*start, "-m", "data_tools.extract_latents"]
    start = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    return [*start, "data_tools/extract_latents.py"]


def environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{kept['PATH']}"}


def start(kind: str, options: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(kind), *options],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.launcher
@pytest.mark.parametrize("kind", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_ranks_give_the_same_bytes_as_one(given, latents, tmp_path, kind):
    process = start(kind, arguments(given, tmp_path / "out", "--flip"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(tmp_path / "out") == contents(latents)
    said = [line for line in output.splitlines() if line.startswith((str(tmp_path), "120 frames in "))]
    assert len(said) == 4, output


@pytest.mark.launcher
@pytest.mark.parametrize("kind", ["python", "torchrun"])
def test_killed_runs_complete_to_the_same_bytes(given, latents, tmp_path, kind):
    out = tmp_path / "out"
    process = start(kind, arguments(given, out, "--flip"))
    while not list(out.glob("*.tar")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists()
    kept = min(out.glob("*.done.json"), default=None)
    before = kept.stat().st_mtime_ns if kept else 0
    assert main(arguments(given, out, "--flip")) == 0
    assert contents(out) == contents(latents)
    assert kept is None or kept.stat().st_mtime_ns == before


@pytest.mark.launcher
@pytest.mark.slow
def test_mistakes_on_two_ranks_are_told_once_and_nobody_hangs(given, tmp_path):
    broken = make_arvae(tmp_path / "broken", bias=float("nan"))
    mistakes = {
        "no such folder": ("--arvae", str(tmp_path / "none")),
        "not finite": ("--arvae", str(broken)),
        "--arvae: needs a value": ("--arvae",),
    }
    running = {text: start("torchrun", arguments(given, tmp_path / "o", *more)) for text, more in mistakes.items()}
    for text, process in running.items():
        _, errors = process.communicate(timeout=120)
        told = [line for line in errors.splitlines() if "error: " in line]
        assert process.returncode != 0 and len(told) == 1 and text in told[0], errors
        assert not [line for line in errors.splitlines() if "File" in line and "data_tools" in line], errors


def test_mistakes_are_one_line(given, latents, tmp_path):
    mistakes = {
        "holds the results of other settings .*batch_size 8 -> 9": (latents, "--flip", "--batch_size", "9"),
        "flipped True -> None": (latents,),
        "--stride and --fps are for --corpus": (tmp_path / "o", "--frames", str(latents), "--stride", "2"),
        "holds latents, but frames are needed": (tmp_path / "o", "--frames", str(latents)),
        "--batch_size 0: must be at least 1": (tmp_path / "o", "--batch_size", "0"),
        "--device cuda:9: there are": (tmp_path / "o", "--device", "cuda:9"),
    }
    for expected, (out, *more) in mistakes.items():
        with pytest.raises(UserError, match=expected):
            main(arguments(given, out, *more))
    entries = [replace(video, sha256="0" * 64) for video in read_corpus(given / "corpus.jsonl")]
    write_corpus(tmp_path / "c.jsonl", entries)
    with pytest.raises(UserError, match="none of the videos could be used; scan them again"):
        main(arguments(given, tmp_path / "o", "--corpus", str(tmp_path / "c.jsonl")))
    assert "RANK" not in os.environ
