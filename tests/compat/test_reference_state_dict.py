"""Published state dicts: prefixes, extras, fixed tables, coverage, schedules, export."""

import pickle

import numpy as np
import pytest
import torch
from reference_golden import DITS, NETWORK, case, rebuilt, worst
from safetensors.torch import save_file

from ardiff.compat.reference import ReferenceDiT, detect_schedule, load_dit, read_checkpoint, to_reference
from ardiff.compat.reference.dit import sincos_table
from ardiff.compat.reference.export import process_buffers
from ardiff.compat.reference.options import model_arguments, model_config
from ardiff.compat.reference.state_dict import BUFFERS, split_arvae
from ardiff.config import load, presets
from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError

FLAT, STRICT, ROTARY = DITS
PREFIXES = ["", "module.", NETWORK, f"module.{NETWORK}", f"module.module.{NETWORK}", "_orig_mod.", "ema_model."]


def published(name, prefix=NETWORK):
    """A whole published file: the network under its prefix, buffers, context and some of the auto-encoder."""
    weights, config, arrays = case(name)
    outer = prefix.removesuffix(NETWORK)
    found = {f"{prefix}{key}": value for key, value in weights.items()}
    found |= {f"{outer}diffusion_model.{key}": value for key, value in process_buffers(Schedule()).items()}
    found[f"{outer}context_emb"] = rebuilt("context_emb", (77, 768))
    found[f"{outer}vae.encoder.conv_out.weight"] = torch.zeros(1)
    return found, config, arrays


def output(network, arrays):
    with torch.no_grad():
        return network(arrays["x"], arrays["t"], arrays["context"])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [FLAT, ROTARY])
def test_every_prefix_gives_the_recorded_output(name, prefix):
    found, config, arrays = published(name, prefix)
    network = load_dit(found, config)
    assert worst(output(network, arrays), arrays["y"]) < 1e-5
    assert torch.equal(network.context_emb, rebuilt("context_emb", (77, 768)))
    assert detect_schedule(found) == {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def test_stored_tables_are_used_as_they_are():
    weights, config, arrays = case(FLAT)
    network = load_dit(weights | {"pos_embed": sincos_table(30, 64)}, config)
    assert worst(output(network, arrays), arrays["y"]) < 1e-5
    other = load_dit(weights | {"pos_embed": 2 * sincos_table(30, 64)}, config)
    assert worst(output(other, arrays), arrays["y"]) > 1e-3


@pytest.mark.parametrize(
    "names",
    [
        ["rotary_emb.freqs"],
        ["blocks.0.attn.rotary_emb.freqs"],
        ["blocks.2.attn.rotary_emb.freqs"],
        ["rotary_emb.freqs", *(f"blocks.{i}.attn.rotary_emb.freqs" for i in range(3))],
    ],
    ids=["shared", "first block", "last block", "everywhere"],
)
def test_rotary_frequencies_under_any_of_their_names(names):
    weights, config, arrays = case(ROTARY)
    freqs = 1 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
    network = load_dit(weights | dict.fromkeys(names, freqs), config)
    assert worst(output(network, arrays), arrays["y"]) < 1e-5
    other = load_dit(weights | dict.fromkeys(names, 2 * freqs), config)
    assert worst(output(other, arrays), arrays["y"]) > 1e-3
    if len(names) > 1:
        with pytest.raises(UserError, match=r"'rotary_emb\.freqs' twice"):
            load_dit(weights | {names[0]: freqs, names[1]: 2 * freqs}, config)


def test_missing_unexpected_and_misshapen_names_are_listed_at_once():
    found, config, _ = published(FLAT)
    del found[f"{NETWORK}blocks.1.attn.qkv.weight"], found[f"{NETWORK}c_embedder.bias"]
    found[f"{NETWORK}blocks.3.attn.qkv.bias"] = torch.zeros(192)
    found["surplus"] = torch.zeros(1)
    found[f"{NETWORK}final_layer.1.weight"] = torch.zeros(8, 64)
    with pytest.raises(UserError) as caught:
        load_dit(found, config)
    text = str(caught.value)
    assert "2 missing: blocks.1.attn.qkv.weight, c_embedder.bias" in text
    assert "2 unexpected: blocks.3.attn.qkv.bias, surplus" in text
    assert "1 of another shape: final_layer.1.weight (8, 64) instead of (4, 64)" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "change", "unexpected"),
    [
        (FLAT, {"use_rotary_emb": True}, "pos_embed"),
        (FLAT, {"depth": 2}, "blocks.2.adaLN_modulation.1.bias"),
        (ROTARY, {"qk_norm": False}, "blocks.0.attn.k_norm.bias"),
    ],
)
def test_weights_of_another_configuration_are_refused(name, change, unexpected):
    weights, config, _ = case(name)
    tables = {} if name == ROTARY else {"pos_embed": sincos_table(30, 64)}
    with pytest.raises(UserError, match=f"unexpected: .*{unexpected}"):
        load_dit(weights | tables, config | change)


def test_an_empty_state_dict_misses_everything_but_the_tables():
    """All names of a deep network, however many."""
    with pytest.raises(UserError, match=r"missing: blocks\.0\.adaLN") as caught:
        load_dit({}, case(FLAT)[1] | {"depth": 28})
    text = str(caught.value)
    with torch.device("meta"):
        network = ReferenceDiT(model_config(case(FLAT)[1] | {"depth": 28}))
    names = dict(network.named_parameters()).keys()
    assert len(names) > 200 and f"{len(names)} missing: {', '.join(sorted(names))}" in text
    assert "pos_embed" not in text and "\n" not in text


def test_two_networks_in_one_file_are_refused():
    weights, config, _ = case(FLAT)
    double = {f"{prefix}.{key}": value for prefix in ("model", "ema") for key, value in weights.items()}
    with pytest.raises(UserError, match=r"several networks, under 'ema\.', 'model\.'"):
        load_dit(double, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_mod": "share_norm"}, "did you mean 'merge_mode'"),
        ({"merge_mode": None}, "merge_mode = 'None' must be one of share_norm"),
        ({"causal_attn_mode": "causal"}, "causal_attn_mode = 'causal'"),
        ({"num_heads": 5}, "hidden_size = 64 is no multiple of num_heads = 5"),
        ({"depth": 2.5}, "depth = 2.5 must be a whole number"),
        ({"hidden_size": None}, "hidden_size = None must be a number"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    weights, config, _ = case(FLAT)
    with pytest.raises(UserError, match=message):
        load_dit(weights, config | change)


def test_class_embeddings_make_a_network_with_classes():
    weights, config, _ = case(FLAT)
    classes = rebuilt("class_emb", (102, 77, 768))
    network = load_dit(weights | {"class_emb": classes}, config)
    assert network.config.num_classes == 101
    assert torch.equal(network.class_emb, classes)
    with pytest.raises(UserError, match="both context_emb and class_emb"):
        load_dit(weights | {"class_emb": classes, "context_emb": classes[0]}, config)
    with pytest.raises(UserError, match=r"context_emb \(76, 768\)"):
        load_dit(weights | {"context_emb": classes[0, 1:]}, config)


@pytest.mark.parametrize("prefix", PREFIXES[:4])
@pytest.mark.parametrize("name", DITS)
def test_export_and_import_give_the_same_bits(name, prefix):
    original, config, arrays = published(name, prefix)
    network = load_dit(original, config)
    found = to_reference(network, prefix, Schedule())
    kept = {key: value for key, value in original.items() if "vae." not in key}
    tables = {f"{prefix}{'rotary_emb.freqs' if name == ROTARY else 'pos_embed'}"}
    assert found.keys() == kept.keys() | tables
    assert all(torch.equal(found[key], value) for key, value in kept.items())
    again = load_dit(found, model_arguments(network.config))
    assert torch.equal(output(again, arrays), output(network, arrays))
    assert to_reference(network.as_model("x0"), prefix, Schedule()).keys() == found.keys()


def test_an_export_does_not_share_memory_with_the_network():
    weights, config, _ = case(FLAT)
    network = load_dit(weights, config)
    found = to_reference(network)
    with torch.no_grad():
        network.x_embedder.weight.zero_()
    assert torch.equal(found["x_embedder.weight"], weights["x_embedder.weight"])


@pytest.mark.parametrize(("start", "end"), [(1e-4, 0.02), (8.5e-4, 0.012), (2e-4, 0.015)])
@pytest.mark.parametrize("steps", [1000, 500])
def test_the_schedule_is_read_from_the_betas(start, end, steps):
    betas = (np.linspace(start**0.5, end**0.5, steps) ** 2).astype(np.float32)
    found = detect_schedule({"module.diffusion_model.betas": torch.from_numpy(betas)})
    assert found == {"num_timesteps": steps, "beta_start": start, "beta_end": end}
    assert worst(Schedule(**found).betas.float(), torch.from_numpy(betas)) < 1e-8


def test_other_schedules_are_refused_and_none_is_none():
    assert detect_schedule({}) is None
    with pytest.raises(UserError, match="not scaled-linear"):
        detect_schedule({"betas": torch.linspace(1e-4, 0.02, 1000)})
    with pytest.raises(UserError, match="not the increasing variances"):
        detect_schedule({"betas": torch.zeros(1000)})


def test_the_buffers_of_the_process():
    found = process_buffers(Schedule())
    assert tuple(found) == BUFFERS
    assert len(BUFFERS) == 13
    assert all(value.shape == (1000,) and value.dtype == torch.float32 for value in found.values())
    betas, alphas = found["betas"].double(), 1 - found["betas"].double()
    product = torch.cumprod(alphas, 0)
    before = torch.cat([torch.ones(1), product[:-1]])
    x0, x_t = torch.randn(2)
    # the posterior of q(x_{t-1} | x_t, x_0) as a product of two Gaussians
    precision = alphas[1:] / betas[1:] + 1 / (1 - before[1:])
    mean = (alphas[1:].sqrt() / betas[1:] * x_t + before[1:].sqrt() / (1 - before[1:]) * x0) / precision
    coefficients = found["posterior_mean_coef1"] * x0 + found["posterior_mean_coef2"] * x_t
    assert torch.allclose(coefficients[1:].double(), mean, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found["posterior_variance"][1:].double(), 1 / precision, rtol=1e-3)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_files_of_every_kind_are_read(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    weights = {"x": torch.arange(3.0)}
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if suffix == ".pt" else weights, path)
    assert torch.equal(read_checkpoint(path)["x"], weights["x"])


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "model.pt")
    for name in ("model.bin", "model.pt"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file; copy or download the checkpoint again"),
        (b"not a tensor", r"a damaged checkpoint \(\S.*\); copy or download|no checkpoint \(UnpicklingError\)"),
        (None, "no such file"),
        ("folder", r"is a folder; name the checkpoint in it, such as .*/model\.safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_damaged_and_absent_files_are_refused(name, content, message, tmp_path):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*({message})"):
        read_checkpoint(tmp_path / name)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="no state dict"):
        read_checkpoint(tmp_path / "model.pt")


LIN, SMALL_BETAS = (1e-4, 0.02), (8.5e-4, 0.012)
ROWS = {  # timesteps, mask, prediction, betas: the table of the published configurations
    "reference_sky": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_taichi": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_face": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_ucf": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_ucf_class": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_rope": ("fopp", "video_temporal_causal", "x0", LIN),
    "reference_x0pred": ("uniform_monotone", "video_temporal_causal", "x0", LIN),
    "reference_vtattn": ("uniform_monotone", "video_temporal_causal", "eps", LIN),
    "reference_vtattn_smallnoise": ("uniform_monotone", "video_temporal_causal", "eps", SMALL_BETAS),
    "reference_vtattn_midsamplet": ("fopp", "video_temporal_causal", "eps", SMALL_BETAS),
    "reference_vpred": ("uniform_monotone", "video_temporal_causal", "v", LIN),
    "reference_vpred_smalln": ("uniform_monotone", "video_temporal_causal", "v", SMALL_BETAS),
    "reference_tattn": ("uniform_monotone", "temporal_causal", "v", SMALL_BETAS),
    "reference_ardiff": ("uniform_monotone", None, "v", SMALL_BETAS),
    "reference_diffusion_forcing": ("independent", None, "v", SMALL_BETAS),
    "reference_face_diffusion_forcing": ("independent", None, "v", SMALL_BETAS),
    "reference_ucf_diffusion_forcing": ("independent", None, "v", SMALL_BETAS),
    "reference_fullsequence": ("synchronous", None, "v", SMALL_BETAS),
    "reference_base_3": ("uniform_monotone", None, "x0", LIN),
    "reference_base_5": ("uniform_monotone", None, "eps", LIN),
    "reference_base_6": ("independent", None, "eps", LIN),
}


def test_every_preset_of_a_published_model_is_in_the_table():
    named = {name for name in presets() if name.startswith("reference_")}
    assert named == ROWS.keys() | {"reference_arvae", "reference_arvae_temporal"}


@pytest.mark.parametrize("name", ROWS)
def test_presets_are_the_published_configurations(name):
    config, (timesteps, mask, prediction, betas) = load(name), ROWS[name]
    diffusion = config.diffusion
    assert (diffusion.timesteps, diffusion.prediction) == (timesteps, prediction)
    assert (diffusion.beta_start, diffusion.beta_end) == betas
    rotary = name == "reference_rope"
    arguments = model_arguments(config.model)
    assert arguments == {
        "num_frames": 16,
        "n_token_per_frame": 32,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "learn_sigma": False,
        "context_dim": 768,
        "context_token": 77,
        "merge_mode": "share_norm",
        "causal_attn_mode": mask,
        "use_rotary_emb": rotary,
        "qk_norm": rotary,
    }
    assert config.model.num_classes == (101 if name == "reference_ucf_class" else 0)
    assert model_config(arguments, config.model.num_classes) == config.model
    assert config.data.normalize == "unit"


@pytest.mark.parametrize("prefix", ["", "module.", "vae."])
def test_codebooks_of_titok_are_left_out_under_any_prefix(prefix):
    stored = {f"{prefix}{name}": torch.zeros(1) for name in ("encoder.conv_out.weight", "pixel_quantize_conv.weight")}
    codebooks = {f"{prefix}{name}.embedding.weight": torch.zeros(2, 2) for name in ("quantize", "pixel_quantize")}
    assert split_arvae(stored | codebooks).keys() == {"encoder.conv_out.weight", "pixel_quantize_conv.weight"}
