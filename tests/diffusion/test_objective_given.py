"""The objective with given frames, windows and rectified flow."""

import pytest
import torch
from data_helpers import randomize
from torch import nn

from ardiff.config import load
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.models import DiT

FRAMES, TOKENS, CHANNELS = 4, 3, 4
SHAPE = (3, FRAMES, TOKENS, CHANNELS)


def config_of(*overrides):
    sizes = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_frames": FRAMES, "tokens_per_frame": TOKENS}
    return load("tiny", [*(f"model.{key}={value}" for key, value in sizes.items()), *overrides])


def build(*overrides):
    config = config_of(*overrides)
    return randomize(DiffusionObjective(DiT(config.model), config)).double()


class Recorder(nn.Module):
    """A network that keeps what it is given and returns what it is told."""

    def __init__(self, output):
        super().__init__()
        self.output, self.seen = output, None

    def forward(self, x, t, label=None, context=None):
        self.seen = (x, t)
        return self.output


def batch_of():
    """The first clip begins with two given frames, the second has one at its end, the third none."""
    given = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    timesteps = torch.tensor([[0, 99, 100, 999], [5, 400, 500, 700], [950, 960, 970, 980]]).masked_fill(given, 1)
    latents, noise = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    return {"latents": latents, "noise": noise, "timesteps": timesteps, "mask": ~given, "given": given}


def test_given_frames_are_fed_as_they_are():
    batch = batch_of()
    recorder = Recorder(torch.zeros(SHAPE, dtype=torch.float64))
    objective = DiffusionObjective(recorder, config_of())
    objective(batch)
    x, t = recorder.seen
    given = batch["given"]
    assert torch.equal(x[given], batch["latents"][given])
    assert torch.equal(t, batch["timesteps"])
    noisy = objective.schedule.q_sample(batch["latents"], batch["timesteps"], batch["noise"])
    assert torch.equal(x[~given], noisy[~given])
    assert not torch.equal(noisy[given], batch["latents"][given])  # t = 1 alone would add noise


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_given_frames_add_nothing_to_the_loss(prediction):
    batch = batch_of()
    recorder = Recorder(torch.randn(SHAPE, dtype=torch.float64).requires_grad_())
    objective = DiffusionObjective(recorder, config_of(f"diffusion.prediction={prediction}"))
    before = objective(batch)
    with torch.no_grad():  # however wrong the output is there, and whatever noise belongs to it
        recorder.output[batch["given"]] += 1000
    batch["noise"][batch["given"]] = 1e6
    after = objective(batch)
    for name in before:
        for one, other in zip(before[name], after[name], strict=True):
            assert torch.equal(one, other), name
    assert after["loss"][1].item() == 9 * TOKENS * CHANNELS
    after["loss"][0].backward()
    assert torch.equal(recorder.output.grad.abs().amax(dim=(2, 3)) > 0, ~batch["given"])


def test_given_frames_are_read_by_the_others():
    objective, batch = build(), batch_of()
    batch["latents"].requires_grad_()
    objective(batch)["loss"][0].backward()
    gradient = batch["latents"].grad.abs().amax(dim=(2, 3))
    assert (gradient[0] > 0).all()  # the prefix conditions what follows
    assert gradient[1, 3] == 0  # under a causal mask no frame reads the one at the end
    backwards = build("model.mask=bidirectional")
    batch["latents"].grad = None
    backwards(batch)["loss"][0].backward()
    assert batch["latents"].grad[1, 3].abs().max() > 0


@pytest.mark.parametrize("shift", [1.0, 3.69])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_rectified_flow_by_hand(prediction, shift):
    batch = batch_of()
    t = torch.tensor([[0.0, 0.0, 33.3, 1000.0], [0.5, 400.25, 999.0, 0.0], [950.0, 1.0, 500.0, 166.7]])
    batch["timesteps"] = t.double()
    output = torch.randn(SHAPE, dtype=torch.float64)
    recorder = Recorder(output)
    overrides = ["diffusion.process=rectified_flow", f"diffusion.prediction={prediction}"]
    objective = DiffusionObjective(recorder, config_of(*overrides, f"diffusion.flow_shift={shift}"))
    terms = objective(batch)
    tau = (shift * t.double() / 1000 / (1 + (shift - 1) * t.double() / 1000))[:, :, None, None]
    x0, noise = batch["latents"], batch["noise"]
    x, labels = recorder.seen
    given = batch["given"]
    torch.testing.assert_close(x[~given], ((1 - tau) * x0 + tau * noise)[~given])
    assert torch.equal(x[given], x0[given])
    torch.testing.assert_close(labels, 1000 * tau[:, :, 0, 0])
    target = x0 - noise if prediction == "v" else x0
    expected = (output - target)[~given].square().sum().item()
    assert terms["loss"][0].item() == pytest.approx(expected, rel=1e-5)
    # deciles of the time before the warp: 33 | 999, 1000 | 0.5, 400 | 950, 1, 500, 166
    counts = terms["loss_by_decile"][1] / TOKENS / CHANNELS
    assert counts.tolist() == [3, 1, 0, 0, 1, 1, 0, 0, 0, 3]


def windowed():
    batch = batch_of()
    batch["window"] = torch.tensor([4, 2, 3])
    batch["given"] = torch.tensor([[1, 0, 0, 0]] * 3, dtype=torch.bool)
    batch["timesteps"] = batch["timesteps"].masked_fill(batch["given"], 1)
    batch["mask"] = (torch.arange(FRAMES) < batch["window"][:, None]) & ~batch["given"]
    return batch


@pytest.mark.parametrize(
    ("mask", "context"), [("frame_causal", "strict"), ("frame_causal", "leaky"), ("bidirectional", "strict")]
)
def test_a_window_is_a_shorter_clip(mask, context):
    # through leaky context tokens a frame reads the later ones, whatever the mask
    objective = build(f"model.mask={mask}", f"model.context={context}", "model.num_classes=2", "model.context_dim=5")
    batch = {**windowed(), "label": torch.tensor([0, 1, 2]), "context": torch.randn(3, 2, 5, dtype=torch.float64)}
    total, count = objective(batch)["loss"]
    parts = []
    for row, length in enumerate(batch["window"].tolist()):
        one = {name: value[row : row + 1] for name, value in batch.items() if name != "window"}
        parts.append(
            objective({name: v if name in ("label", "context") else v[:, :length] for name, v in one.items()})["loss"]
        )
    assert total.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-5)
    assert count.item() == sum(part[1].item() for part in parts) == 6 * TOKENS * CHANNELS
    beyond = torch.arange(FRAMES) >= batch["window"][:, None]
    changed = batch["latents"] + 100 * beyond[:, :, None, None]
    assert objective({**batch, "latents": changed})["loss"][0].item() == pytest.approx(total.item(), rel=1e-6)


def test_without_a_window_a_bidirectional_network_reads_everything():
    # the control of the test above
    objective = build("model.mask=bidirectional")
    batch = windowed()
    total = objective(batch)["loss"][0].item()
    del batch["window"]
    assert objective(batch)["loss"][0].item() != pytest.approx(total, rel=1e-3)


def test_windows_reach_the_gradients():
    objective, batch = build("model.mask=bidirectional"), windowed()
    batch["latents"].requires_grad_()
    objective(batch)["loss"][0].backward()
    inside = torch.arange(FRAMES) < batch["window"][:, None]
    assert torch.equal(batch["latents"].grad.abs().amax(dim=(2, 3)) > 0, inside)
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_the_resolution_warp_follows_from_picture_and_clip():
    config = config_of("diffusion.process=rectified_flow", "diffusion.prediction=v", "diffusion.flow_shift=0")
    objective = DiffusionObjective(nn.Identity(), config)
    expected = (config.vae.image_size**2 / 512**2) ** 0.5 * FRAMES**0.5
    assert objective.schedule.flow_shift == pytest.approx(expected)
