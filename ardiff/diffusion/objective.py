"""The training objective: noisy clips in, sums of squared errors out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ardiff.config import Config
from ardiff.diffusion.schedule import Schedule
from ardiff.terms import Terms

DECILES = 10


class DiffusionObjective(nn.Module):
    """A network with its loss: the squared error of the prediction, summed over the frames that are not padding.

    Plain unweighted MSE, as in the reference (no SNR weighting). The caller divides by the number of unmasked elements
    in the *global* batch, so neither ranks nor accumulation steps matter.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__()
        self.network = network
        self.schedule = Schedule.from_config(config.diffusion)
        self.elements_per_frame = config.model.tokens_per_frame * config.model.in_channels

    def forward(self, batch: dict[str, Tensor]) -> Terms:
        """batch: latents, noise [B, F, L, C], timesteps [B, F], mask [B, F] (True: a real frame), label [B],
        context [B, N, D]; the last two as far as the model takes them.
        """
        x0, noise, t, mask = batch["latents"], batch["noise"], batch["timesteps"], batch["mask"]
        x_t = self.schedule.q_sample(x0, t, noise)
        output = self.network(x_t, t, batch.get("label"), batch.get("context"))
        error = (output.float() - self.schedule.target(x0, t, noise).float()) ** 2
        per_frame = error.sum(dim=(2, 3)) * mask  # [B, F]
        counts = mask.double() * self.elements_per_frame
        detached = per_frame.detach().double()
        decile = (t * DECILES).div(self.schedule.num_timesteps, rounding_mode="floor").flatten()
        zeros = torch.zeros(DECILES, dtype=torch.float64, device=t.device)
        return {
            "loss": (per_frame.sum(), counts.sum()),
            "loss_by_decile": (
                zeros.index_add(0, decile, detached.flatten()),
                zeros.index_add(0, decile, counts.flatten()),
            ),
            "loss_by_frame": (detached.sum(0), counts.sum(0)),
        }
