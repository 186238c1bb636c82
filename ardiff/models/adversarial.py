"""The adaptive weight of the adversarial loss (VQGAN, Esser et al. 2021, equation 7).

    with watching(network.last_layer) as seen:
        decoded = network.decode(latents)
    weight = adaptive_weight(reconstruction_loss, adversarial_loss, seen)
    loss = reconstruction_loss + weight * adversarial_loss

The weight needs two gradients with respect to the last layer's weight matrix inside the forward pass. Asking autograd
for the gradient of a parameter fires the hooks that ZeRO put on its gradient accumulation, outside of any backward
pass of the engine, and breaks it. So the gradient is taken with respect to the layer's output, which is no leaf, and
carried to the weight by hand: for y = W x it is the sum of dy x^T over all rows, frames and calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

EPSILON = 1e-4
LARGEST = 1e4


@dataclass
class Seen:
    """A layer with what went in and came out, once per call."""

    layer: nn.Linear | nn.Conv2d
    inputs: list[Tensor] = field(default_factory=list)  # detached
    outputs: list[Tensor] = field(default_factory=list)  # part of the graph


@contextmanager
def watching(layer: nn.Module) -> Iterator[Seen]:
    """Remember what goes into `layer`, an nn.Linear or nn.Conv2d with zero padding, and what comes out.

    Calls without gradients are not remembered. The layer must not lie in a region of reentrant activation
    checkpointing, whose forward pass has no graph; non-reentrant checkpointing is fine.

    Raises TypeError for other layers.
    """
    if isinstance(layer, nn.Conv2d):
        supported = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    else:
        supported = isinstance(layer, nn.Linear)
    if not supported:
        raise TypeError(f"the adaptive weight needs an nn.Linear or an nn.Conv2d with zero padding, not {layer}")
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    seen = Seen(layer)

    def remember(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            seen.inputs.append(args[0].detach())
            seen.outputs.append(output)

    handle = layer.register_forward_hook(remember)
    try:
        yield seen
    finally:
        handle.remove()


def weight_gradient(loss: Tensor, seen: Seen) -> Tensor:
    """Gradient of the scalar `loss` with respect to the watched layer's weight, in its shape, float32.

    The graph is kept. No parameter's gradient, nor any hook of one, is touched.

    Raises ValueError if the layer was not called with gradients.
    """
    if not seen.outputs:
        raise ValueError(f"{seen.layer} was not called with gradients while it was watched")
    found = torch.autograd.grad(loss, seen.outputs, retain_graph=True, allow_unused=True)
    total = torch.zeros_like(seen.layer.weight, dtype=torch.float32, requires_grad=False)
    with torch.no_grad(), torch.autocast(total.device.type, enabled=False):
        for x, gradient in zip(seen.inputs, found, strict=True):
            if gradient is not None:  # of a call that this loss does not depend on
                total += _of_call(seen.layer, x.float(), gradient.float())
    return total


def _of_call(layer: nn.Linear | nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """The weight's gradient from the input of a call and the gradient of its output."""
    if isinstance(layer, nn.Linear):
        return gradient.flatten(0, -2).T @ x.flatten(0, -2)
    assert not isinstance(layer.padding, str)
    return conv2d_weight(
        x, list(layer.weight.shape), gradient, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, seen: Seen) -> Tensor:
    """The factor that makes both losses pull equally hard at the last layer: a scalar in float32, without gradient.

    |grad L_rec| / (|grad L_adv| + 1e-4), at most 1e4, with Euclidean norms over the watched layer's weight. Both
    losses are scalars on the same scale (means per pixel or sums), for 1e-4 is an absolute number.
    """
    reconstruction, adversarial = (
        weight_gradient(loss, seen).norm() for loss in (reconstruction_loss, adversarial_loss)
    )
    return (reconstruction / (adversarial + EPSILON)).clamp(0, LARGEST)
