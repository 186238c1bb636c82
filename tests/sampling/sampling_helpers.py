"""A small network and what the tests of the samplers compare with."""

import dataclasses

import torch
from data_helpers import randomize

from ardiff.config import ModelConfig
from ardiff.models import DiT

FRAMES, TOKENS, CHANNELS, BATCH, STEPS = 6, 2, 4, 2, 9
SMALL = ModelConfig(
    num_frames=FRAMES, tokens_per_frame=TOKENS, in_channels=CHANNELS, hidden_size=16, depth=2, num_heads=2
)


def build(dtype=torch.float64, **options):
    """A network with random weights everywhere."""
    return randomize(DiT(dataclasses.replace(SMALL, **options))).to(dtype)


def noise_of(dtype=torch.float64, frames=FRAMES):
    """[B, F, L, C]"""
    return torch.randn(BATCH, frames, TOKENS, CHANNELS, dtype=dtype)


def scales_of_labels(schedule, t, x):
    """data and noise of frames x from what the network is told of them."""
    if schedule.process == "ddpm":
        return schedule.scales(t, x)
    tau = (t / schedule.num_timesteps)[..., None, None]
    return 1 - tau, tau


class Oracle:
    """Knows the clean video and answers with it, in the terms of a schedule; counts the frames it was asked for."""

    def __init__(self, clean, schedule, config=SMALL):
        self.clean, self.schedule, self.config = clean, schedule, config
        self.frames, self.calls = 0, 0

    def __call__(self, x, t, label=None, context=None, cache=None, window=None):
        first = 0 if cache is None else cache.num_frames
        x0 = self.clean[:, first : first + x.shape[1]]
        self.frames, self.calls = self.frames + x.shape[1], self.calls + 1
        data, noise = scales_of_labels(self.schedule, t, x)
        return self.schedule.target(x0, t, (x - data * x0) / noise)


def assert_same(one, other, tolerance):
    """Equal to a tolerance relative to the largest value."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())
