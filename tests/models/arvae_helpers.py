"""A small AR-VAE configuration and what to feed it with."""

import torch

from ardiff.config import VAEConfig

SMALL = VAEConfig(
    image_size=16,
    patch_size=4,
    num_tokens=8,
    channels=4,
    hidden_size=16,
    encoder_depth=1,
    decoder_depth=1,
    num_heads=2,
    kl_weight=1e-5,
)


def frames(config, batch=2, num_frames=3):
    """A video of noise."""
    return torch.rand(batch, num_frames, 3, config.image_size, config.image_size)


def batch_of(config, video, noise=0.0):
    """A training batch in which every frame counts."""
    latents = torch.randn(*video.shape[:2], config.num_tokens, config.channels)
    return {"video": video, "noise": noise * latents, "mask": torch.ones(video.shape[:2], dtype=torch.bool)}
