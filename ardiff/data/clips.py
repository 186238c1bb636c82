"""Visits -> tensors: clips with everything random that belongs to them, and what happens when one cannot be read.

A bad sample never shortens a batch: another clip of the same data set, a function of seed and position, takes its place
(with as many real frames, so that what other ranks count on stays true), and it is reported with its shard, offset and
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ardiff.config import Config
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Visits
from ardiff.data.tar import ShardError
from ardiff.diffusion.timesteps import Draw, Timesteps
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed, normals, uniforms

BAD_IN_A_ROW = 20  # so many samples one after the other that cannot be used end the run
INFINITE = np.uint16(0x7C00)  # the exponent bits of float16: all set in infinities and NaN


class BadSample(NamedTuple):
    """A sample that could not be used: its position in the order of the run, where it lies, and why."""

    position: int
    shard: str
    offset: int
    reason: str


def count_bad(samples: Sequence[BadSample], lanes: int) -> tuple[int, int]:
    """How many positions had a bad sample, and the longest stretch of them in a row (in one lane of the order)."""
    places = sorted({(sample.position % lanes, sample.position // lanes) for sample in samples})
    longest = stretch = 0
    before = (-1, -1)
    for lane, nth in places:
        stretch = stretch + 1 if (lane, nth - 1) == before else 1
        longest, before = max(longest, stretch), (lane, nth)
    return len(places), longest


@dataclass
class Clips:
    """The tensors of some visits, and the samples among them that were replaced."""

    tensors: dict[str, Tensor]
    bad: list[BadSample] = field(default_factory=list)


class Collate(Protocol):
    """Makes tensors of visits, the same ones whichever visits are made together."""

    at_once: int  # samples that are best made at a time; 1 where there is nothing to gain by more than a micro-batch

    def __call__(self, planned: Visits, /) -> Clips:
        """The clips of these visits, or of others where one cannot be read."""
        ...

    def counted_frames(self, planned: Visits, /) -> np.ndarray:
        """How many frames of each clip [n] the loss counts, known of all ranks' clips without reading them."""
        ...


# Fills the given rows from the visits; returns those that could not be filled, with the reason.
Read = Callable[[np.ndarray, Visits], list[tuple[int, ShardError]]]


def read_rows(data: Mixture, planned: Visits, read: Read) -> tuple[Visits, list[BadSample]]:
    """Read all visits, with substitutes where that fails; returns the visits that were used at last.

    Raises UserError when BAD_IN_A_ROW samples in a row fail.
    """
    failed = read(np.arange(len(planned.video)), planned)
    if not failed:
        return planned, []
    visits = Visits(*(column.copy() for column in planned))
    bad: list[BadSample] = []
    for row, error in sorted(failed, key=lambda failure: failure[0]):
        bad.append(BadSample(int(visits.position[row]), error.path, error.offset, error.reason))
        _substitute(data, row, visits, read, bad)
    return visits, bad


def _substitute(data: Mixture, row: int, visits: Visits, read: Read, bad: list[BadSample]) -> None:
    """Put another clip, of at least as many frames, into a row."""
    frames, failures = visits.num_frames[row], 1
    for attempt in range(4096):
        other = data.substitutes(visits.position[row : row + 1], attempt)
        if other.num_frames[0] < frames:
            continue
        visits.video[row], visits.first_frame[row] = other.video[0], other.first_frame[0]
        failed = read(np.array([row]), visits)
        if not failed:
            return
        error = failed[0][1]
        bad.append(BadSample(int(visits.position[row]), error.path, error.offset, error.reason))
        failures += 1
        if failures == BAD_IN_A_ROW:
            raise UserError(
                f"{failures} samples in a row cannot be used, the last one: {error}; see "
                "`python -m data_tools.inspect_shards verify`"
            )
    raise UserError(f"{data.source}: no clip found that could stand in for {bad[-1].shard}, byte {bad[-1].offset}")


class LatentClips:
    """Clips of latents with their noise, timesteps, labels and text: what the diffusion objective reads."""

    at_once = 256  # clips of 4 kB, for which a call in Python costs as much as the copy

    def __init__(self, data: Mixture, space: LatentSpace, config: Config) -> None:
        self.data, self.space, self.config = data, space, config
        self.timesteps = Timesteps(config.diffusion, config.model.num_frames)

    def __call__(self, visits: Visits) -> Clips:
        """latents, noise [B, F, L, C]; timesteps, mask [B, F]; and, for models that need them, label [B]; context
        [B, N, D]; given [B, F] and window [B] of the `Draw`.
        """
        model, seed, positions = self.config.model, self.config.train.seed, visits.position
        draw = self._draw(visits)
        mask = self.timesteps.trained(draw, visits.num_frames)
        latents, text, visits, bad = self.read(visits)
        noise = np.empty(latents.shape, dtype=np.float32)
        for i, position in enumerate(positions.tolist()):
            noise[i] = normals(seed, Stream.NOISE, position, noise.shape[1:])
        tensors = {
            "latents": torch.from_numpy(self.space.to_model(latents)),
            "noise": torch.from_numpy(noise),
            "timesteps": draw.timesteps,
            "mask": mask,
        }
        if self.timesteps.gives:
            tensors["given"] = draw.given
        if self.timesteps.cuts:
            tensors["window"] = draw.window
        dropped = uniforms(hashed(seed, Stream.LABEL_DROP, positions), 1)[:, 0] < self.config.train.label_dropout
        if model.context_dim:
            tensors["context"] = torch.from_numpy(np.where(dropped[:, None, None], 0, text))
        if model.num_classes:
            label = self.data.labels[visits.video].astype(np.int64)
            tensors["label"] = torch.from_numpy(np.where(dropped | (label < 0), model.num_classes, label))
        return Clips(tensors, bad)

    def counted_frames(self, visits: Visits) -> np.ndarray:
        """Frames of each clip [n] that are real, noised and in the window."""
        if not (self.timesteps.gives or self.timesteps.cuts):
            return visits.num_frames
        return self.timesteps.trained(self._draw(visits), visits.num_frames).sum(dim=1).numpy()

    def _draw(self, visits: Visits) -> Draw:
        keys = hashed(self.config.train.seed, Stream.TIMESTEPS, visits.position)
        return self.timesteps.from_seeds(keys, visits.num_frames)

    def read(self, planned: Visits) -> tuple[np.ndarray, np.ndarray, Visits, list[BadSample]]:
        """What lies on disk: latents float16 [B, F, L, C], zero beyond the end of a video, and the text features
        float32 [B, N, D], zero beyond the end of a text (N = 0 for models without text).
        """
        model = self.config.model
        shape = (len(planned.video), model.num_frames, model.tokens_per_frame, model.in_channels)
        latents = np.empty(shape, dtype=np.float16)
        tokens = self.space.text_tokens if model.context_dim else 0
        text = np.zeros((shape[0], tokens, model.context_dim), dtype=np.float32)
        flipped = _flips(self.config, planned.position)

        def fill(chosen: np.ndarray, visits: Visits) -> list[tuple[int, ShardError]]:
            if len(chosen) == len(latents):
                failed = self._fill_latents(latents, visits, flipped)
            else:
                parts = Visits(*(column[chosen] for column in visits))
                part = latents[chosen]
                failed = [(int(chosen[i]), error) for i, error in self._fill_latents(part, parts, flipped[chosen])]
                latents[chosen] = part
            if tokens:
                lost = {row for row, _ in failed}
                failed += self._fill_text(text, [row for row in chosen.tolist() if row not in lost], visits)
            return failed

        visits, bad = read_rows(self.data, planned, fill)
        return latents, text, visits, bad

    def _fill_latents(self, latents: np.ndarray, visits: Visits, flipped: np.ndarray) -> list[tuple[int, ShardError]]:
        stride = self.config.data.stride
        failed = self.data.read_clips(latents, visits.video, visits.first_frame, visits.num_frames, stride, flipped)
        for row in np.flatnonzero(visits.num_frames < latents.shape[1]).tolist():
            latents[row, visits.num_frames[row] :] = 0
        if (latents.view(np.uint16) & INFINITE).max() == INFINITE:
            known = {row for row, _ in failed}
            for row in np.flatnonzero(~np.isfinite(latents).all(axis=(1, 2, 3))).tolist():
                if row not in known:
                    place = self.data.place_of(int(visits.video[row]))
                    failed.append((row, ShardError(*place, "latents that are not finite")))
        return failed

    def _fill_text(self, text: np.ndarray, rows: list[int], visits: Visits) -> list[tuple[int, ShardError]]:
        failed = []
        for row in rows:
            video = int(visits.video[row])
            try:
                features = self.data.read_text(video)
                if not np.isfinite(features).all():
                    raise ShardError(*self.data.place_of(video), "text features that are not finite")
            except ShardError as error:
                failed.append((row, error))
                continue
            text[row] = 0
            text[row, : len(features)] = features[: text.shape[1]]  # held-out texts may be longer than any trained on
        return failed


class FrameClips:
    """Clips of pictures with the noise of the posterior: what the reconstruction objective reads."""

    at_once = 1

    def __init__(self, data: Mixture, config: Config, num_frames: int) -> None:
        self.data, self.config, self.num_frames = data, config, num_frames
        self._pool = ThreadPoolExecutor(config.data.decode_threads, "pictures")

    def __call__(self, planned: Visits) -> Clips:
        """video [B, F, 3, H, W] in [0, 1]; noise [B, F, L, C]; mask [B, F]."""
        vae, seed, positions = self.config.vae, self.config.train.seed, planned.position
        video = np.zeros((len(positions), self.num_frames, vae.image_size, vae.image_size, 3), np.uint8)
        noise = np.empty((len(positions), self.num_frames, vae.num_tokens, vae.channels), dtype=np.float32)
        flipped, stride = _flips(self.config, positions), self.config.data.stride

        def one(row: int, visits: Visits) -> tuple[int, ShardError] | None:
            index, first, count = int(visits.video[row]), int(visits.first_frame[row]), int(visits.num_frames[row])
            try:
                video[row, :count] = self.data.read_frames(index, first, count, stride, bool(flipped[row]))
            except ShardError as error:
                return row, error
            return None

        def fill(chosen: np.ndarray, visits: Visits) -> list[tuple[int, ShardError]]:
            results = self._pool.map(lambda row: one(row, visits), chosen.tolist())
            return [failure for failure in results if failure is not None]

        visits, bad = read_rows(self.data, planned, fill)
        for i, position in enumerate(positions.tolist()):
            noise[i] = normals(seed, Stream.POSTERIOR, position, noise.shape[1:])
        pictures = torch.from_numpy(video).permute(0, 1, 4, 2, 3).float().div_(255)
        tensors = {
            "video": _crops(self.config, positions, pictures),
            "noise": torch.from_numpy(noise),
            "mask": _frame_mask(visits, self.num_frames),
        }
        return Clips(tensors, bad)

    def counted_frames(self, planned: Visits) -> np.ndarray:
        """Real frames of each clip [n]."""
        return planned.num_frames


def _flips(config: Config, positions: np.ndarray) -> np.ndarray:
    """Which clips [B] are read mirrored."""
    share = config.data.flip_probability
    if not share:
        return np.zeros(len(positions), dtype=bool)
    return uniforms(hashed(config.train.seed, Stream.FLIP, positions), 1)[:, 0] < share


def _crops(config: Config, positions: np.ndarray, video: Tensor) -> Tensor:
    """A random square of every clip [B, F, 3, H, W], enlarged to the whole frame (bilinear); all frames alike."""
    least = config.data.crop_scale
    if least == 1:
        return video
    numbers = torch.from_numpy(uniforms(hashed(config.train.seed, Stream.FRAME_CROP, positions), 3)).float()
    scale = least + (1 - least) * numbers[:, 0]
    transform = torch.zeros(len(video), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = scale
    transform[:, :, 2] = (2 * numbers[:, 1:] - 1) * (1 - scale)[:, None]  # the square stays inside the frame
    grid = F.affine_grid(transform, [len(video), 1, *video.shape[-2:]], align_corners=False)
    return F.grid_sample(video.flatten(1, 2), grid, padding_mode="border", align_corners=False).view_as(video)


def _frame_mask(visits: Visits, num_frames: int) -> Tensor:
    return torch.arange(num_frames)[None] < torch.from_numpy(visits.num_frames)[:, None]
