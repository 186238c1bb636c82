"""The discriminator of adversarial training: a second DeepSpeed engine, updated in every step beside the first one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ardiff.models.discriminator import hinge_discriminator
from ardiff.terms import Terms
from ardiff.training.checkpoint import ADVERSARY
from ardiff.training.grad_norms import LayerNorms


class DiscriminatorObjective(nn.Module):
    """A discriminator with its hinge loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, real: Tensor, fake: Tensor, mask: Tensor) -> Terms:
        """real, fake: pictures [N, 3, H, W] in [0, 1]; mask [N] of those that count."""
        of_real, of_fake = self.network(real).float(), self.network(fake).float()
        count = mask.double().sum()
        right = [(sign * logits > 0).double().mean(dim=(1, 2, 3)) for sign, logits in ((1, of_real), (-1, of_fake))]
        return {
            "discriminator_loss": ((hinge_discriminator(of_real, of_fake) * mask).sum(), count),
            "discriminator_right": ((0.5 * (right[0] + right[1]) * mask).sum().detach(), count),
        }


class Adversary:
    """Judges reconstructions with frozen weights while the generator learns, then learns from the same pictures.

    Both networks learn in every step, from pictures that were made before either was updated.
    """

    def __init__(self, deepspeed: Any, rank: int) -> None:
        self.deepspeed = deepspeed
        self.network = deepspeed.module.network
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        self.layers = LayerNorms(deepspeed.optimizer, names, rank, prefix=ADVERSARY)
        self._fakes: list[Tensor] = []  # judged since the last update

    def judge(self, fake: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] -> logits [N, 1, h, w], which are differentiable in the pictures only."""
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        logits = self.network(fake.to(parameters[0].dtype))
        for parameter in parameters:  # the graph of this verdict stays without them
            parameter.requires_grad_(True)
        self._fakes.append(fake.detach())
        return logits.float()

    def learn(self, video: Tensor, mask: Tensor, scale: float, measure_layers: bool = False) -> Terms:
        """One micro-batch; weights change at the last one of a global batch. video: [B, F, 3, H, W], mask [B, F].

        scale: what the sum over pictures is multiplied by, for the mean over the global batch. measure_layers: before
        an update, which the last micro-batch brings.
        """
        (fake,), self._fakes = self._fakes, []
        real, mask = video.flatten(0, 1), mask.flatten()
        dtype = next(self.network.parameters()).dtype
        terms: Terms = self.deepspeed(real.to(dtype), fake.to(dtype), mask)
        self.deepspeed.backward(terms["discriminator_loss"][0] * scale, scale_wrt_gas=False)
        if measure_layers:
            self.layers.measure()
        self.deepspeed.step()
        return {name: (total.detach(), count) for name, (total, count) in terms.items()}

    def set_learning_rate(self, value: float) -> None:
        """Of the next update."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = value
