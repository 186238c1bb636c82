"""The losses of the AR-VAE and its stages."""

import dataclasses

import pytest
import torch
from arvae_helpers import SMALL, batch_of, frames
from torch.nn import functional as F

from ardiff.config import Phase
from ardiff.models.perceptual import build_perceptual
from ardiff.models.reconstruction import ReconstructionObjective
from ardiff.models.temporal import is_temporal


def test_masked_frames_count_as_nothing():
    objective, video = ReconstructionObjective(SMALL), frames(SMALL)
    batch = batch_of(SMALL, video, noise=1.0)
    kept = objective({name: value[:, :2] for name, value in batch.items()})
    batch["mask"] = batch["mask"].clone()
    batch["mask"][:, 2] = False
    masked = objective(batch)
    assert masked.keys() == kept.keys() == {"loss", "mse", "kl"}
    for name, terms in masked.items():
        for term, expected in zip(terms, kept[name], strict=True):
            torch.testing.assert_close(term, expected)
    batch["video"][:, 2] = 7.0
    assert torch.equal(objective(batch)["loss"][0], masked["loss"][0])


def test_loss_is_the_mean_over_pixels():
    config = dataclasses.replace(SMALL, kl_weight=0.0, l1_weight=0.25)
    objective, video = ReconstructionObjective(config), frames(SMALL)
    terms = objective(batch_of(config, video))
    difference = objective.network.decode(objective.network.encode(video)) - video
    expected = 0.75 * difference.square().mean() + 0.25 * difference.abs().mean()
    torch.testing.assert_close((terms["loss"][0] / terms["loss"][1]).float(), expected)
    torch.testing.assert_close((terms["mse"][0] / terms["mse"][1]).float(), difference.square().mean())


def test_kl_is_zero_for_a_standard_normal_posterior():
    objective = ReconstructionObjective(SMALL)
    with torch.no_grad():
        objective.network.to_latents.weight.zero_()
        objective.network.to_latents.bias.zero_()
    assert objective(batch_of(SMALL, frames(SMALL)))["kl"][0] == 0


def test_four_frames_are_learnt():
    objective = ReconstructionObjective(SMALL)
    video = F.interpolate(torch.rand(4, 3, 4, 4), size=(16, 16), mode="bilinear")[:, None]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        total, count = objective(batch_of(SMALL, video, noise=1.0))["loss"]
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])
    rebuilt = objective.network.decode(objective.network.encode(video))
    mean_color = video.mean(dim=(3, 4), keepdim=True)
    assert (rebuilt - video).square().mean() < 0.25 * (mean_color - video).square().mean()


TEMPORAL = dataclasses.replace(SMALL, temporal=True, window=3)
STAGES = {  # phase -> which parameters learn: those of single frames, those that read other frames
    "frames": (Phase(), (True, False)),
    "adversarial": (Phase(stage="adversarial"), (True, False)),
    "temporal": (Phase(stage="temporal", num_frames=4), (True, True)),
    "temporal only": (Phase(stage="temporal", num_frames=4, trains="temporal"), (False, True)),
}


@pytest.mark.parametrize(("phase", "learn"), STAGES.values(), ids=STAGES.keys())
def test_a_stage_trains_its_parameters(phase, learn):
    objective = ReconstructionObjective(TEMPORAL)
    objective.enter(phase)
    with torch.no_grad():
        for name, parameter in objective.network.named_parameters():
            if is_temporal(name):  # its projections begin at zero, which hides what lies before them
                parameter.normal_(std=0.1)
    objective(batch_of(TEMPORAL, frames(TEMPORAL), noise=1.0))["loss"][0].backward()
    got = {name: parameter.grad is not None for name, parameter in objective.network.named_parameters()}
    assert got == {name: learn[is_temporal(name)] for name in got}


def test_frames_are_decoded_alone_until_the_temporal_stage():
    objective, batch = ReconstructionObjective(TEMPORAL), batch_of(TEMPORAL, frames(TEMPORAL))
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.normal_(std=0.3)
    losses = []
    for phase in (Phase(), Phase(stage="temporal", num_frames=3)):
        objective.enter(phase)
        losses.append(objective(batch)["mse"][0].item())
    alone = objective.network.decode(objective.network.encode(batch["video"]), temporal=False)
    assert losses[0] == pytest.approx((alone - batch["video"]).square().sum().item(), rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


def test_posterior_is_sampled_unless_switched_off():
    video = frames(SMALL)
    batches = [batch_of(SMALL, video, noise=scale) for scale in (0.0, 3.0)]
    for sampled in (True, False):
        objective = ReconstructionObjective(dataclasses.replace(SMALL, sample_posterior=sampled))
        losses = [objective(batch)["mse"][0].item() for batch in batches]
        assert (losses[0] != losses[1]) == sampled


def test_perceptual_loss_is_weighed_per_pixel():
    video = frames(SMALL)
    batch = batch_of(SMALL, video)
    config = dataclasses.replace(SMALL, kl_weight=0.0, perceptual_weight=0.3)
    objective = ReconstructionObjective(config, build_perceptual(config))
    terms = objective(batch)
    plain = ReconstructionObjective(dataclasses.replace(SMALL, kl_weight=0.0))
    plain.load_state_dict(objective.state_dict())
    without, (total, count) = plain(batch)["loss"][0], terms["perceptual"]
    assert count == 6 and total > 0
    expected = without + 0.3 * objective.elements_per_frame * total
    torch.testing.assert_close(terms["loss"][0].double(), expected)
    assert objective.state_dict().keys() == plain.state_dict().keys()


def test_verdict_of_a_discriminator_is_weighed_adaptively():
    """Both gradients are equally long at the last layer, whatever the scale of the verdict."""
    objective, batch = ReconstructionObjective(SMALL), batch_of(SMALL, frames(SMALL), noise=1.0)
    weights, losses = [], []
    for scale in (1.0, 10.0):
        terms = objective(batch, judge=lambda fake, scale=scale: scale * fake.mean(dim=1, keepdim=True))
        weights.append((terms["adaptive_weight"][0] / terms["adaptive_weight"][1]).item())
        losses.append(terms["loss"][0].item())
        assert terms["adversarial"][0] / scale == pytest.approx(-batch_mean(objective, batch), rel=1e-4)
    assert weights[0] / weights[1] == pytest.approx(10, rel=0.02)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)

    def last_gradient(**options):
        objective.zero_grad()
        objective(batch, **options)["loss"][0].backward()
        return objective.network.last_layer.weight.grad.clone()

    plain = last_gradient()
    for trust in (1.0, 0.2, 0.0):
        judged = last_gradient(judge=lambda fake: fake.mean(dim=1, keepdim=True), trust=trust)
        ratio = (judged - plain).norm() / plain.norm()
        assert ratio.item() == pytest.approx(trust * SMALL.adversarial_weight, rel=0.05)


def batch_mean(objective, batch):
    """Sum over frames of the mean reconstructed pixel."""
    mean, logvar = objective.network.posterior(batch["video"])
    rebuilt = objective.network.decode(mean + (0.5 * logvar).exp() * batch["noise"])
    return rebuilt.mean(dim=(2, 3, 4)).sum().item()
