"""LPIPS against a plain re-implementation, and the files it is read from."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ardiff.config import VAEConfig
from ardiff.errors import UserError
from ardiff.models.lpips import LPIPS
from ardiff.models.perceptual import build_perceptual

VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
SLICES = [range(4), range(4, 9), range(9, 16), range(16, 23), range(23, 30)]  # of torchvision's vgg16().features


def vgg_layers():
    layers, channels = [], 3
    for entry in VGG16:
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
    return layers


@pytest.fixture(scope="module")
def state():
    """What `lpips.LPIPS(net="vgg").state_dict()` looks like, with random weights."""
    generator = torch.Generator().manual_seed(0)
    stored = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None],
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450])[None, :, None, None],
    }
    layers = vgg_layers()
    for number, places in enumerate(SLICES, start=1):
        for place in places:
            if isinstance(layers[place], nn.Conv2d):
                shape = layers[place].weight.shape
                weight = torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
                stored[f"net.slice{number}.{place}.weight"] = weight
                stored[f"net.slice{number}.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    for number, channels in enumerate((64, 128, 256, 512, 512)):
        weight = torch.rand(1, channels, 1, 1, generator=generator)
        stored[f"lin{number}.model.1.weight"] = weight
        stored[f"lins.{number}.model.1.weight"] = weight.clone()
    return stored


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips_vgg.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(path):
    return LPIPS(path)


def plain_lpips(state, a, b):
    """Zhang et al. 2018, equation 1, in float64, by the layers of torchvision's VGG-16."""
    layers = vgg_layers()
    for number, places in enumerate(SLICES, start=1):
        for place in places:
            if isinstance(layers[place], nn.Conv2d):
                layers[place].weight.data = state[f"net.slice{number}.{place}.weight"]
                layers[place].bias.data = state[f"net.slice{number}.{place}.bias"]
    a, b = (
        ((2 * x.double() - 1) - state["scaling_layer.shift"].double()) / state["scaling_layer.scale"].double()
        for x in (a, b)
    )
    total = 0.0
    with torch.no_grad():
        for number, places in enumerate(SLICES):
            for place in places:
                a, b = layers[place].double()(a), layers[place](b)
            unit_a, unit_b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
            weight = state[f"lin{number}.model.1.weight"].double()
            total = total + ((unit_a - unit_b) ** 2 * weight).sum(dim=1).mean(dim=(1, 2))
    return total


def test_equals_the_plain_implementation(network, state):
    a, b = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = plain_lpips(state, a, b)
    assert expected.min() > 0.5  # far from nothing
    torch.testing.assert_close(network(a, b).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(b, a), network(a, b))
    assert torch.equal(network(a, a), torch.zeros(2))


def test_gradients_flow_to_pictures_only(network):
    a, b = torch.rand(2, 1, 3, 16, 16)
    a.requires_grad_()
    network(a, b).sum().backward()
    assert a.grad.isfinite().all() and (a.grad != 0).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not list(network.buffers())  # which every checkpoint would hold


@pytest.mark.parametrize("response", [0.0, 1e-30])  # the square of the latter is 0
def test_gradients_are_finite_where_no_channel_responds(path, response):
    network = LPIPS(path)
    network.blocks[4][2].weight.zero_()
    network.blocks[4][2].bias.fill_(response)
    a, b = torch.rand(2, 1, 3, 16, 16)
    a.requires_grad_()
    assert network.features(a)[4].abs().max() < 1e-10
    network(a, b).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_training_mode_changes_nothing(path):
    network = LPIPS(path)
    assert not network.training
    a, b = torch.rand(2, 2, 3, 16, 16)
    quiet = network(a, b)
    assert torch.equal(network.train()(a, b), quiet)


def test_a_frame_does_not_depend_on_the_rest_of_the_batch(network):
    a, b = torch.rand(2, 3, 3, 16, 16)
    alone = torch.cat([network(a[n : n + 1], b[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(network(a, b), alone, rtol=1e-5, atol=1e-6)


def test_bfloat16(path, network):
    a, b = torch.rand(2, 2, 3, 16, 16)
    found = LPIPS(path).bfloat16()(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network(a, b), rtol=0.05, atol=0)


@pytest.mark.parametrize("prefix", ["", "perceptual_loss.", "module.", "loss.perceptual_loss."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_fit(state, network, tmp_path, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    stored = {prefix + name: value.half() for name, value in state.items() if not name.startswith("lins.")}
    stored["discriminator.main.0.weight"] = torch.zeros(2)  # of a VQGAN's loss
    (save_file if suffix == ".safetensors" else torch.save)(stored, path)
    before = torch.get_rng_state()
    loaded = build_perceptual(VAEConfig(perceptual_weight=1.0, perceptual="lpips", lpips=str(path)))
    assert torch.equal(torch.get_rng_state(), before)  # the networks that follow are drawn as without it
    assert isinstance(loaded, LPIPS) and all(p.dtype == torch.float32 for p in loaded.parameters())
    a, b = torch.rand(2, 1, 3, 16, 16)
    torch.testing.assert_close(loaded(a, b), network(a, b), rtol=2e-2, atol=0)


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(path):
    with pytest.raises(UserError) as caught:
        LPIPS(path)
    message = str(caught.value)
    assert "vae.lpips" in message and str(path) in message and "lpips.LPIPS(net='vgg').state_dict()" in message
    assert "\n" not in message
    return message


def test_hostile_pickle_is_not_run(state, tmp_path):
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({**state, "net.slice1.0.weight": Hostile(mark)}, path)
    refused(path)
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))  # that of torch.save
    refused(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it would have worked


def test_files_that_do_not_fit(state, tmp_path):
    assert "no such file" in refused(tmp_path / "missing.pth")
    folder = tmp_path / "folder.pth"
    folder.mkdir()
    refused(folder)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    refused(path)
    path.write_bytes(b"<html>404</html>")
    refused(path)
    torch.save({name: value for name, value in state.items() if name.startswith("lin")}, path)  # as lpips/weights/*
    assert "net.slice1.0.weight is missing" in refused(path)
    torch.save({**state, "lin3.model.1.weight": torch.zeros(1, 7, 1, 1)}, path)
    assert "lin3.model.1.weight is (1, 7, 1, 1) instead of (1, 512, 1, 1)" in refused(path)
    torch.save({**state, "lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.nan)}, path)
    assert "lin0.model.1.weight is not finite" in refused(path)
    for odd in (torch.ones(1, 64, 1, 1, dtype=torch.long), torch.ones(1, 64, 1, 1).to_sparse()):
        torch.save({**state, "lin0.model.1.weight": odd}, path)
        assert "lin0.model.1.weight is no dense tensor" in refused(path)
    torch.save({**state, **{f"teacher.{name}": value for name, value in state.items()}}, path)
    assert "several" in refused(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path)


def test_pictures_that_are_too_small(network):
    with pytest.raises(UserError, match=r"vae\.lpips .* 16 x 16 .* not 8 x 32"):
        network(torch.rand(1, 3, 8, 32), torch.rand(1, 3, 8, 32))
