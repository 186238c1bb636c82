"""The probe is a function of the weights, and notices when a loaded network predicts something else."""

from pathlib import Path

import pytest
import torch

from ardiff.config import load
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.models.reconstruction import ReconstructionObjective
from ardiff.training import probe, run_dir

CHECKPOINT = Path("run/checkpoints/step_00000010")
SMALL = ["model.num_frames=4", "model.tokens_per_frame=2", "model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
OURS = {
    "plain": [],
    "class labels": ["model.num_classes=3"],
    "text": ["model.context_dim=6"],
    "rectified flow": ["diffusion.process=rectified_flow", "diffusion.prediction=v"],
    "more frames than timesteps": ["diffusion.num_timesteps=3", "sampling.num_steps=2", "sampling.gap=1"],
}
REFERENCE = ["model.architecture=reference", "model.context=leaky"]


def awaken(module: torch.nn.Module) -> None:
    """Away from the start, at which the last layers are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def diffusion(settings: list[str]) -> DiffusionObjective:
    config = load("tiny", [*SMALL, *settings])
    objective = DiffusionObjective(build_dit(config.model, config.diffusion.prediction), config)
    awaken(objective)
    return objective


def autoencoder(settings: list[str]) -> ReconstructionObjective:
    objective = ReconstructionObjective(load("arvae_tiny", settings).vae)
    awaken(objective)
    return objective


def assert_is_a_function_of_the_weights(objective: torch.nn.Module, shape: tuple[int, ...]) -> None:
    objective.train()
    random = torch.get_rng_state()
    found = probe.take(objective)
    assert found.shape == shape and found.dtype == torch.float32 and found.isfinite().all()
    assert found.std() > 1e-4 and objective.training and all(module.training for module in objective.modules())
    assert torch.equal(random, torch.get_rng_state())  # and draws nothing
    assert torch.equal(found, probe.take(objective))
    awaken(objective)
    assert not torch.equal(found, probe.take(objective))


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_diffusion(settings):
    assert_is_a_function_of_the_weights(diffusion(settings), (1, 4, 2, 4))


@pytest.mark.parametrize("classes", [0, 3])
def test_published_architecture(classes):
    assert_is_a_function_of_the_weights(diffusion([*REFERENCE, f"model.num_classes={classes}"]), (1, 4, 2, 4))


def test_bf16():
    objective = diffusion([])
    exact = probe.take(objective)
    rounded = probe.take(objective.bfloat16())
    assert rounded.dtype == torch.float32
    assert 0 < probe.compare(CHECKPOINT, exact, rounded, 0.05, {}) < 0.05


@pytest.mark.parametrize("temporal", [False, True])
def test_autoencoder(temporal):
    objective = autoencoder([f"vae.temporal={temporal}"])
    size = objective.config.image_size
    assert_is_a_function_of_the_weights(objective, (1, 3, 3, size, size))
    if temporal:  # also in the stages that do not train it
        before = probe.take(objective)
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if "temporal" in name:
                    parameter.add_(0.1)
        assert not torch.equal(before, probe.take(objective))


def test_published_autoencoder(small_networks):
    assert_is_a_function_of_the_weights(
        autoencoder(["vae.architecture=reference", "vae.reference.encoder=small", "vae.reference.decoder=small"]),
        (1, 3, 3, 64, 64),
    )


@pytest.mark.parametrize("index", range(4))
def test_every_kind_of_weight_matters(index):
    """Among them those that only labels or text reach, and timesteps."""
    objective = diffusion(["model.num_classes=3", "model.context_dim=6"])
    found = probe.take(objective)
    network = objective.network
    layers = (network.label_embed, network.context_embed, network.t_embed, network.blocks[1].attention)
    with torch.no_grad():
        for parameter in layers[index].parameters():
            parameter.mul_(-1)
    assert not torch.equal(found, probe.take(objective))


def test_modes_come_back_after_an_error():
    objective = diffusion([])
    objective.train()
    objective.network.blocks[0].eval()
    objective.network.blocks[1].forward = None
    with pytest.raises(TypeError):
        probe.take(objective)
    assert objective.training and objective.network.blocks[1].training and not objective.network.blocks[0].training


def test_deviations():
    stored = torch.tensor([3.0, 4.0])
    assert probe.compare(CHECKPOINT, stored, stored.clone(), 0.0, {}) == 0.0
    assert probe.compare(CHECKPOINT, stored, torch.tensor([3.0, 4.5]), 0.11, {}) == pytest.approx(0.1)
    assert probe.compare(CHECKPOINT, torch.zeros(2), torch.zeros(2), 0.0, {}) == 0.0
    assert probe.compare(CHECKPOINT, torch.tensor([1.0, torch.nan]), stored, 0.1, {}) == 0.0
    for found in (torch.tensor([3.0, 4.6]), torch.tensor([3.0, torch.nan]), torch.zeros(3)):
        with pytest.raises(UserError, match=r"train\.probe_tolerance"):
            probe.compare(CHECKPOINT, stored, found, 0.11, {})


def test_the_message_says_what_has_changed():
    now = run_dir.versions()
    then = {**now, "torch": "1.0", "xformers": "0.1"}
    stored, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    with pytest.raises(UserError) as error:
        probe.compare(CHECKPOINT, stored, found, 0.05, then)
    message = str(error.value)
    assert "\n" not in message and str(CHECKPOINT) in message and "by 0.2 of" in message
    assert f"torch 1.0 -> {now['torch']}" in message and "xformers 0.1 -> none" in message
    assert "numpy" not in message
    with pytest.raises(UserError, match="no version of a package has changed"):
        probe.compare(CHECKPOINT, stored, found, 0.05, now)
