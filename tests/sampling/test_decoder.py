"""Pictures of a data set's latents: per frame, and piece by piece where the AR-VAE is temporal."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ardiff.config import load, to_yaml
from ardiff.data.latent_space import LatentSpace
from ardiff.models import ARVAE
from ardiff.models.temporal import TemporalCache
from ardiff.sampling import decoder as module
from ardiff.sampling.decoder import Decoder
from ardiff.training.weights import load_arvae
from launch import sample

SIZES = [
    "vae.image_size=16",
    "vae.patch_size=4",
    "vae.num_tokens=3",
    "vae.hidden_size=16",
    "vae.encoder_depth=1",
    "vae.decoder_depth=2",
    "vae.num_heads=2",
    "vae.window=3",
]


@pytest.fixture(params=["false", "true"], ids=["per frame", "temporal"])
def decoder(request, tmp_path, monkeypatch):
    """Of standardised latents, with an AR-VAE on disk; decodes five frames at a time."""
    monkeypatch.setattr(module, "DECODED_FRAMES", 5)
    config = load("arvae_tiny", [*SIZES, f"vae.temporal={request.param}"])
    network = ARVAE(config.vae)
    for name, parameter in network.named_parameters():
        if "temporal" in name and "out_proj" in name:
            nn.init.normal_(parameter, std=0.2)
    save_file(network.state_dict(), tmp_path / "ema.safetensors")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    mean, std = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.0, 4.0]
    found = load_arvae(tmp_path)[1]
    return Decoder(LatentSpace("standardize", mean, std, found, str(tmp_path), None, 1, []), device=torch.device("cpu"))


def expected(decoder, latents):
    """uint8 [V, F, H, W, 3] of the whole videos at once."""
    with torch.no_grad():
        video = decoder.network.decode(decoder.space.to_arvae(latents))
    return video.clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def close(found, wanted):
    """Equal but for a rounding of the last bit here and there."""
    difference = np.abs(found.astype(int) - wanted)
    return found.dtype == wanted.dtype and difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (3, 7), (9, 2)])
def test_whole_videos(shape, decoder):
    latents = torch.randn(*shape, 3, 4)
    pictures = decoder.decode(latents)
    assert pictures.shape == (*shape, 16, 16, 3)
    assert close(pictures, expected(decoder, latents))


@pytest.mark.parametrize("videos", [1, 2, 7])
def test_videos_come_in_pieces(videos, decoder):
    latents, cache = torch.randn(videos, 12, 3, 4), TemporalCache()
    pieces = [decoder.decode(piece, cache) for piece in latents.split([1, 7, 4], dim=1)]
    assert close(np.concatenate(pieces, axis=1), expected(decoder, latents))


@pytest.mark.parametrize("places", [[0], [0, 1, 2], [3, 4, 5, 11, 22], [7, 7]])
def test_single_pictures_of_a_long_video(places, decoder):
    latents = torch.randn(23, 3, 4)
    assert close(decoder.pick(latents, places), expected(decoder, latents[None])[0, places])


def test_what_is_written_does_not_depend_on_when_frames_come(decoder, tmp_path):
    latents = torch.randn(2, 11, 3, 4)
    options = SimpleNamespace(out=tmp_path, format=["png"])
    program = SimpleNamespace(decoder=decoder, options=options, request=SimpleNamespace(num_frames=11), fps=8.0)
    with sample.Outputs(program, [4, 5]) as outputs:
        for piece in latents.split([1, 1, 6, 3], dim=1):
            outputs.add(piece)
            assert {video.num_frames for video in outputs.videos} == {outputs.videos[0].latents.shape[0]}
    for video, wanted in zip((4, 5), expected(decoder, latents), strict=True):
        files = sorted((tmp_path / f"video_{video:06d}").glob("*.png"))
        assert close(np.stack([np.asarray(Image.open(file)) for file in files]), wanted)


def test_the_grid_shows_whole_videos(decoder, tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add=written.append)
    monkeypatch.setattr(sample, "Mp4Writer", lambda *_: nullcontext(writer))
    monkeypatch.setattr(sample, "DECODED_AT_ONCE", 4)
    latents = torch.randn(3, 11, 3, 4)
    program = SimpleNamespace(decoder=decoder, options=SimpleNamespace(out=tmp_path), fps=8.0)
    sample._write_grid(program, list(latents.numpy()))
    wanted = expected(decoder, latents)
    for i, (top, left) in enumerate([(0, 0), (0, 16), (16, 0)]):
        assert close(np.concatenate(written)[:, top : top + 16, left : left + 16], wanted[i])
