"""The training objective: noisy clips in, sums of squared errors out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ardiff.config import Config
from ardiff.diffusion.schedule import Schedule
from ardiff.randomness import synthetic
from ardiff.terms import Terms

DECILES = 10


class DiffusionObjective(nn.Module):
    """A network with its loss: the squared error of the prediction, summed over the frames that are to be trained.

    Plain unweighted MSE, as in the reference (no SNR weighting). The caller divides by the number of unmasked elements
    in the *global* batch, so neither ranks nor accumulation steps matter.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__()
        self.network = network
        self.schedule = Schedule.from_config(config.diffusion, config.vae.image_size, config.model.num_frames)
        self.config = config.model
        self.elements_per_frame = config.model.tokens_per_frame * config.model.in_channels
        # Otherwise no frame of a window reads the frames after it (windows end where blocks end).
        self.cuts_windows = config.model.mask == "bidirectional" or config.model.context == "leaky"

    def forward(self, batch: dict[str, Tensor]) -> Terms:
        """batch: latents, noise [B, F, L, C], timesteps [B, F], mask [B, F] (True: the loss counts this frame);
        label [B] and context [B, N, D] as far as the model takes them; given [B, F] (True: a conditioning frame, fed as
        it is) and window [B] (the sample has only so many frames) as far as the distribution of timesteps has them.
        """
        x0, noise, t, mask = batch["latents"], batch["noise"], batch["timesteps"], batch["mask"]
        x_t = self.schedule.q_sample(x0, t, noise)
        if "given" in batch:
            x_t = torch.where(batch["given"][:, :, None, None], x0, x_t)
        output = self._predict(x_t, self.schedule.labels(t), batch)
        error = (output.float() - self.schedule.target(x0, t, noise).float()) ** 2
        per_frame = error.sum(dim=(2, 3)) * mask  # [B, F]
        counts = mask.double() * self.elements_per_frame
        detached = per_frame.detach().double()
        decile = (t * DECILES).div(self.schedule.num_timesteps, rounding_mode="floor").long().clamp(max=DECILES - 1)
        zeros = torch.zeros(DECILES, dtype=torch.float64, device=t.device)
        return {
            "loss": (per_frame.sum(), counts.sum()),
            "loss_by_decile": (
                zeros.index_add(0, decile.flatten(), detached.flatten()),
                zeros.index_add(0, decile.flatten(), counts.flatten()),
            ),
            "loss_by_frame": (detached.sum(0), counts.sum(0)),
        }

    def probe(self) -> Tensor:
        """The network's output [1, F, L, C] for an input that is a function of the shapes alone: numbers of variance 1,
        timesteps that rise over the frames, the first class, and a context of two tokens, as far as it takes them.
        """
        config, device = self.config, next(self.network.parameters()).device
        frames = config.num_frames
        noise = synthetic((1, frames, config.tokens_per_frame, config.in_channels)).to(device)
        steps = torch.arange(1, frames + 1, device=device) * self.schedule.num_timesteps // frames - 1
        label = torch.zeros(1, dtype=torch.int64, device=device) if config.num_classes else None
        context = synthetic((1, 2, config.context_dim)).to(device) if config.context_dim else None
        return self.network(noise, self.schedule.labels(steps.clamp(min=0)[None]), label, context)

    def _predict(self, x_t: Tensor, labels: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The network's output [B, F, L, C], of no meaning beyond the windows; those frames are read by no other."""
        label, context, window = batch.get("label"), batch.get("context"), batch.get("window")
        if window is None or not self.cuts_windows:
            return self.network(x_t, labels, label, context)
        output = torch.zeros_like(x_t)
        for length in window.unique().tolist():
            rows = (window == length).nonzero()[:, 0]
            part = self.network(
                x_t[rows, :length],
                labels[rows, :length],
                None if label is None else label[rows],
                None if context is None else context[rows],
            )
            output = output.index_put((rows[:, None], torch.arange(length, device=rows.device)), part.to(output.dtype))
        return output
