"""inspect_shards as it is called: output, exit codes, numbers, contact sheets, comparisons."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import CLASSES, LENGTHS, all_latents, decoded, picture, write_frames, write_latents
from mutations.sets import change, reseal, samples_of, write_frame_set, write_latent_set
from PIL import Image
from safetensors.torch import save_file

from ardiff.config import load, to_yaml
from ardiff.data.shards import Moments, Sample, encode_array, read_manifest, read_samples, write_manifest, write_shard
from ardiff.errors import UserError
from ardiff.models import ARVAE
from ardiff.training.weights import load_arvae
from data_tools.inspect_shards import main

REPOSITORY = Path(__file__).resolve().parents[2]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def latents(tmp_path) -> Path:
    write_latents(tmp_path / "latents")
    return tmp_path / "latents"


@pytest.fixture
def frames(tmp_path) -> Path:
    write_frames(tmp_path / "frames")
    return tmp_path / "frames"


def test_list(latents, frames, capsys):
    shutil.copytree(frames, frames / "validation")
    code, out, _ = run(capsys, "list", latents)
    assert code == 0
    lines = out.splitlines()
    sizes = [entry.bytes / 1e6 for entry in read_manifest(latents).shards]
    assert [line.split() for line in lines[2:5]] == [
        [f"latents-{number:06d}.tar", str(len(part)), str(sum(part)), f"{size:.2f}", "ok"]
        for number, (part, size) in enumerate(zip(LENGTHS, sizes, strict=True))
    ]
    assert "latents: 9 videos, 94 frames, 3 shards, 3.8 s at 25 frames per second" in lines[5]
    assert "2 tokens x 4 channels, AR-VAE 0000000000000000; 3 classes (wave 3, run 2, sit 2, without one 2)" in lines[5]
    code, out, _ = run(capsys, "list", frames)
    assert (code, out.count("frames: 3 videos, 10 frames, 2 shards")) == (0, 2)
    (latents / "latents-000001.tar").write_bytes(b"")
    (latents / "latents-000002.index.npy").unlink()
    code, out, _ = run(capsys, "list", latents)
    assert code == 1
    assert "latents-000001.tar has 0 bytes where the manifest says" in out
    assert "latents-000002.index.npy cannot be read (No such file or directory)" in out


def test_list_as_json(latents, capsys):
    code, out, _ = run(capsys, "list", latents, "--json")
    (value,) = json.loads(out)
    assert code == 0
    assert (value["kind"], value["videos"], value["frames"], value["seconds"]) == ("latents", 9, 94, 94 / 25)
    assert value["classes"] == {"run": 2, "sit": 2, "wave": 3, "": 2}
    assert [shard["problems"] for shard in value["shards"]] == [[]] * 3


def test_list_samples(tmp_path, capsys):
    write_latent_set(tmp_path / "data")
    code, out, _ = run(capsys, "list", "--samples", tmp_path / "data")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path}/data/latents-000000.tar",
        "  000000  3 frames  run  /videos/0.mp4  a ball",
        "  000001  1 frames  no class  /videos/1.mp4  a ball",
        f"{tmp_path}/data/latents-000001.tar",
        "  000002  2 frames  wave  /videos/2.mp4  a ball",
    ]
    code, out, _ = run(capsys, "list", "--samples", "--json", f"{tmp_path}/data/latents-000001.tar")
    assert json.loads(out) == {
        "shard": f"{tmp_path}/data/latents-000001.tar",
        "key": "000002",
        "frames": 2,
        "class": "wave",
        "caption": "a ball",
        "source": "/videos/2.mp4",
    }
    change(tmp_path / "data" / "latents-000001.tar", 0)
    code, out, err = run(capsys, "list", "--samples", tmp_path / "data")
    assert (code, "000001" in out, "header's checksum is wrong" in err) == (1, True, True)


def test_verify(latents, capsys):
    code, out, _ = run(capsys, "verify", latents, "--workers", 0)
    assert code == 0
    assert out == "0 problems in 3 shards in 1 data set (every sample): 9 sound videos, 94 frames\n"
    change(latents / "latents-000000.tar", 1556)
    for options in (("--workers", "1"), ("--workers", "0")):
        code, out, _ = run(capsys, "verify", latents, *options)
        assert code == 1
        assert out.splitlines() == [
            f"{latents}/latents-000000.tar: its sha256 is not the one that the manifest lists",
            f"{latents}/latents-000000.tar, byte 1536, sample 000000: latents.npy must be a float16 .npy array, "
            "not empty, in C order",
            "2 problems in 3 shards in 1 data set (every sample): 8 sound videos, 89 frames",
        ]
    code, out, _ = run(capsys, "verify", latents, "--workers", 0, "--json")
    value = json.loads(out)
    assert (code, value["problems"], value["shards"]) == (1, 2, 3)
    assert value["found"][1]["offset"] == 1536 and value["found"][1]["key"] == "000000"
    code, out, _ = run(capsys, "verify", latents, "--fast")
    assert code == 0
    assert out == "0 problems in 3 shards in 1 data set (files, sizes and indexes only): 9 videos, 94 frames\n"


def test_stats_of_latents(latents, capsys):
    code, out, _ = run(capsys, "stats", latents, "--workers", 0, "--json")
    (value,) = json.loads(out)
    assert code == 0
    values = np.concatenate(all_latents()).astype(np.float64).reshape(-1, 4)
    for name in ("mean", "std", "min", "max"):
        expected = getattr(values, name)(axis=0)
        np.testing.assert_allclose(value["channels"][name], expected, rtol=1e-9)
    assert value["channels"]["dead"] == []
    lengths = [length for part in LENGTHS for length in part]
    assert value["lengths"]["50"] == np.median(lengths)
    assert (value["videos"], value["frames"], value["rates"]) == (9, 94, {"25/1": 9})
    assert value["classes"] == {"run": 2, "sit": 2, "wave": 3, "": 2}
    code, out, _ = run(capsys, "stats", latents, "--workers", 1)
    assert "frames per video: min 1" in out and "dead channels (std below 0.001 of the largest): 0 of 4" in out


def test_dead_channels_and_bad_samples(tmp_path, capsys):
    array = np.random.default_rng(0).normal(size=(50, 2, 4)).astype(np.float16)
    array[..., 2] = 3
    moments = Moments(4)
    moments.add(array)
    samples = [Sample(f"{n}", {"class": 0}, {"latents.npy": encode_array(array)}) for n in range(3)]
    entry = write_shard(tmp_path, "x", samples, moments)
    details = {"tokens": 2, "channels": 4, "mean": [0.0] * 4, "std": [1.0] * 4, "arvae": {"id": "a", "path": "b"}}
    write_manifest(tmp_path, "latents", [entry], ["one"], details)
    code, out, _ = run(capsys, "stats", tmp_path, "--workers", 0)
    assert code == 0 and "dead channels (std below 0.001 of the largest): 1 of 4" in out
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content.replace(b'{"class": 0}', b'{"class": 7}', 1))
    code, out, err = run(capsys, "stats", tmp_path, "--workers", 0)
    assert code == 1 and "read: 2 videos, 100 frames" in out
    assert "not counted" in err and "sample 0: 0.json: its class is not one of the 1" in err


def test_stats_of_pictures(tmp_path, capsys):
    write_frame_set(tmp_path / "frames")
    (value,) = json.loads(run(capsys, "stats", tmp_path / "frames", "--workers", 0, "--json")[1])
    pictures = [d for s in samples_of(tmp_path / "frames").values() for n, d in s.items() if n != "json"]
    assert value["mean_bytes"] == np.mean(list(map(len, pictures)))
    assert value["pictures_decoded"] == len(pictures) == value["frames"] == 6
    assert value["brightness"]["mean"] == pytest.approx(np.mean([decoded(data).mean() / 255 for data in pictures]))
    assert value["resolutions"] == {"64 x 48": 3}
    assert "brightness of 6 pictures" in run(capsys, "stats", tmp_path / "frames", "--workers", 1)[1]


def test_repair(latents, tmp_path, capsys):
    code, out, _ = run(capsys, "repair", latents, "--out", tmp_path / "same", "--workers", 0)
    assert (code, out) == (0, f"{tmp_path}/same: 9 videos, 94 frames, 3 shards (0 changed); no video left out\n")
    rows = np.load(latents / "latents-000000.index.npy")
    change(latents / "latents-000000.tar", int(rows["offset"][2]))
    (latents / "latents-000001.tar").unlink()
    code, out, _ = run(capsys, "repair", latents, "--out", tmp_path / "new", "--workers", 1)
    assert code == 1
    assert out.splitlines() == [
        f"left out {latents}/latents-000000.tar, byte {rows['offset'][2]}, sample 000002: not what its checksum in the "
        "index says",
        f"left out {latents}/latents-000001.tar: missing; all of it is left out",
        f"{latents}/latents-000000.tar: the descriptions (KEY.json) of what was kept carry no checksum of their own",
        f"{tmp_path}/new: 6 videos, 51 frames, 2 shards (1 changed); 3 videos left out",
    ]
    assert run(capsys, "verify", tmp_path / "new", "--workers", 0)[0] == 0
    for tar in latents.glob("*.tar"):
        tar.unlink()
    code, out, _ = run(capsys, "repair", latents, "--out", tmp_path / "nothing", "--workers", 0)
    assert code == 1
    assert out.splitlines()[-1] == f"{tmp_path}/nothing: no manifest, as no sample is left"


def test_sheet_of_pictures(frames, tmp_path, capsys):
    code, out, _ = run(capsys, "sheet", frames, "--out", tmp_path / "sheet.png", "--num_videos", 2)
    assert code == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["000000", "000002"]  # far apart
    side = 96  # pictures of 16 pixels are enlarged
    for row, (video, length) in enumerate(((0, 3), (2, 6))):
        for frame in range(length):
            top, left = 2 + row * (side + 2), 2 + frame * (side + 2)
            shown = sheet[top : top + side : 6, left : left + side : 6]
            assert np.array_equal(shown, decoded(picture(video, frame, 16)))
    code, out, _ = run(capsys, "sheet", frames, "--out", tmp_path / "one.png", "--shard", "frames-000001")
    assert code == 0 and len(out.splitlines()) == 2
    (frames / "frames-000000.tar").unlink()
    code, out, err = run(capsys, "sheet", frames, "--out", tmp_path / "sheet.png")
    assert code == 1 and "not shown" in err and "frames-000000.tar: cannot be read" in err
    assert out.splitlines()[0].split()[0] == "000002"  # what is good is shown
    change(frames / "frames-000001.tar", 0)
    with pytest.raises(UserError, match="none of the chosen videos can be shown"):
        main(["sheet", str(frames), "--out", str(tmp_path / "sheet.png")])


def make_arvae(folder: Path) -> Path:
    """An untrained auto-encoder of 32 pixels, 4 tokens and a few channels, as an export."""
    config = load("arvae_tiny", ["vae.image_size=32", "vae.hidden_size=16", "vae.num_tokens=4", "vae.num_heads=2"])
    torch.manual_seed(0)
    network = ARVAE(config.vae)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "ema.safetensors")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def test_sheet_of_latents(tmp_path, capsys):
    network, arvae_id = load_arvae(make_arvae(tmp_path / "arvae"))
    tokens, channels = network.config.num_tokens, network.config.channels
    write_latents(tmp_path / "data", [(20, 3)], tokens=tokens, channels=channels)
    path = tmp_path / "data" / "manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "arvae": {"id": arvae_id, "path": str(tmp_path / "arvae")}}))
    assert run(capsys, "sheet", tmp_path / "data", "--out", tmp_path / "sheet.png")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 2 * 98, 2 + 16 * 98, 3)
    latents = next(iter(read_samples(tmp_path / "data" / "latents-000000.tar"))).members["latents.npy"]
    array = np.frombuffer(latents[128:], "<f2").reshape(20, tokens, channels).astype(np.float32)
    with torch.no_grad():
        last = network.decode(torch.from_numpy(array[-1:])[None])[0, 0].clamp(0, 1).mul(255).round().byte()
    assert np.array_equal(sheet[2:98:3, 2 + 15 * 98 : -2 : 3], last.permute(1, 2, 0).numpy())
    path.write_text(json.dumps({**value, "arvae": {"id": arvae_id, "path": "nowhere"}}))
    with pytest.raises(UserError, match=r"nowhere: the AR-VAE of these latents is not there; name it with --arvae"):
        main(["sheet", str(tmp_path / "data"), "--out", str(tmp_path / "sheet.png")])
    again = tmp_path / "again.png"
    assert run(capsys, "sheet", tmp_path / "data", "--out", again, "--arvae", tmp_path / "arvae")[0] == 0
    assert np.array_equal(np.asarray(Image.open(again)), sheet)
    path.write_text(json.dumps({**value, "arvae": {"id": "another", "path": "nowhere"}}))
    with pytest.raises(UserError, match="cannot decode latents made by AR-VAE another"):
        main(["sheet", str(tmp_path / "data"), "--out", str(again), "--arvae", str(tmp_path / "arvae")])


def test_compare(tmp_path, capsys):
    write_latent_set(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    command = ("compare", tmp_path / "one", tmp_path / "two", "--workers", 0)
    assert run(capsys, *command) == (0, "train: equal, 3 videos\n", "")

    # video 1 has another caption and other values, video 2 is gone, a setting is another
    manifest = read_manifest(tmp_path / "two")
    samples = list(read_samples(tmp_path / "two" / "latents-000000.tar"))
    array = np.full((1, 2, 4), 7, np.float16)
    samples[1].members["latents.npy"] = encode_array(array)
    samples[1].info["caption"] = "two balls"
    entries = [write_shard(tmp_path / "two", "latents-000000", samples, Moments(4)), manifest.shards[1]]
    extra = next(iter(read_samples(tmp_path / "two" / "latents-000001.tar")))
    extra.info["sha256"] = "f" * 64
    entries[1] = write_shard(tmp_path / "two", "latents-000001", [extra], Moments(4))
    write_manifest(tmp_path / "two", "latents", entries, [*CLASSES, "x"], {**manifest.details, "stride": 2})
    assert reseal(tmp_path / "two", keep_index=False)
    code, out, err = run(capsys, *command)
    assert (code, err) == (1, "")
    one, two = tmp_path / "one", tmp_path / "two"
    lines = out.splitlines()
    assert lines[:7] == [
        "train: setting stride: null and 2",
        "train: 1 class only in the second: x",
        "train: 2 and 2 shards, 0 of them in common",
        f"train: 1 video only in {one}: 000002",
        f"train: 1 video only in {two}: 000002",
        "train: 1 video of the 2 common ones with other content: 000001",
        "train: 1 video of the 2 common ones with another description: 000001",
    ]
    assert lines[7] == "train: descriptions differ in caption 1"
    assert lines[8].startswith("train: means differ by up to ")
    value = json.loads(run(capsys, *command, "--json")[1])
    assert value["equal"] is False
    assert value["splits"][0]["content"] == ["000001"]
    before, after = (np.array(read_manifest(folder).details["mean"]) for folder in (one, two))
    std = np.array(read_manifest(one).details["std"])
    assert value["splits"][0]["mean"] == pytest.approx((np.abs(after - before) / std).max())


def test_compare_names_missing_splits_and_unreadable_shards(latents, tmp_path, capsys):
    shutil.copytree(latents, tmp_path / "other")
    shutil.copytree(latents, tmp_path / "other" / "validation")
    code, out, _ = run(capsys, "compare", latents, tmp_path / "other", "--workers", 1)
    assert (code, out) == (1, f"train: equal, 9 videos\nvalidation: not in {latents}\n")
    shutil.rmtree(tmp_path / "other" / "validation")
    (tmp_path / "other" / "latents-000001.index.npy").unlink()
    code, out, err = run(capsys, "compare", latents, tmp_path / "other", "--workers", 0)
    assert code == 1 and "not compared" in err and "2 videos only in" in out


def test_segments_of_one_video_are_told_apart(tmp_path, capsys):
    moments = Moments(4)
    array = np.ones((3, 2, 4), np.float16)
    moments.add(array)
    for folder, starts in (("one", (0, 50)), ("two", (0, 60))):
        samples = [
            Sample(f"{i}", {"sha256": "a" * 64, "first_frame": start}, {"latents.npy": encode_array(array)})
            for i, start in enumerate(starts)
        ]
        entry = write_shard(tmp_path / folder, "x", samples, moments)
        details = {"tokens": 2, "channels": 4, "mean": [1.0] * 4, "std": [0.0] * 4, "arvae": {"id": "a", "path": "b"}}
        write_manifest(tmp_path / folder, "latents", [entry], [], details)
    out = run(capsys, "compare", tmp_path / "one", tmp_path / "two", "--workers", 0)[1]
    assert f"1 video only in {tmp_path}/one: 1\n" in out


def test_mistakes_are_one_line_and_exit_code_2(latents, tmp_path):
    mistakes = {
        "no such folder, manifest or tar files": ["verify", tmp_path / "none"],
        "manifest.json: not found": ["list", tmp_path],
        "not among the 3 shards": ["stats", latents / "x.tar"],
        "--workers -1: must be at least 0": ["verify", latents, "--workers", "-1"],
        "--num_videos 0: must be at least 1": ["sheet", latents, "--out", tmp_path / "x.png", "--num_videos", "0"],
        "must be a .png file": ["sheet", latents, "--out", tmp_path / "x.jpg"],
        "--shard x: .* but not this": ["sheet", latents, "--out", tmp_path / "x.png", "--shard", "x"],
        "names latents-000001.tar more than once": ["verify", latents / "latents-{000001,000001}.tar"],
        "must lie apart": ["repair", latents, "--out", latents / "new"],
    }
    for expected, arguments in mistakes.items():
        with pytest.raises(UserError, match=expected):
            main([str(argument) for argument in arguments])
    (latents / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"not a manifest of shards \(it is not JSON: .* at line 1, column 2\)"):
        main(["repair", str(latents), "--out", str(tmp_path / "out")])
    command = [sys.executable, "-m", "data_tools.inspect_shards", "list", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/none: no such folder, manifest or tar files\n"
