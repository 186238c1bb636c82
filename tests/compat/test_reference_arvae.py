"""The published auto-encoders: recorded reconstructions, the scrambled encoder, what the temporal decoder reads."""

import pytest
import torch
from reference_golden import ARVAES, SMALL_ARVAE, case, like, worst
from torch.nn import functional as F

from ardiff.compat.reference import ReferenceARVAE, load_arvae, pixels, to_reference
from ardiff.compat.reference.arvae import Encoder
from ardiff.compat.reference.options import vae_arguments, vae_config
from ardiff.compat.reference.settings import arvae_arguments
from ardiff.errors import UserError


def build(**options):
    arguments = SMALL_ARVAE | options
    return load_arvae(like(ReferenceARVAE(vae_config(arguments))), arguments)


def assert_same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ARVAES)
def test_recorded_latents_and_reconstructions(name):
    weights, config, arrays = case(name)
    network = load_arvae(weights, config)
    latents = arrays["z"][:, :, :, 0].transpose(2, 3)  # [B, F, C, 1, L] -> [B, F, L, C]
    other = latents.clone()
    other[:, -1] += 1
    with torch.no_grad():
        assert worst(network.encode(arrays["x"]), latents) < 1e-4
        video, changed = network.decode(latents), network.decode(other)
    assert worst(video[..., ::4, ::4], arrays["y_every_4th_pixel"]) < 1e-4
    assert worst(video.mean((-1, -2)), arrays["y_mean"]) < 1e-4
    assert worst(changed[..., ::4, ::4], arrays["y_last_latent_plus_one_every_4th_pixel"]) < 1e-4
    assert torch.equal(changed[:, :-1], video[:, :-1])
    assert worst(changed[:, -1], video[:, -1]) > 1e-3


def test_the_encoder_reads_its_tokens_row_by_row_as_columns(small_networks):
    network = build()
    seen = {}
    network.encoder.ln_post.register_forward_hook(lambda module, given, out: seen.update(tokens=out))
    with torch.no_grad():
        found = network.encode(torch.rand(1, 1, 3, 32, 32))[0, 0]  # [L, C]
    flat = seen["tokens"][0].flatten()
    weight, bias = network.encoder.conv_out.weight[:4, :, 0, 0], network.encoder.conv_out.bias[:4]
    for j in range(6):  # channel c of output token j is element 6 c + j of the flattened tokens
        column = torch.stack([flat[6 * c + j] for c in range(32)])
        assert worst(found[j], weight @ column + bias) < 1e-5
    assert isinstance(network.encoder, Encoder)


def test_latents_of_any_length_decode_alike_unless_the_norm_is_off(small_networks):
    latents = torch.randn(1, 2, 6, 4)
    with torch.no_grad():
        network = build()
        assert worst(network.decode(3 * latents), network.decode(latents)) < 1e-5
        network = build(use_l2_norm=False)
        assert worst(network.decode(3 * latents), network.decode(latents)) > 1e-3
        unit = build().decode(latents)
        assert worst(network.decode(F.normalize(latents, dim=-1)), unit) < 1e-5


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_temporal_decoder_is_causal_for_any_number_of_frames(frames, small_networks):
    network = build(num_frame=4).double()
    latents = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, part = network.decode(latents), network.decode(latents[:, :frames])
    assert worst(part, whole[:, :frames]) < 1e-9
    other = latents.clone()
    other[:, 0] += 1
    with torch.no_grad():
        assert worst(network.decode(other)[:, -1], whole[:, -1]) > 1e-4  # it does read earlier frames


def test_frames_are_decoded_alone_without_the_temporal_blocks(small_networks):
    network, latents = build().double(), torch.randn(1, 3, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        whole = network.decode(latents)
        assert worst(network.decode(latents[:, 1:2]), whole[:, 1:2]) < 1e-9


def test_the_quirk_of_the_residual_blocks():
    block = pixels.ResBlock(64, 32)
    x = torch.randn(1, 64, 4, 4)
    branch = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    assert worst(block(x), branch + block.nin_shortcut(branch)) == 0
    equal = pixels.ResBlock(32, 32)
    x = torch.randn(1, 32, 4, 4)
    assert worst(equal(x) - x, equal.conv2(F.silu(equal.norm2(equal.conv1(F.silu(equal.norm1(x))))))) < 1e-5


@pytest.mark.parametrize("prefix", ["", "module.", "vae.", "module.vae."])
@pytest.mark.parametrize("temporal", [{}, {"num_frame": 16}], ids=["per frame", "temporal"])
def test_export_and_import_give_the_same_bits(prefix, temporal, small_networks):
    network = build(**temporal)
    found = to_reference(network, prefix)
    assert all(name.startswith(prefix) for name in found)
    again = load_arvae(found, vae_arguments(network.config))
    assert again.config == network.config
    assert_same_weights(again, network)


def test_a_dit_file_yields_its_auto_encoder(small_networks):
    network = build()
    found = to_reference(network, "module.vae.")
    found["module.diffusion_model.model.x_embedder.weight"] = torch.zeros(1)
    found["module.context_emb"] = torch.zeros(1)
    assert_same_weights(load_arvae(found, SMALL_ARVAE), network)


def test_codebooks_of_the_initial_file_are_understood(small_networks):
    network = build()
    found = to_reference(network)
    found |= {"quantize.embedding.weight": torch.zeros(2), "pixel_quantize.embedding.weight": torch.zeros(2)}
    assert_same_weights(load_arvae(found, SMALL_ARVAE), network)


def test_missing_unexpected_and_misshapen_names_are_listed(small_networks):
    found = to_reference(build())
    del found["latent_tokens"], found["encoder.ln_pre.bias"]
    found["decoder.extra"] = torch.zeros(1)
    found["pixel_decoder.conv_out.bias"] = torch.zeros(4)
    with pytest.raises(UserError) as caught:
        load_arvae(found, SMALL_ARVAE)
    text = str(caught.value)
    assert "2 missing: encoder.ln_pre.bias, latent_tokens" in text
    assert "1 unexpected: decoder.extra" in text
    assert "pixel_decoder.conv_out.bias (4,) instead of (3,)" in text
    assert "\n" not in text


def test_a_temporal_checkpoint_is_not_taken_for_a_per_frame_one(small_networks):
    with pytest.raises(UserError, match=r"unexpected: decoder\.coarse_temporal_blocks"):
        load_arvae(to_reference(build(num_frame=16)), SMALL_ARVAE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_sizes": 4}, "did you mean 'token_size'"),
        ({"vit_enc_model_size": "huge"}, "must be one of small, base, large"),
        ({"image_size": 100}, "no multiple of vit_enc_patch_size = 16"),
        ({"token_size": "four"}, "token_size = 'four' must be a number"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        vae_config(SMALL_ARVAE | arguments)


@pytest.mark.parametrize("temporal", [{}, {"num_frame": 16}], ids=["per frame", "temporal"])
def test_shapes_tell_the_arguments(temporal, small_networks):
    arguments = SMALL_ARVAE | {"vit_enc_patch_size": 8} | temporal
    found = arvae_arguments(to_reference(build(**arguments), "module."), None)
    assert vae_config(found) == vae_config(arguments)
    with pytest.raises(UserError, match="not the weights of a published AR-VAE"):
        arvae_arguments({"x": torch.zeros(1)}, None)


def test_videos_of_another_size_are_refused(small_networks):
    with pytest.raises(UserError, match=r"\[B, F, 3, 32, 32\]"):
        build().encode(torch.rand(1, 1, 3, 16, 16))
