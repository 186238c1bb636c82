"""The converter: published files in, folders that programs take as a run out, and back again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reference_golden import NETWORK, SMALL_ARVAE, like, rebuilt
from safetensors.torch import load_file, save_file

import launch.convert
from ardiff.compat.reference import ReferenceARVAE, ReferenceDiT, load_arvae, load_dit, to_reference
from ardiff.compat.reference.export import process_buffers
from ardiff.compat.reference.options import model_config, vae_config
from ardiff.config import load, to_yaml
from ardiff.data.latent_space import LatentSpace
from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.sampling.decoder import Decoder
from ardiff.training import weights

ROOT = Path(__file__).resolve().parents[2]
DIT = {
    "num_frames": 3,
    "n_token_per_frame": 6,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "learn_sigma": False,
    "merge_mode": "share_norm",
    "causal_attn_mode": "video_temporal_causal",
}
SMALL_BETAS = {"beta_start": 8.5e-4, "beta_end": 0.012}


def published_dit(classes=0, betas=SMALL_BETAS, **options):
    """A whole file as accelerate writes it."""
    network = ReferenceDiT(model_config(DIT | options))
    found = {f"module.{NETWORK}{name}": value for name, value in like(network).items()}
    found |= {f"module.diffusion_model.{key}": value for key, value in process_buffers(Schedule(**betas)).items()}
    name, shape = ("class_emb", (classes + 1, 77, 768)) if classes else ("context_emb", (77, 768))
    return found | {f"module.{name}": rebuilt(name, shape)}


def published_arvae(prefix="", **options):
    return {f"{prefix}{name}": value for name, value in like(ReferenceARVAE(vae_config(SMALL_ARVAE | options))).items()}


def reference_yaml(path, **params):
    """Settings as in the reference's repository."""
    process = {"parameterization": "v", "linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000}
    tree = {"noise_level": "diff_forcing", "model_cfg": {"params": DIT}, "diffusion_cfg": {"params": process}, **params}
    path.write_text(yaml.safe_dump({"model": {"target": "src.ardiff.base.BaseModel", "params": tree}}))
    return path


def convert(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    assert launch.convert.main() == 0


@pytest.fixture
def files(tmp_path, small_networks):
    save_file(published_dit(), tmp_path / "dit.safetensors")
    torch.save(published_arvae("module."), tmp_path / "vae.bin")
    reference_yaml(tmp_path / "settings.yaml")
    return tmp_path


def words(files, **changes):
    options = {
        "dit": "dit.safetensors",
        "arvae": "vae.bin",
        "reference_config": "settings.yaml",
        "out": "run",
    } | changes
    return [
        word for key, value in options.items() if value is not None for word in (f"--{key}", str(files / str(value)))
    ]


def test_a_converted_model_is_a_run(files, monkeypatch):
    convert(monkeypatch, *words(files))
    network, config, space = weights.load_dit(files / "run")
    diffusion = config.diffusion
    assert (diffusion.prediction, diffusion.timesteps) == ("v", "independent")
    assert (diffusion.beta_start, diffusion.beta_end) == (8.5e-4, 0.012)
    assert (config.model.architecture, config.model.mask, config.model.context) == (
        "reference",
        "frame_causal",
        "leaky",
    )
    assert (space.normalize, space.classes, space.arvae_path) == ("unit", [], str(files / "run" / "arvae"))
    direct = load_dit(load_file(files / "dit.safetensors"), DIT)
    x, t = torch.randn(2, 3, 6, 4), torch.tensor([[5, 400, 999], [0, 1, 2]])
    with torch.no_grad():
        assert torch.equal(network(x, t), direct.as_model("v")(x, t))
        assert torch.equal(network(x, t), direct(x, t, rebuilt("context_emb", (77, 768)).expand(2, -1, -1)))
    assert weights.load_dit(files / "run", "master")[0].state_dict().keys() == network.state_dict().keys()
    decoder = Decoder(space)
    assert decoder.image_size == 32
    with torch.no_grad():
        pictures = load_arvae(torch.load(files / "vae.bin"), SMALL_ARVAE).decode(x).clamp(0, 1).mul(255).round()
    assert np.array_equal(decoder.decode(x), pictures.byte().permute(0, 1, 3, 4, 2).numpy())


def test_a_conversion_can_be_repeated(files, monkeypatch):
    contents = []
    for _ in range(2):
        convert(monkeypatch, *words(files))
        paths = sorted(path for path in (files / "run").rglob("*") if path.is_file())
        contents.append({path: path.read_bytes() for path in paths})
    assert len(contents[0]) >= 6 and contents[0] == contents[1]


def test_the_way_back_gives_the_same_file(files, monkeypatch):
    convert(monkeypatch, *words(files))
    back = files / "back.safetensors"
    convert(monkeypatch, "--to_reference", files / "run", "--out", back, "--prefix", f"module.{NETWORK}")
    original, found = load_file(files / "dit.safetensors"), load_file(back)
    assert found.keys() == original.keys() | {f"module.{NETWORK}pos_embed"}
    assert all(torch.equal(found[name], value) for name, value in original.items())
    assert json.loads((files / "back.json").read_text())["config"] == DIT | {
        "mlp_ratio": 4.0,
        "context_dim": 768,
        "context_token": 77,
        "use_rotary_emb": False,
        "qk_norm": False,
    }
    convert(monkeypatch, "--to_reference", files / "run", "--out", back)
    assert f"{NETWORK}x_embedder.bias" in load_file(back)
    convert(monkeypatch, "--to_reference", files / "run" / "arvae", "--out", back)
    expected = {name.removeprefix("module."): value for name, value in torch.load(files / "vae.bin").items()}
    found = load_file(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again = words(
        files, dit=None, reference_config=None, arvae="back.safetensors", out="again", arvae_config="back.json"
    )
    convert(monkeypatch, *again)
    assert weights.load_arvae(files / "again")[1] == weights.load_arvae(files / "run" / "arvae")[1]


def test_classes_and_their_names(files, monkeypatch, capsys):
    save_file(published_dit(classes=3), files / "dit.safetensors")
    (files / "names.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n3 YoYo\n")
    convert(monkeypatch, *words(files), "--classes", files / "names.txt", "--fps", "25")
    network, config, space = weights.load_dit(files / "run")
    assert space.classes == ["ApplyEyeMakeup", "Archery", "YoYo"]
    assert (config.model.num_classes, space.fps) == (3, 25.0)
    assert torch.equal(network.dit.class_emb, rebuilt("class_emb", (4, 77, 768)))
    assert "has 3 classes" in capsys.readouterr().out
    (files / "names.txt").write_text("1 ApplyEyeMakeup\n")
    with pytest.raises(UserError, match="names 1 classes, the checkpoint has 3"):
        convert(monkeypatch, *words(files), "--classes", files / "names.txt")


def test_the_betas_of_the_checkpoint_win(files, monkeypatch, capsys):
    save_file(published_dit(betas={"beta_start": 1e-4, "beta_end": 0.02}), files / "dit.safetensors")
    convert(monkeypatch, *words(files))
    diffusion = weights.load_dit(files / "run")[1].diffusion
    assert (diffusion.beta_start, diffusion.beta_end) == (1e-4, 0.02)
    assert "taken from there" in capsys.readouterr().out


def test_the_auto_encoder_inside_the_file_is_found(files, monkeypatch):
    save_file(published_dit() | published_arvae("module.vae.", num_frame=16), files / "dit.safetensors")
    convert(monkeypatch, *words(files, arvae=None))
    _, config, space = weights.load_dit(files / "run")
    assert config.vae.reference.temporal
    assert weights.load_arvae(Path(space.arvae_path))[0].temporal


def test_one_auto_encoder_serves_several_models(files, monkeypatch):
    convert(monkeypatch, *words(files, dit=None, reference_config=None, out="vae"))
    convert(monkeypatch, *words(files, arvae="vae"))
    _, config, space = weights.load_dit(files / "run")
    assert config.vae == weights.load_arvae(files / "vae")[0].config
    assert (space.arvae_path, space.arvae_id) == (str(files / "vae"), weights.load_arvae(files / "vae")[1])
    assert not (files / "run" / "arvae").exists()


def test_an_auto_encoder_of_other_latents_is_refused(files, monkeypatch):
    torch.save(published_arvae(num_latent_tokens=5), files / "vae.bin")
    with pytest.raises(UserError, match="6 tokens x 4 channels, but the auto-encoder has 5 x 4"):
        convert(monkeypatch, *words(files))


def test_presets_and_overrides_describe_the_network(files, monkeypatch):
    sizes = ["num_frames=3", "tokens_per_frame=6", "hidden_size=32", "depth=2", "num_heads=2"]
    overrides = [f"--model.{size}" for size in sizes]
    convert(monkeypatch, "--config", "reference_vpred_smalln", *overrides, *words(files, reference_config=None))
    config = weights.load_dit(files / "run")[1]
    assert config.model == model_config(DIT)
    assert config.diffusion.prediction == "v"


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"dit": None, "arvae": None}, [], "nothing to convert"),
        ({"dit": "nowhere.safetensors"}, [], r"nowhere\.safetensors: no such file"),
        ({"arvae": None}, [], r"holds no vae\.\*"),
        ({"reference_config": None}, ["--model.depth", "2"], "does not fit its configuration"),
        ({"reference_config": None}, ["--config", "tiny"], "model.architecture = ardiff"),
        ({"reference_config": "vae.bin"}, [], r"vae\.bin: cannot be read as YAML"),
        ({"arvae": "dit.safetensors"}, [], "not the weights of a published AR-VAE"),
        ({}, ["--fps", "nan"], "must be a number above 0"),
        ({}, ["--to_reference", "x"], "leave out --dit and --arvae"),
    ],
)
def test_mistakes_are_told(changes, extra, message, files, monkeypatch):
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, *words(files, **changes), *extra)


def test_a_network_without_its_embedding_is_refused(files, monkeypatch):
    found = published_dit()
    del found["module.context_emb"]
    save_file(found, files / "dit.safetensors")
    with pytest.raises(UserError, match="holds no context_emb or class_emb"):
        convert(monkeypatch, *words(files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "must hold settings by name"),
        ("model: {params: {model_cfg: {params: {depht: 2}}}}\n", "did you mean 'depth'"),
        ("model: {params: {noise_level: x, diffusion_cfg: {params: {timesteps: 9}}}}\n", "no argument model"),
    ],
)
def test_settings_that_are_none_are_refused(content, message, files, monkeypatch):
    (files / "settings.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"settings\.yaml.*{message}"):
        convert(monkeypatch, *words(files))


def test_an_unknown_noise_level_is_refused(files, monkeypatch):
    reference_yaml(files / "settings.yaml", noise_level="sorted")
    with pytest.raises(UserError, match=r"settings\.yaml: .*'sorted'"):
        convert(monkeypatch, *words(files))


def test_networks_of_ours_have_no_place_in_the_published_format(tmp_path, monkeypatch):
    config = load("tiny")
    network = build_dit(config.model)
    space = LatentSpace("unit", [0.0] * 4, [1.0] * 4, "0", "nowhere", None, 1, [])
    stored = weights.Stored(network.state_dict(), config, tmp_path, space.as_json())
    weights.write_export(tmp_path / "ours", lambda vector: stored)
    with pytest.raises(UserError, match="architecture = reference"):
        convert(monkeypatch, "--to_reference", tmp_path / "ours", "--out", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"must be a \.safetensors file"):
        convert(monkeypatch, "--to_reference", tmp_path / "ours", "--out", tmp_path / "x")


def test_an_untrained_network_starts_as_the_reference_does():
    config = load("reference_ucf_class", ["model.depth=1", "model.hidden_size=32", "model.num_heads=2"])
    torch.manual_seed(0)
    model = build_dit(config.model, "x0")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & {"dit.class_emb", "dit.context_emb", "dit.pos_embed"}
    assert model.dit.class_emb.shape == (102, 77, 768)
    assert float(model.dit.class_emb.std()) == pytest.approx(0.1, rel=0.01)
    x = torch.randn(1, 16, 32, 4)
    assert not model(x, torch.zeros(1, 16, dtype=torch.long)).any()  # the last layer starts at zero
    model.dit.final_layer[1].weight.data.normal_()
    assert model(x, torch.zeros(1, 16, dtype=torch.long)).any()


def test_ids_of_our_auto_encoders_do_not_depend_on_new_settings():
    config = load("arvae_tiny")
    described = weights._description(config.vae)
    assert described == (
        "VAEConfig(image_size=64, patch_size=8, num_tokens=32, channels=4, hidden_size=64, encoder_depth=2, "
        "decoder_depth=2, num_heads=4, kl_weight=0.0003, l1_weight=0.2)"
    )
    other = load("arvae_tiny", ["vae.architecture=reference"]).vae
    assert weights._description(other) != described


def test_converted_settings_survive_a_round_trip(files, monkeypatch):
    convert(monkeypatch, *words(files))
    config = load(str(files / "run" / "config.yaml"))
    assert to_yaml(config) == (files / "run" / "config.yaml").read_text()


@pytest.mark.launcher
def test_published_files_become_videos(tmp_path):
    """As a user would: the converter, then the sampler, on networks of the real architecture."""
    arvae = ReferenceARVAE(vae_config(SMALL_ARVAE | {"image_size": 64, "num_latent_tokens": 32})).state_dict()
    arguments = DIT | {"n_token_per_frame": 32, "num_frames": 4}
    network = like(ReferenceDiT(model_config(arguments)))
    dit = {f"{NETWORK}{name}": value for name, value in network.items()}
    dit |= {"context_emb": rebuilt("context_emb", (77, 768))}
    save_file(dit, tmp_path / "model.safetensors")
    save_file(arvae, tmp_path / "vae.safetensors")
    (tmp_path / "arguments.json").write_text(json.dumps({"config": arguments}))
    convert_words = ["--dit", "model.safetensors", "--arvae", "vae.safetensors", "--reference_config", "arguments.json"]
    sample_words = ["--num_videos", "2", "--num_frames", "6", "--steps", "4", "--gap", "2", "--out", "samples"]
    for program, options in (
        ("convert.py", [*convert_words, "--out", "run"]),
        ("sample.py", ["--run", "run", *sample_words]),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / program), *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    latents = np.load(tmp_path / "samples" / "latents.npy")
    assert latents.shape == (2, 6, 32, 4)
    assert np.isfinite(latents).all()
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_export_is_what_the_importer_of_the_reference_expects():
    network = load_dit(published_dit(), DIT)
    assert all(value.is_contiguous() for value in to_reference(network, NETWORK, Schedule()).values())
