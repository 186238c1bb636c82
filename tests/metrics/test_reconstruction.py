"""Measures of reconstructions against closed forms, and the same numbers however a video is cut."""

import math

import numpy as np
import pytest
import torch

from ardiff.config import VAEConfig
from ardiff.metrics import reconstruction
from ardiff.metrics.reconstruction import Scores, flicker, gradient_energy, psnr, reconstruction_metrics
from ardiff.metrics.structure import ssim
from ardiff.models import ARVAE

TINY = {"image_size": 16, "patch_size": 8, "num_tokens": 4, "channels": 2, "hidden_size": 16, "num_heads": 2}


def arvae(**more):
    return ARVAE(VAEConfig(**TINY, encoder_depth=1, decoder_depth=1, **more)).eval()


def videos(*lengths):
    return [np.random.default_rng(i).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for i, n in enumerate(lengths)]


def test_psnr_of_known_errors_frame_by_frame():
    a = torch.full((3, 3, 8, 8), 0.5)
    b = a + torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20.0, 40.0, 100.0], abs=1e-4)
    assert psnr(a, b).dtype == torch.float64


def test_psnr_of_gaussian_noise():
    a = torch.full((2, 3, 256, 256), 0.5)
    assert psnr(a, a + 0.05 * torch.randn(a.shape)).tolist() == pytest.approx([-20 * math.log10(0.05)] * 2, abs=0.05)


def test_psnr_clamps_to_the_range_of_pictures():
    white, black = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    assert psnr(white, white + 7).item() == 100
    assert psnr(white, black - 7).item() == pytest.approx(0)


def test_gradient_energy_of_ramps_stripes_and_blur():
    ramp = torch.linspace(0, 1, 11)[None, None, None].expand(1, 3, 5, 11)  # steps of 0.1 to the right, none down
    assert gradient_energy(ramp).item() == pytest.approx(0.01)
    assert gradient_energy(ramp.transpose(2, 3)).item() == pytest.approx(0.01)
    stripes = (torch.arange(8) % 2).float()[:, None].expand(1, 3, 8, 8)
    both = torch.cat([stripes, torch.full_like(stripes, 0.3)])
    assert gradient_energy(both).tolist() == pytest.approx([1.0, 0.0])
    noise = torch.rand(2, 3, 16, 16)
    assert (gradient_energy(torch.nn.functional.avg_pool2d(noise, 3, 1, 1)) < 0.3 * gradient_energy(noise)).all()
    assert gradient_energy(torch.rand(2, 3, 1, 1)).tolist() == [0, 0]


def test_flicker_is_what_changes_and_should_not():
    video = torch.rand(2, 5, 3, 8, 8)
    assert flicker(video, video).abs().max() == 0
    assert flicker(video, video + torch.rand(2, 1, 3, 8, 8)).max() < 1e-6  # an error that stands still
    still = torch.full_like(video, 0.5)
    error = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.4])[None, :, None, None, None]
    assert flicker(still, still + error)[1].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.3], abs=1e-6)
    noisy = flicker(video, video + 0.1 * torch.randn(video.shape))
    # the mean of |N(0, 2 * 0.1^2)|
    assert noisy.shape == (2, 4) and noisy.mean().item() == pytest.approx(0.2 / math.pi**0.5, rel=0.05)
    assert flicker(video[:, :1], video[:, :1]).shape == (2, 0)


def test_scores_do_not_depend_on_how_videos_are_cut_and_do_not_cross_from_one_to_the_next():
    first, second = (torch.rand(n, 3, 16, 16) for n in (7, 4))
    noisy = [(video + 0.1 * torch.randn(video.shape)) for video in (first, second)]
    total = Scores()
    for video, rebuilt, cuts in zip((first, second), noisy, ([3, 1, 3], [4]), strict=True):
        scores = Scores()
        for parts in zip(video.split(cuts), rebuilt.split(cuts), strict=True):
            scores.add(*parts)
        total.merge(scores)
    originals, rebuilt = torch.cat([first, second]), torch.cat(noisy).clamp(0, 1)
    pairs = torch.cat([flicker(a[None], b.clamp(0, 1)[None])[0] for a, b in zip((first, second), noisy, strict=True)])
    means = total.means()
    assert total.frames == 11
    assert means["psnr"] == pytest.approx(psnr(originals, rebuilt).mean().item(), rel=1e-6)
    assert means["ssim"] == pytest.approx(ssim(originals, rebuilt).mean().item(), rel=1e-5)
    assert means["flicker"] == pytest.approx(pairs.mean().item(), rel=1e-6)
    ratio = gradient_energy(rebuilt).mean() / gradient_energy(originals).mean()
    assert means["gradient_energy_ratio"] == pytest.approx(ratio.item(), rel=1e-6)
    assert "lpips" not in means


def test_what_has_no_value_is_left_out():
    scores = Scores()
    scores.add(torch.full((1, 3, 16, 16), 0.5), torch.rand(1, 3, 16, 16))
    assert "flicker" not in scores.means() and "gradient_energy_ratio" not in scores.means()
    assert scores.means()["gradient_energy"] > 0


def test_metrics_of_a_network_are_those_of_its_reconstructions():
    network, clips = arvae(), videos(5, 1, 9)
    found = reconstruction_metrics(network, clips, lpips=lambda a, b: (a - b).abs().flatten(1).mean(1))
    psnrs, distances = [], []
    for clip in clips:
        video = torch.from_numpy(clip).permute(0, 3, 1, 2)[None] / 255
        with torch.no_grad():
            rebuilt = network.decode(network.encode(video)).clamp(0, 1)
        psnrs += psnr(video[0], rebuilt[0]).tolist()
        distances += (video - rebuilt).abs()[0].flatten(1).mean(1).tolist()
    assert len(psnrs) == 15 and found["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-5)
    assert found["lpips"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert len(found["latent_mean"]) == len(found["latent_std"]) == 2
    assert 1 <= found["effective_rank"] <= 8 and found["dead_channels"] == 0
    assert {"ssim", "gradient_energy_ratio", "flicker"} < found.keys()


def test_pieces_do_not_matter_to_a_temporal_decoder(monkeypatch):
    """The cache carries what a frame reads of earlier pieces."""
    network = arvae(temporal=True, window=3)
    for name, parameter in network.named_parameters():
        if "temporal" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    clips = videos(11, 4)
    whole = reconstruction_metrics(network, clips)
    by_frame = reconstruction_metrics(arvae_without_time(network), clips)
    monkeypatch.setattr(reconstruction, "PIECE", 3)
    cut = reconstruction_metrics(network, clips)
    assert cut["psnr"] == pytest.approx(whole["psnr"], abs=1e-4)
    assert cut["flicker"] == pytest.approx(whole["flicker"], rel=1e-4)
    assert abs(by_frame["psnr"] - whole["psnr"]) > 1e-3


def arvae_without_time(network):
    """The same weights, each frame by itself."""
    alone = arvae()
    alone.load_state_dict({name: value for name, value in network.state_dict().items() if "temporal" not in name})
    return alone


def test_training_mode_and_gradients_are_left_as_they_were():
    network = arvae().train()
    reconstruction_metrics(network, videos(2))
    assert network.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(ValueError, match="at least one frame"):
        reconstruction_metrics(network, [])
