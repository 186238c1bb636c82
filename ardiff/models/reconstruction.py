"""What the AR-VAE learns: pixels, structure, the posterior's KL term and a discriminator's verdict, in three stages."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ardiff.config import Phase, VAEConfig
from ardiff.models.adversarial import adaptive_weight, watching
from ardiff.models.build import build_arvae
from ardiff.models.discriminator import hinge_generator
from ardiff.models.temporal import is_temporal
from ardiff.randomness import synthetic
from ardiff.terms import Terms

PROBE_FRAMES = 3
Judge = Callable[[Tensor], Tensor]  # pictures [N, 3, H, W] -> a discriminator's logits [N, 1, h, w]


class ReconstructionObjective(nn.Module):
    """An AR-VAE with its loss, summed over pixels and frames (Esser et al. 2021)

        (1 - l1_weight) * squared + l1_weight * absolute error + pixels * (perceptual_weight * perceptual
            + kl_weight * KL) + adversarial_weight * adaptive * hinge

    with the perceptual loss and the KL term as means, and adaptive = |gradient of reconstruction| / |of hinge| at the
    last layer, over a micro-batch. perceptual: of `build_perceptual(config)`, None without.
    """

    def __init__(self, config: VAEConfig, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self.network = build_arvae(config)
        self.config = config
        self.elements_per_frame = 3 * config.image_size**2
        # In a list, so that it is neither trained nor stored with the network.
        self._perceptual = [] if perceptual is None else [perceptual]
        self._temporal = False

    def enter(self, phase: Phase) -> None:
        """Begin a phase: decode with or without other frames, and freeze what it does not train."""
        self._temporal = phase.stage == "temporal"
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self._temporal if is_temporal(name) else phase.trains == "all")

    def forward(self, batch: dict[str, Tensor], judge: Judge | None = None, trust: float = 1.0) -> Terms:
        """batch: video [B, F, 3, H, W] in [0, 1], noise [B, F, L, C] of the posterior, mask [B, F].

        judge: says what a discriminator holds of the reconstructed frames (stage adversarial). trust: share of
        adversarial_weight, below 1 while the discriminator is new: the adaptive weight would make its noise as loud as
        the reconstruction.
        """
        video, mask = batch["video"], batch["mask"]
        mean, logvar = (part.float() for part in self.network.posterior(video))
        z = mean + (0.5 * logvar).exp() * batch["noise"] if self.config.sample_posterior else mean
        with watching(self.network.last_layer) as seen:
            rebuilt = self.network.decode(z, temporal=self._temporal).float()
        squared = ((rebuilt - video) ** 2).sum(dim=(2, 3, 4)) * mask  # [B, F]
        absolute = (rebuilt - video).abs().sum(dim=(2, 3, 4)) * mask
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(dim=(2, 3)) * mask  # per latent number
        weight, pixels = self.config.l1_weight, self.elements_per_frame
        loss = ((1 - weight) * squared + weight * absolute).sum()
        frames = mask.double().sum()
        terms: Terms = {
            "mse": (squared.detach().double().sum(), frames * pixels),
            "kl": (kl.detach().double().sum(), frames),
        }
        for module in self._perceptual:
            perceptual = (module.to(video.device)(rebuilt.flatten(0, 1), video.flatten(0, 1)) * mask.flatten()).sum()
            loss = loss + self.config.perceptual_weight * pixels * perceptual
            terms["perceptual"] = (perceptual.detach().double(), frames)
        reconstruction = loss
        loss = loss + self.config.kl_weight * pixels * kl.sum()
        if judge is not None:
            hinge = (hinge_generator(judge(rebuilt.flatten(0, 1))) * mask.flatten()).sum()
            adaptive = adaptive_weight(reconstruction / frames, hinge / frames, seen)
            loss = loss + trust * self.config.adversarial_weight * adaptive * hinge
            terms["adversarial"] = (hinge.detach().double(), frames)
            terms["adaptive_weight"] = (adaptive.double() * frames, frames)
        return {"loss": (loss, frames * pixels), **terms}

    def probe(self) -> Tensor:
        """Reconstruction [1, 3, 3, H, W] of frames that are a function of the shapes alone; every frame but the first
        reads those before it where the decoder has learnt or will learn to.
        """
        size, device = self.config.image_size, next(self.network.parameters()).device
        video = 0.5 + synthetic((1, PROBE_FRAMES, 3, size, size)).to(device) * 12**-0.5  # uniform in [0, 1]
        return self.network.decode(self.network.encode(video))
