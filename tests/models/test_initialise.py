"""An AR-VAE that starts from weights which exist already: TiTok's, published ones, or those of another run."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from arvae_helpers import SMALL
from data_helpers import randomize
from safetensors.torch import save_file
from torch.nn import functional as F

import ardiff.training.coverage
from ardiff.compat.reference import ReferenceARVAE
from ardiff.compat.reference.arvae import CODE_WIDTH, CODES
from ardiff.compat.reference.fitting import LOGVAR
from ardiff.compat.reference.options import vae_config
from ardiff.config import Config
from ardiff.errors import UserError
from ardiff.models import ARVAE
from ardiff.models.fitting import resized
from ardiff.training import weights
from ardiff.training.initialise import initialise

pytestmark = pytest.mark.usefixtures("small_networks")

TITOK = {
    "image_size": 32,
    "token_size": 4,
    "vit_enc_model_size": "small",
    "vit_dec_model_size": "small",
    "num_latent_tokens": 6,
}
OWN = dataclasses.replace(
    SMALL, image_size=32, patch_size=8, num_tokens=6, hidden_size=32, encoder_depth=2, decoder_depth=2
)


def published(**options):
    """A published network with random weights, none of them zero."""
    return randomize(ReferenceARVAE(vae_config(TITOK | options)), 0.1)


def untrained(**options):
    return ReferenceARVAE(vae_config(TITOK | options))


def own(**options):
    return ARVAE(dataclasses.replace(OWN, **options))


def titok_file(path, network, prefix="", vector_quantised=False, extra=True):
    """The network as a file of the reference; `vector_quantised`: as TiTok's own, with codebooks and no variance."""
    found = {name: value.clone() for name, value in network.state_dict().items()}
    if vector_quantised:
        for part in ("weight", "bias"):
            name = f"encoder.conv_out.{part}"
            found[name] = found[name][: network.config.channels].clone()
            del found[f"pixel_quantize_conv.{part}"]
        found["pixel_quantize.embedding.weight"] = torch.randn(CODES, CODE_WIDTH)
    if extra:
        found["quantize.embedding.weight"] = torch.randn(20, network.config.channels)
    found = {prefix + name: value for name, value in found.items()}
    torch.save(found, path)
    return found


def export(folder, network):
    """A folder as launch/export.py and launch/convert.py write it."""
    stored = weights.Stored(network.state_dict(), Config(vae=network.config), folder, None)
    weights.write_export(folder, lambda vector: stored)
    return folder


def frames(size=32, num_frames=3):
    return torch.rand(2, num_frames, 3, size, size)


def padded(latents, channels):
    return F.pad(latents, (0, channels - latents.shape[-1]))


def same(first, second, video=None, latents=None):
    """Whether two networks encode and decode to the same bits."""
    video = frames(first.config.image_size) if video is None else video
    latents = torch.randn(2, 3, first.config.num_tokens, first.config.channels) if latents is None else latents
    with torch.no_grad():
        pairs = [*zip(first.posterior(video), second.posterior(video), strict=True)]
        pairs.append((first.decode(latents), second.decode(latents)))
    return all(torch.equal(a, b) for a, b in pairs)


def check_sums(coverage, network):
    """The numbers of the table add up to the network."""
    total = coverage.total
    assert total.total == sum(value.numel() for value in network.parameters())
    for row in [*coverage.rows, total]:
        assert row.taken + row.adapted + row.initial == row.total
        assert min(row.taken, row.adapted, row.initial) >= 0
    for row in coverage.rows:
        assert f"{row.total:,}" in coverage.table()
    return total


@pytest.mark.parametrize("prefix", ["", "module.", "module.vae."])
@pytest.mark.parametrize("temporal", [{}, {"num_frame": 16}], ids=["per frame", "temporal"])
def test_a_file_of_the_same_size_gives_the_same_bits(tmp_path, prefix, temporal):
    source, target = published(**temporal), untrained(**temporal)
    titok_file(tmp_path / "vae.pt", source, prefix)
    assert not same(source, target)
    coverage = initialise(target, tmp_path / "vae.pt")
    assert same(source, target)
    total = check_sums(coverage, target)
    assert total.taken == total.total
    assert not coverage.warnings
    assert coverage.unused == ["quantize.embedding.weight"]


def test_a_converted_folder_is_a_source_too(tmp_path):
    source, target = published(num_frame=16), untrained(num_frame=16)
    coverage = initialise(target, export(tmp_path / "arvae", source))
    assert same(source, target)
    assert check_sums(coverage, target).initial == 0
    assert len(coverage.digest) == 12


def test_moments_are_reduced_to_the_leading_channels(tmp_path):
    source, target, video = published(token_size=12), untrained(), frames()
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    latents = torch.randn(2, 3, 6, 4)
    with torch.no_grad():
        for ours, theirs in zip(target.posterior(video), source.posterior(video), strict=True):
            torch.testing.assert_close(ours, theirs[..., :4])
        torch.testing.assert_close(target.decode(latents), source.decode(padded(latents, 12)))
    total = check_sums(coverage, target)
    assert (total.adapted, total.initial) == (8 * 32 + 8 + 4 * 32, 0)
    assert coverage.adapted == {
        "leading 4 of 12 channels": [
            "encoder.conv_out.weight",
            "encoder.conv_out.bias",
            "decoder.decoder_embed.weight",
        ]
    }


@pytest.mark.parametrize("channels", [8, 12])  # 8 outputs to be quantised look like mean and log-variance of 4
def test_a_vector_quantised_file_gets_a_small_variance_and_its_codebook(tmp_path, channels):
    source, target, video = published(token_size=channels), untrained(), frames()
    found = titok_file(tmp_path / "tokenizer.bin", source, vector_quantised=True)
    coverage = initialise(target, tmp_path / "tokenizer.bin")
    with torch.no_grad():
        mean, logvar = target.posterior(video)
        torch.testing.assert_close(mean, source.posterior(video)[0][..., :4])
        assert torch.equal(logvar, torch.full_like(logvar, LOGVAR))
        scores = torch.full((1, CODES, 2, 2), -1e4)
        scores[:, 77] = 1e4  # a certain code becomes its entry
        entry = target.pixel_quantize_conv(scores.softmax(dim=1))[0, :, 0, 0]
    torch.testing.assert_close(entry, found["pixel_quantize.embedding.weight"][77])
    total = check_sums(coverage, target)
    assert total.initial == 4 * 32 + 4  # the log-variance
    assert coverage.unused == ["quantize.embedding.weight"]
    assert "vector-quantised" in coverage.table()


def test_a_quantised_file_with_a_wrapper_still_yields_its_codebook(tmp_path):
    source, target = published(token_size=12), untrained()
    found = titok_file(tmp_path / "tokenizer.bin", source, "module.", vector_quantised=True)
    initialise(target, tmp_path / "tokenizer.bin")
    entry = target.pixel_quantize_conv.weight[:, :, 0, 0].T
    assert torch.equal(entry, found["module.pixel_quantize.embedding.weight"])


def test_more_channels_keep_what_exists(tmp_path):
    source, target, video = published(), untrained(token_size=12), frames()
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    latents = torch.randn(2, 3, 6, 4)
    with torch.no_grad():
        for ours, theirs in zip(target.posterior(video), source.posterior(video), strict=True):
            torch.testing.assert_close(ours[..., :4], theirs)
        torch.testing.assert_close(target.decode(padded(latents, 12)), source.decode(latents))
    assert check_sums(coverage, target).initial == 16 * 32 + 16 + 8 * 32


def test_a_temporal_decoder_begins_as_the_per_frame_one(tmp_path):
    source, target = published(), untrained(num_frame=16)
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    check_sums(coverage, target)
    row = next(row for row in coverage.rows if row.module == "decoder (temporal)")
    assert row.initial == row.total > 0
    assert sum(row.initial for row in coverage.rows) == row.total
    assert not coverage.warnings
    assert same(source, target)
    assert "change nothing" in coverage.table()
    assert "as initialised: all of decoder (temporal)\n" in coverage.table()


def test_another_image_size_interpolates_the_positions(tmp_path):
    source, target = published(), untrained(image_size=64)
    with torch.no_grad():  # a plane, which bicubic interpolation keeps away from the borders
        source.encoder.positional_embedding[1:] = torch.tensor([0.0, 1, 2, 3])[:, None].expand(4, 32)
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    ours, theirs = target.encoder.positional_embedding, source.encoder.positional_embedding
    assert ours.shape == (17, 32)
    assert torch.equal(ours[0], theirs[0])  # the class token
    grid = ours[1:].reshape(4, 4, 32)
    torch.testing.assert_close(grid[..., 0].mean(), torch.tensor(1.5))
    assert (grid[:, 1:] > grid[:, :-1]).all()
    assert (grid[1:] > grid[:-1]).all()
    torch.testing.assert_close(grid[3] - grid[0], 2 * (grid[:, 3] - grid[:, 0]))  # rows are rows
    total = check_sums(coverage, target)
    assert (total.initial, total.adapted) == (0, 2 * 17 * 32)
    with torch.no_grad():
        assert target.decode(target.encode(frames(64))).isfinite().all()


def test_another_number_of_tokens_keeps_the_leading_ones(tmp_path):
    source, target = published(), untrained(num_latent_tokens=4)
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    assert torch.equal(target.latent_tokens, source.latent_tokens[:4])
    assert check_sums(coverage, target).initial == 0
    assert "learned anew" in coverage.table()
    more = untrained(num_latent_tokens=8)
    initial = more.latent_tokens[6:].clone()
    coverage = initialise(more, tmp_path / "vae.pt")
    assert torch.equal(more.latent_tokens[:6], source.latent_tokens)
    assert torch.equal(more.latent_tokens[6:], initial)
    assert check_sums(coverage, more).initial == 3 * 2 * 32


def test_an_output_that_means_nothing_is_left(tmp_path):
    source, target = published(), untrained()
    found = titok_file(tmp_path / "vae.pt", source)
    for part in ("weight", "bias"):
        found[f"encoder.conv_out.{part}"] = found[f"encoder.conv_out.{part}"][:5].clone()
    torch.save(found, tmp_path / "vae.pt")
    before = target.encoder.conv_out.weight.clone()
    coverage = initialise(target, tmp_path / "vae.pt")
    assert torch.equal(target.encoder.conv_out.weight, before)
    assert "encoder.conv_out.weight" in coverage.initial
    assert "encoder.conv_out.weight [5, 32, 1, 1] instead of [8, 32, 1, 1]" in coverage.unused


# Our own architecture


@pytest.mark.parametrize("as_file", [False, True], ids=["export", "its file"])
def test_an_export_of_ours_gives_the_same_bits(tmp_path, as_file):
    source, target = randomize(own(), 0.1), own()
    folder = export(tmp_path / "run", source)
    coverage = initialise(target, folder / "ema.safetensors" if as_file else folder)
    assert same(source, target)
    total = check_sums(coverage, target)
    assert total.taken == total.total
    assert not coverage.unused


def test_a_temporal_decoder_of_ours_begins_as_the_per_frame_run(tmp_path):
    source, target = randomize(own(), 0.1), own(temporal=True)
    coverage = initialise(target, export(tmp_path / "run", source))
    assert same(source, target)
    check_sums(coverage, target)
    assert {row.module for row in coverage.rows if row.initial} == {"fine_temporal_blocks", "coarse_temporal_blocks"}
    assert not coverage.warnings
    assert "change nothing" in coverage.table()


@pytest.mark.parametrize(("old", "new"), [(12, 4), (4, 12)])
def test_channels_of_ours(tmp_path, old, new):
    source, target, video = randomize(own(channels=old), 0.1), own(channels=new), frames()
    coverage = initialise(target, export(tmp_path / "run", source))
    latents = torch.randn(2, 3, 6, 4)
    with torch.no_grad():
        for ours, theirs in zip(target.posterior(video), source.posterior(video), strict=True):
            torch.testing.assert_close(ours[..., :4], theirs[..., :4])
        torch.testing.assert_close(target.decode(padded(latents, new)), source.decode(padded(latents, old)))
    total = check_sums(coverage, target)
    assert total.initial == (0 if new < old else 16 * 32 + 16 + 8 * 32)


def test_another_image_size_of_ours_interpolates_positions_and_pools(tmp_path):
    source, target = randomize(own(), 0.1), own(image_size=64)
    with torch.no_grad():
        source.encoder_pool.copy_(torch.rand_like(source.encoder_pool).softmax(dim=1))
    coverage = initialise(target, export(tmp_path / "run", source))
    assert check_sums(coverage, target).initial == 0
    assert torch.equal(target.encoder_positions[64:], source.encoder_positions[16:])
    torch.testing.assert_close(target.encoder_pool.sum(dim=1), torch.ones(6), atol=0.1, rtol=0)
    assert len(coverage.adapted["grid of 16 patches interpolated to 64"]) == 4
    with torch.no_grad():
        assert target.decode(target.encode(frames(64))).isfinite().all()


def test_another_number_of_tokens_of_ours_starts_them_anew(tmp_path):
    source, target, fresh = randomize(own(), 0.1), own(num_tokens=16), own(num_tokens=16)
    coverage = initialise(target, export(tmp_path / "run", source))
    assert torch.equal(target.encoder_positions[:16], source.encoder_positions[:16])
    for name in ("encoder_pool", "decoder_pool"):
        assert torch.equal(getattr(target, name), getattr(fresh, name))
        assert name in coverage.initial
    assert torch.equal(target.decoder_positions[16:], fresh.decoder_positions[16:])
    assert check_sums(coverage, target).initial == 2 * 16 * 32 + 2 * 16 * 16


def test_as_many_positions_of_another_kind_are_not_taken_for_the_same(tmp_path):
    source, target = randomize(own(image_size=16, num_tokens=16), 0.1), own(num_tokens=4)  # 4 + 16 and 16 + 4
    initialise(target, export(tmp_path / "run", source))
    torch.testing.assert_close(target.encoder_positions[:16], resized(source.encoder_positions[:4], 16))
    assert torch.equal(target.encoder_positions[16:], own(num_tokens=4).encoder_positions[16:])


def test_more_layers_and_other_heads_are_told(tmp_path):
    source, target = randomize(own(), 0.1), own(encoder_depth=3, num_heads=4)
    initial = target.encoder[2].qkv.weight.clone()
    coverage = initialise(target, export(tmp_path / "run", source))
    assert torch.equal(target.encoder[1].qkv.weight, source.encoder[1].qkv.weight)
    assert torch.equal(target.encoder[2].qkv.weight, initial)
    assert "encoder.2.qkv.weight" in coverage.initial
    assert "vae.num_heads = 4" in coverage.warnings[0]
    fewer = own(encoder_depth=1)
    coverage = initialise(fewer, tmp_path / "run")
    assert any(name.startswith("encoder.1.") for name in coverage.unused)


# A published network for our architecture


def test_our_architecture_takes_layers_and_embeddings_of_a_published_one(tmp_path):
    source, target = published(token_size=12), own(patch_size=16)
    titok_file(tmp_path / "vae.pt", source)
    coverage = initialise(target, tmp_path / "vae.pt")
    x, video = torch.randn(2, 7, 32), frames()
    patches = video.flatten(0, 1).unfold(2, 16, 16).unfold(3, 16, 16)  # [N, 3, h, w, p, q]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [N, h w, 3 p q]
    latents = F.normalize(torch.randn(2, 6, 4), dim=-1)
    with torch.no_grad():
        for part in ("encoder", "decoder"):
            for ours, theirs in zip(getattr(target, part), getattr(source, part).transformer, strict=True):
                torch.testing.assert_close(ours(x), theirs(x))
        embedded = source.encoder.patch_embed(video.flatten(0, 1)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(target.patch_embed(2 * patches - 1), embedded)
        tokens = 2.0 * target.from_latents(latents)  # times sqrt(C), as `decode` does
        torch.testing.assert_close(tokens, source.decoder.decoder_embed(padded(latents, 12)))
        torch.testing.assert_close(target.encoder_norm(x), source.encoder.ln_post(x))
    check_sums(coverage, target)
    assert "to_latents.weight" in coverage.initial
    assert "vae.architecture=reference" in coverage.table()


@pytest.mark.parametrize("options", [{"hidden_size": 64}, {"patch_size": 8}, {"num_heads": 4}])
def test_a_published_network_of_another_kind_is_refused(tmp_path, options):
    titok_file(tmp_path / "vae.pt", published())
    target = own(**({"patch_size": 16} | options))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=r"train\.init = .*vae\.architecture=reference \(preset reference_arvae\)"):
        initialise(target, tmp_path / "vae.pt")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_our_weights_are_refused_by_the_published_architecture(tmp_path):
    with pytest.raises(UserError, match=r"vae\.architecture=ardiff"):
        initialise(untrained(), export(tmp_path / "run", own()))


# What is told and what is refused


def test_a_source_that_covers_little_is_warned_of(tmp_path):
    source, target = randomize(own(patch_size=16, decoder_depth=1, encoder_depth=1), 0.1), own()
    coverage = initialise(target, export(tmp_path / "run", source))
    total = check_sums(coverage, target)
    share = (total.taken + total.adapted) / total.total
    assert share < ardiff.training.coverage.ENOUGH
    assert f"only {share:.0%} of the parameters" in coverage.warnings[0]
    assert "WARNING" in coverage.table()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def nothing_fits(path):
    torch.save({"encoder.layer.weight": torch.rand(3)}, path)


def not_finite(path):
    network = published()
    with torch.no_grad():
        network.encoder.ln_pre.weight[3] = float("nan")
    titok_file(path, network)


def scalars(path):
    torch.save({name: torch.tensor(1.0) for name in published().state_dict()}, path)


def expanded(path):
    torch.save({"latent_tokens": torch.zeros(1).expand(6, 32)}, path)


HOSTILE = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty|damaged|no checkpoint"),
    "noise": (lambda path: path.write_bytes(b"\x80\x02noise" * 50), "damaged|no checkpoint|more than tensors"),
    "runs code": (lambda path: path.write_bytes(pickle.dumps(Evil())), "more than tensors|damaged"),
    "saves code": (lambda path: torch.save({"x": Evil()}, path), "more than tensors"),
    "not tensors": (lambda path: torch.save({"x": 3}, path), "no state dict"),
    "nothing fits": (nothing_fits, "nothing in it fits"),
    "not finite": (not_finite, r"not finite, in encoder\.ln_pre\.weight"),
    "scalars": (scalars, "nothing in it fits|cannot be used"),
    "larger than its storage": (expanded, "nothing in it fits"),
    "an empty folder": (lambda path: path.mkdir(), "neither a run_dir"),
    "a run without checkpoints": (lambda path: (path / "checkpoints").mkdir(parents=True), "no checkpoint yet"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_source_that_cannot_be_used_is_one_line_about_train_init(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[name]
    path = tmp_path / "source.pt"
    make(path)
    target = untrained()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        initialise(target, path)
    assert str(caught.value).startswith(f"train.init = {path}: ")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_diffusion_transformer_is_refused(tmp_path):
    folder = export(tmp_path / "run", own())
    (folder / "latent_space.json").write_text("{}")
    with pytest.raises(UserError, match="holds a diffusion transformer"):
        initialise(own(), folder)


def test_a_safetensors_file_and_half_precision_are_read(tmp_path):
    source, target = published(), untrained()
    half = {name: value.bfloat16() for name, value in source.state_dict().items()}
    save_file(half | {"steps": torch.tensor([3])}, tmp_path / "vae.safetensors")
    coverage = initialise(target, tmp_path / "vae.safetensors")
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[name].float())
    assert coverage.unused == ["steps"]
