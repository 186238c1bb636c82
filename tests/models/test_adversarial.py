"""The adaptive weight against autograd's gradient of the parameter, and that no parameter notices."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ardiff.models.adversarial import adaptive_weight, watching, weight_gradient


class Decoder(nn.Module):
    """A trunk and a last layer, which `calls` parts of the batch go through one after the other."""

    def __init__(self, last_layer, width, calls=1, checkpointed=False):
        super().__init__()
        self.linear = isinstance(last_layer, nn.Linear)
        self.trunk = nn.Linear(5, width) if self.linear else nn.Conv2d(5, width, 1)
        self.last_layer, self.calls, self.checkpointed = last_layer, calls, checkpointed

    def part(self, x):
        return self.last_layer(torch.tanh(self.trunk(x))).sigmoid()

    def forward(self, x):
        parts = x.chunk(self.calls)
        if self.checkpointed:
            return torch.cat([checkpoint(self.part, part, use_reentrant=False) for part in parts])
        return torch.cat([self.part(part) for part in parts])


LAYERS = {
    "linear": lambda: nn.Linear(6, 12),
    "conv": lambda: nn.Conv2d(6, 3, 3, padding=1),
    "conv_strided": lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding=(0, 1), dilation=(1, 2), groups=2, bias=False),
}


def case(name, **options):
    torch.manual_seed(0)
    network = Decoder(LAYERS[name](), 6, **options)
    x = torch.rand(4, 7, 3, 5) if network.linear else torch.rand(4, 5, 9, 8)
    critic = nn.Linear(network(x)[0].numel(), 1)

    def losses(y):
        return (y - 0.3).square().sum(), -critic(y.flatten(1)).tanh().mean()

    return network, x, critic, losses


def counted(*modules):
    """A list that grows whenever a gradient reaches a parameter."""
    fired = []
    for module in modules:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
            parameter.register_hook(lambda _: fired.append("reached"))
    return fired


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_autograd_and_touches_no_parameter(name, checkpointed, calls):
    network, x, critic, losses = case(name, calls=calls, checkpointed=checkpointed)
    expected = [torch.autograd.grad(loss, network.last_layer.weight)[0] for loss in losses(network(x))[:1]]
    expected += [torch.autograd.grad(losses(network(x))[1], network.last_layer.weight)[0]]
    fired = counted(network, critic)
    with watching(network.last_layer) as seen:
        y = network(x)
    reconstruction, adversarial = losses(y)
    assert len(seen.outputs) == calls
    for loss, gradient in zip((reconstruction, adversarial), expected, strict=True):
        torch.testing.assert_close(weight_gradient(loss, seen), gradient, rtol=1e-5, atol=1e-6)
    weight = adaptive_weight(reconstruction, adversarial, seen)
    assert weight.shape == () and not weight.requires_grad
    assert weight.item() == pytest.approx((expected[0].norm() / (expected[1].norm() + 1e-4)).item(), rel=1e-5)
    assert not fired and all(p.grad is None for p in [*network.parameters(), *critic.parameters()])
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    total = expected[0] + weight * expected[1]
    torch.testing.assert_close(network.last_layer.weight.grad, total, rtol=1e-5, atol=1e-5)
    assert fired.count("accumulated") == sum(1 for _ in [*network.parameters(), *critic.parameters()])


def test_the_gradient_of_a_parameter_would_fire_its_hooks():
    """Why it is not asked for: this is what ZeRO counts on to happen only in its own backward pass."""
    network, x, _, losses = case("linear")
    fired = counted(network)
    torch.autograd.grad(losses(network(x))[0], network.last_layer.weight)
    assert fired == ["reached"]


def test_weighted_losses_pull_equally():
    network, x, _, losses = case("conv")
    with watching(network.last_layer) as seen:
        reconstruction, adversarial = losses(network(x))
    weighted = adaptive_weight(reconstruction, adversarial, seen) * adversarial
    pull = weight_gradient(weighted, seen).norm()
    assert pull.item() == pytest.approx(weight_gradient(reconstruction, seen).norm().item(), rel=1e-1)


def test_limits():
    network, x, _, losses = case("linear")
    with watching(network.last_layer) as seen:
        reconstruction, adversarial = losses(network(x))
    assert adaptive_weight(1e9 * reconstruction, adversarial, seen) == 1e4
    assert adaptive_weight(reconstruction, 0 * adversarial, seen) == 1e4
    assert adaptive_weight(0 * reconstruction, adversarial, seen) == 0


def test_bfloat16_is_normed_in_float32():
    network, x, critic, losses = case("linear")
    with watching(network.last_layer) as seen:
        exact = adaptive_weight(*losses(network(x)), seen)
    network, critic = network.bfloat16(), critic.bfloat16()
    with watching(network.last_layer) as seen:
        reconstruction, adversarial = losses(network(x.bfloat16()))
    found = adaptive_weight(reconstruction.float(), adversarial.float(), seen)
    gradient = weight_gradient(adversarial, seen)
    assert gradient.dtype == found.dtype == torch.float32
    assert (gradient != gradient.bfloat16().float()).any()  # added up in it, too
    assert found.item() == pytest.approx(exact.item(), rel=0.05)


def test_watching_ends_and_ignores_calls_without_gradient():
    network, x, _, losses = case("linear", calls=2)
    with watching(network.last_layer) as seen:
        with torch.no_grad():
            network(x)
        assert not seen.outputs
        with pytest.raises(ValueError, match="not called with gradients"):
            weight_gradient(losses(network(x).detach().requires_grad_())[0], type(seen)(seen.layer))
    with pytest.raises(RuntimeError), watching(network.last_layer) as seen:
        raise RuntimeError
    network(x)
    assert not seen.outputs and not network.last_layer._forward_hooks


def test_a_call_that_the_loss_does_not_depend_on_counts_nothing():
    network, x, _, _ = case("linear")
    with watching(network.last_layer) as seen:
        used, _ = network(x), network(2 * x)
    expected = torch.autograd.grad(used.square().sum(), network.last_layer.weight, retain_graph=True)[0]
    torch.testing.assert_close(weight_gradient(used.square().sum(), seen), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(3),
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(3, 3, 3),
    ],
)
def test_other_layers_are_refused(layer):
    with pytest.raises(TypeError, match=r"nn\.Linear or an nn\.Conv2d"), watching(layer):
        pass
