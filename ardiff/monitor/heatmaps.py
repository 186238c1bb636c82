"""What a diffusion run trains on and how it samples, as pictures: drawn once, when it begins."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from ardiff.config import Config
from ardiff.diffusion.timesteps import Timesteps
from ardiff.errors import UserError
from ardiff.sampling.generate import default_request, rows_of, window_of
from ardiff.sampling.levels import SlidingWindow
from ardiff.sampling.pictures import MARGIN, schedule_image

DRAWS, BINS, SIZE = 8192, 50, 600  # samples, rows of timesteps, pixels
OFTEN = 4.0  # times as often as if all timesteps were trained alike: the lightest colour
DARK, LIGHT = np.array([38.0, 32.0, 92.0]), np.array([250.0, 231.0, 150.0])


def schedule_heat_maps(config: Config) -> dict[str, np.ndarray]:
    """Tag -> picture uint8 [H, W, 3]: the training timesteps, and the level matrix of `config.sampling`, if its
    settings make one.
    """
    pictures = {"schedule/training_timesteps": np.asarray(timesteps_image(config))}
    try:
        request = default_request(config, 1, 0)
        rows, window = rows_of(request, config.model), window_of(config.sampling)
    except UserError:  # the sampler tells it, to those who sample
        return pictures
    sliding = window if isinstance(window, SlidingWindow) else None
    return pictures | {"schedule/sampling_levels": np.asarray(schedule_image(rows, sliding))}


def timesteps_image(config: Config) -> Image.Image:
    """How often a frame is trained at a timestep: the lighter the more often.

    Frames to the right, timesteps upwards from clean to noise. Frames that are given without noise do not count.
    """
    share = timesteps_histogram(config)[::-1]
    num_bins, num_frames = share.shape
    light = (share * num_bins / OFTEN).clip(max=1)[..., None]
    cells = (DARK + light * (LIGHT - DARK)).round().astype(np.uint8)
    cells = cells.repeat(SIZE // num_bins, axis=0).repeat(max(1, SIZE // num_frames), axis=1)
    canvas = np.full((cells.shape[0] + 2 * MARGIN, cells.shape[1] + 2 * MARGIN, 3), 255, dtype=np.uint8)
    canvas[MARGIN:-MARGIN, MARGIN:-MARGIN] = cells
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    last = config.diffusion.num_timesteps
    draw.text((MARGIN, 6), f"training timesteps of {config.diffusion.timesteps}, frames 0 .. {num_frames - 1}", fill=0)
    draw.text((MARGIN, 24), f"dark: never, light: {OFTEN:.0f} times as often as uniform, or more", fill=0)
    draw.text((4, MARGIN), f"t={last}", fill=0)
    draw.text((4, image.height - MARGIN - 12), "t=0", fill=0)
    return image


def timesteps_histogram(config: Config, draws: int = DRAWS) -> np.ndarray:
    """Share of a frame's trained samples in each part of 0..T: float64 [BINS, F]; a frame never trained has zeros."""
    settings, num_frames = config.diffusion, config.model.num_frames
    timesteps = Timesteps(settings, num_frames)
    drawn = timesteps.from_generator(draws, torch.Generator().manual_seed(0))
    trained = timesteps.trained(drawn).numpy()
    part = (drawn.timesteps.double().numpy() * BINS / settings.num_timesteps).astype(int).clip(0, BINS - 1)
    counts = np.zeros((BINS, num_frames))
    for frame in range(num_frames):
        counts[:, frame] = np.bincount(part[trained[:, frame], frame], minlength=BINS)
    return counts / counts.sum(axis=0).clip(min=1)
