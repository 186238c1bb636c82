"""Networks from runs, checkpoints and exports, under each of their averages."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import write_frames, write_latents
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import launch.evaluate
import launch.export
import launch.sample
from ardiff.config import Config, load, to_yaml
from ardiff.errors import UserError
from ardiff.files import sha256, write_json
from ardiff.models import build_arvae, build_dit
from ardiff.training import checkpoint
from ardiff.training.checkpoint import State
from ardiff.training.weights import export, load_arvae, load_dit, read_weights, vector_of, write_export

DECAYS = [0.99, 0.999, 0.9]
SETTINGS = [f"train.ema_decay={DECAYS[0]}", f"train.extra_ema_decays={DECAYS[1:]}"]
VECTORS = ("ema", "ema_0.999", "ema_0.9", "master")
ARVAE = [
    *("vae.image_size=16", "vae.patch_size=4", "vae.num_tokens=2", "vae.channels=4", "vae.hidden_size=16"),
    *("vae.encoder_depth=1", "vae.decoder_depth=1", "vae.num_heads=2"),
]
DIT = [
    *("model.num_frames=4", "model.tokens_per_frame=2", "model.in_channels=4", "model.hidden_size=16"),
    *("model.depth=1", "model.num_heads=2", "sampling.num_steps=2", "sampling.gap=1"),
]
ADDED = dict(zip(VECTORS, (0.0, 0.01, 0.02, 0.03), strict=True))  # to all parameters


def write_checkpoint(
    run: Path,
    config: Config,
    network: nn.Module,
    space: dict | None,
    decays: list[float] | None = None,
    buffers: bytes | None = None,
) -> Path:
    """A checkpoint of one group in two slices, one of them empty; its vectors differ by ADDED.

    decays: other than DECAYS. buffers: instead of the first file.
    """
    folder = checkpoint.step_directory(run, 7)
    folder.mkdir(parents=True)
    found = list(network.named_parameters())
    flat = torch.cat([value.detach().flatten() for _, value in found])
    slices = [(0, 0), (0, len(flat))]
    for rank, (start, end) in enumerate(slices):
        tensors = {f"group0.{name}": flat[start:end] + more for name, more in ADDED.items()}
        if rank == 0:
            tensors |= {f"buffer.network.{name}": value.clone() for name, value in network.named_buffers()}
        save_file(tensors, folder / checkpoint.rank_file(rank))
    if buffers is not None:
        (folder / checkpoint.rank_file(0)).write_bytes(buffers)
    state = State(
        step=7,
        samples=7,
        skipped_steps=0,
        adam_steps=[7],
        ema_updates=[7],
        ema_decays=DECAYS if decays is None else decays,
        seed=0,
        order="global",
        data_identity="d",
        precision="fp32",
        world_size=2,
        layout=[[(f"network.{name}", list(value.shape)) for name, value in found]],
        slices=[[part] for part in slices],
        latent_space=space,
    )
    write_json(folder / "state.json", vars(state))
    (folder / "config.yaml").write_text(to_yaml(config))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
    write_json(folder / "MANIFEST.json", {"format": checkpoint.FORMAT_VERSION, "files": files})
    return folder


def arvae_run(run: Path, **options) -> tuple[Path, nn.Module]:
    config = load("arvae_tiny", [*ARVAE, *SETTINGS])
    torch.manual_seed(1)
    network = build_arvae(config.vae)
    write_checkpoint(run, config, network, None, **options)
    return run, network


def dit_run(run: Path, arvae: Path, arvae_id: str) -> Path:
    config = load("tiny", [*DIT, *SETTINGS])
    space = {"normalize": "unit", "mean": [0.0] * 4, "std": [1.0] * 4, "arvae_id": arvae_id, "arvae_path": str(arvae)}
    space |= {"fps": None, "stride": 1, "classes": []}
    torch.manual_seed(2)
    write_checkpoint(run, config, build_dit(config.model, config.diffusion.prediction), space)
    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Runs of an AR-VAE and of a diffusion transformer, and their exports."""
    work = tmp_path_factory.mktemp("weights")
    arvae_run(work / "arvae")
    dit_run(work / "dit", work / "arvae", load_arvae(work / "arvae")[1])
    for name in ("arvae", "dit"):
        export(work / name, work / f"exported_{name}")
    return work


def parameters(network: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in network.parameters()])


@pytest.mark.parametrize("source", ["arvae", "arvae/checkpoints/step_00000007", "exported_arvae"])
def test_every_vector_is_read_from_runs_checkpoints_and_exports(work, source):
    torch.manual_seed(1)
    plain = parameters(build_arvae(load("arvae_tiny", ARVAE).vae))
    ids = {}
    for vector, added in ADDED.items():
        network, ids[vector] = load_arvae(work / source, vector)
        assert torch.equal(parameters(network), plain + added)
    assert len(set(ids.values())) == 4  # other weights, other latents
    assert load_arvae(work / source)[1] == ids["ema"] == load_arvae(work / source, "ema_0.99")[1]
    assert ids["ema_0.9"] == load_arvae(work / "arvae", "ema_0.9")[1]


@pytest.mark.parametrize("source", ["dit", "exported_dit"])
def test_a_vector_that_is_not_held_is_refused_with_a_list_of_those_that_are(work, source):
    with pytest.raises(UserError) as caught:
        load_dit(work / source, "ema_0.5")
    listed = "ema (decay 0.99), ema_0.999, ema_0.9, master" if source == "dit" else None
    listed = listed or "ema (decay 0.99), ema_0.9, ema_0.999, master"
    folder = work / "dit/checkpoints/step_00000007" if source == "dit" else work / source
    assert str(caught.value) == f"{folder}: holds no weights ema_0.5, but {listed}; choose one of these"


def test_checkpoints_of_before_there_were_several_averages(tmp_path):
    run, network = arvae_run(tmp_path / "run", decays=[])
    assert torch.equal(parameters(load_arvae(run, "ema_0.99")[0]), parameters(network))
    with pytest.raises(UserError, match=r"holds no weights ema_0\.999, but ema \(decay 0\.99\), master; choose"):
        read_weights(run, "ema_0.999")
    export(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("ema.safetensors", "model.safetensors", "config.yaml")
    }


def test_an_export_holds_all_vectors_and_nothing_of_an_earlier_one(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("ema_0.5.safetensors", "ema_1e-05.safetensors", "ema_notes.safetensors", "latent_space.json"):
        (out / name).write_bytes(b"old")
    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(work / "arvae"), "--out", str(out)])
    assert launch.export.main() == 0 and "step_00000007 exported to" in capsys.readouterr().out
    weights = ("ema.safetensors", "ema_0.999.safetensors", "ema_0.9.safetensors", "model.safetensors")
    assert {path.name for path in out.iterdir()} == {*weights, "config.yaml", "ema_notes.safetensors"}
    for vector, name in zip(VECTORS, weights, strict=True):
        expected = read_weights(work / "arvae", vector).weights
        found = load_file(out / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    stored = read_weights(out)
    write_export(out, lambda vector: stored)  # of converted weights, which have no further averages
    assert not list(out.glob("ema_0*"))


def test_an_export_may_have_another_main_average(work, tmp_path):
    out = tmp_path / "out"
    export(work / "arvae", out, decay=0.999)
    for vector, decay in (("ema", 0.999), ("ema_0.99", 0.99), ("ema_0.9", 0.9), ("master", None)):
        expected = read_weights(work / "arvae", vector if decay is None else f"ema_{decay}").weights
        found = read_weights(out, vector)
        assert all(torch.equal(found.weights[key], expected[key]) for key in expected)
        assert (found.config.train.ema_decay, found.config.train.extra_ema_decays) == (0.999, [0.99, 0.9])
    assert load_arvae(out)[1] == load_arvae(work / "arvae", "ema_0.999")[1]
    before = sorted(out.iterdir())
    with pytest.raises(UserError, match=r"holds no weights ema_0\.5, but ema \(decay 0\.99\), ema_0\.999"):
        export(work / "arvae", out, decay=0.5)
    assert sorted(out.iterdir()) == before


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [b"", b"cut", pickle.dumps(Hostile())], ids=["empty", "cut", "pickle"])
def test_files_that_are_not_what_they_should_be_are_named(work, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    export(work / "dit", tmp_path / "out")
    for vector, name in (("ema", "ema"), ("ema_0.9", "ema_0.9"), ("master", "model")):
        path = tmp_path / "out" / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not what it should be .*; export again") as caught:
            load_dit(tmp_path / "out", vector)
        assert str(caught.value).startswith(f"{path}: ")
    (tmp_path / "out" / "latent_space.json").write_bytes(content)
    with pytest.raises(UserError, match=r"out/latent_space\.json: not what it should be"):
        load_dit(tmp_path / "out", "ema_0.999")
    run, _ = arvae_run(tmp_path / "run", buffers=content)  # whose manifest is right
    with pytest.raises(UserError, match=r"step_00000007/state_rank0\.safetensors: not what it should be"):
        load_arvae(run)
    assert not Path("executed").exists()


def test_what_the_options_mean():
    assert vector_of("ema", None) == "ema" and vector_of("master", None) == "master"
    assert vector_of("ema", 0.999) == "ema_0.999" and vector_of("ema", 0) == "ema_0.0"
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=rf"--ema {decay}: must be the decay of an average"):
            vector_of("ema", decay)
    with pytest.raises(UserError, match=r"--ema 0\.9: means averaged weights, but --weights master"):
        vector_of("master", 0.9)


@pytest.fixture
def run_program(monkeypatch, tmp_path):
    """Runs a program's main and returns the JSON that it writes."""

    def run(program, result: str, *words):
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
        assert program.main() == 0
        return json.loads((tmp_path / result).read_text())

    return run


@pytest.mark.parametrize("source", ["dit", "exported_dit"])
def test_samples_of_a_chosen_average(work, tmp_path, run_program, source):
    def sampled(name, *words):
        asked = ("--run", work / source, "--num_videos", 1, "--out", tmp_path / name, *words)
        settings = run_program(launch.sample, f"{name}/samples.json", *asked)
        return settings, (tmp_path / name / "latents.npy").read_bytes()

    plain, main = sampled("main")
    same, synonym = sampled("synonym", "--ema", "0.99")
    other, further = sampled("further", "--ema", "0.999")
    assert main == synonym != further
    assert [settings["ema"] for settings in (plain, same, other)] == [None, 0.99, 0.999]
    with pytest.raises(UserError, match=r"holds no weights ema_0\.5, but ema \(decay 0\.99\), "):
        sampled("none", "--ema", "0.5")
    assert not (tmp_path / "none").exists()


def test_evaluation_of_a_chosen_average(work, tmp_path, run_program):
    write_latents(tmp_path / "latents", ((6, 5), (7,)))
    dit_run(tmp_path / "dit", work / "arvae", "0" * 16)  # of these latents
    write_frames(tmp_path / "frames", ((3,),))
    out = ("--out", tmp_path / "out.json")
    asked = ("--run", tmp_path / "dit", "--data", tmp_path / "latents", "--num_videos", 2, *out)
    main = run_program(launch.evaluate, "out.json", *asked)
    further = run_program(launch.evaluate, "out.json", *asked, "--ema", "0.9")
    assert (main["ema"], main["weights"], further["ema"]) == (None, "ema", 0.9)
    assert main["frechet"]["samples"] != further["frechet"]["samples"]
    asked = ("--arvae", work / "exported_arvae", "--data", tmp_path / "frames", *out)
    main = run_program(launch.evaluate, "out.json", *asked)
    further = run_program(launch.evaluate, "out.json", *asked, "--ema", "0.9")
    assert (main["settings"]["ema"], further["settings"]["ema"]) == (None, 0.9)
    assert further["arvae"]["id"] == load_arvae(work / "arvae", "ema_0.9")[1] != main["arvae"]["id"]
