"""Validation while training: which data are held out, what the DiT is measured on, and how ranks share the work.

The DiT is measured by its own objective on a fixed set of clips with fixed noise and timesteps, a function of the
held-out data and the settings of the model alone: the same at every validation, in every run and on any number of
ranks, so that losses can be compared.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ardiff.config import Config
from ardiff.data.clips import LatentClips
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import Mixture
from ardiff.data.plan import Visits
from ardiff.data.shards import MANIFEST
from ardiff.data.urls import is_remote
from ardiff.diffusion.timesteps import Draw
from ardiff.errors import UserError
from ardiff.monitor.writers import VALIDATION
from ardiff.randomness import Stream, hashed, uniforms
from ardiff.terms import Terms, mean_terms

log = logging.getLogger("ardiff")
SEED = 0x76616C6964617465  # of noise and timesteps, whatever train.seed is


def open_held_out(config: Config, trained: Mixture, open_set: Callable[[Config], Mixture]) -> Mixture | None:
    """Videos that are not trained on: `data.validation`, or what the data tools wrote to SHARDS/validation.

    open_set: opens and checks `config.data.shards` as the training data. None without held-out videos. Raises UserError
    for what cannot be read or does not fit, and for data that are trained on; warns of those that are in part.
    """
    source = config.data.validation
    if source is None:
        beside = Path(config.data.shards or "") / "validation"
        if not config.data.shards or is_remote(config.data.shards) or not (beside / MANIFEST).is_file():
            return None
        source = str(beside)
    data = dataclasses.replace(config.data, shards=source, mixture=[], order="global", flip_probability=0.0)
    train = dataclasses.replace(config.train, seed=SEED)  # of the clips that stand in for unreadable ones
    try:
        held_out = open_set(dataclasses.replace(config, data=data, train=train))
    except UserError as error:
        raise UserError(f"--data.validation: {error}") from error
    shared = _shared_videos(held_out, trained)
    if shared == len(held_out) or any(held_out.sets[0].identity == part.identity for part in trained.sets):
        raise UserError(f"data.validation = {held_out.source}: is what is trained on; name videos that are held out")
    if shared:
        log.warning(
            "%s: %d of %d held-out videos have the latents of one that is trained on (same length and checksum); "
            "figures on them say nothing of new videos",
            held_out.source,
            shared,
            len(held_out),
        )
    return held_out


def _shared_videos(held_out: Mixture, trained: Mixture) -> int:
    """How many held-out videos have latents of the length and checksum of one that is trained on (0 for pictures).

    From the indexes alone, so segments of one source video that were put into different splits are not found.
    """
    if held_out.manifest.kind != "latents":
        return 0
    mine, theirs = (
        np.concatenate([(part.frames.astype(np.uint64) << np.uint64(32)) | part.checksums for part in data.sets])
        for data in (held_out, trained)
    )
    return int(np.isin(mine, theirs).sum())


def check_latents(held_out: Mixture, space: LatentSpace, num_classes: int) -> None:
    """See that held-out latents mean what the trained ones do, and number their classes alike. Raises UserError."""
    found = LatentSpace.of(held_out.manifest, space.normalize)
    if found.arvae_id != space.arvae_id:
        raise UserError(
            f"--data.validation: {held_out.source} holds latents of AR-VAE {found.arvae_id}, the training data of "
            f"{space.arvae_id}; extract them anew with the same AR-VAE"
        )
    if (found.stride, found.sampled_fps) != (space.stride, space.sampled_fps):
        log.warning("%s: frames were taken at another rate than those that are trained on", held_out.source)
    if not num_classes:
        return
    unknown = [name for name in held_out.classes if name not in space.classes]
    if unknown:
        raise UserError(
            f"--data.validation: {held_out.source} has the class '{unknown[0]}', which the training data lack"
        )
    numbers = [space.classes.index(name) for name in held_out.classes]
    held_out.labels = np.array([*numbers, -1], dtype=np.int32)[held_out.labels]  # label -1, none, takes the last
    held_out.classes = space.classes


class HeldOutClips(LatentClips):
    """The clips that a DiT is measured on: labels kept, nothing mirrored, noise and timesteps fixed.

    visits: train.validation_frames / model.num_frames of them (at least one). Every video is used before any is used
    again, once from its middle, several times from stretches that lie evenly in it. The uniform numbers behind the
    timesteps are stratified over the clips: the distribution is that of training, and every decile gets its share.
    Videos shorter than a clip are left out where frames would read the padding behind them.
    """

    def __init__(self, data: Mixture, space: LatentSpace, config: Config) -> None:
        fixed = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, flip_probability=0.0),
            train=dataclasses.replace(config.train, seed=SEED, label_dropout=0.0),
        )
        super().__init__(data, space, fixed)
        model, stride = config.model, config.data.stride
        span = (model.num_frames - 1) * stride + 1
        usable = np.flatnonzero((data.frames >= span) | (model.mask == "frame_causal"))
        if not len(usable):
            raise UserError(f"--data.validation: no video of {data.source} is as long as a clip ({span} frames)")
        count = max(1, config.train.validation_frames // model.num_frames)
        video, first = _spread(count, data.frames[usable], span)
        available = -(-(data.frames[usable][video] - first) // stride)
        self.visits = Visits(usable[video], first, np.arange(count), np.minimum(available, model.num_frames))
        self.num_videos, self.num_left_out = len(np.unique(video)), len(data) - len(usable)
        self._uniforms = stratified(SEED, count, self.timesteps.width)

    def __len__(self) -> int:
        return len(self.visits.video)

    def _draw(self, visits: Visits) -> Draw:
        return self.timesteps.from_uniforms(self._uniforms[visits.position], visits.num_frames)


def _spread(count: int, frames: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Which video each of `count` clips of `span` frames is taken from, and its first frame: int64 [count] each.

    frames [V]: the lengths of the videos.
    """
    rounds, rest = divmod(count, len(frames))
    some = (2 * np.arange(rest) + 1) * len(frames) // (2 * max(rest, 1))  # they lie evenly in the set
    video = np.concatenate([np.tile(np.arange(len(frames)), rounds), some])
    turn = np.repeat(np.arange(rounds + 1), [len(frames)] * rounds + [rest])
    uses = np.bincount(video, minlength=len(frames))[video]
    choices = np.maximum(1, frames[video] - span + 1)
    return video, choices * (2 * turn + 1) // (2 * uses)


def stratified(seed: int, count: int, width: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count, width]: each column has one in every count-th of the interval.

    A Latin hypercube (McKay, Beckman and Conover 1979): every number is uniform, and columns are paired at random.
    """
    numbers = uniforms(hashed(seed, Stream.TIMESTEPS, np.arange(count)), 2 * width)
    cells = np.argsort(numbers[:, :width], axis=0, kind="stable")
    return np.minimum((cells + numbers[:, width:]) / count, np.nextafter(1.0, 0.0))


class HeldOutLoss:
    """The training loss on held-out clips, also by decile of the timestep and by frame, shared in micro-batches."""

    def __init__(self, clips: HeldOutClips, micro_batch_size: int) -> None:
        self.clips, self.micro_batch_size = clips, micro_batch_size
        self.num_batches = -(-len(clips) // micro_batch_size)

    @property
    def identity(self) -> str:
        """Of the held-out data."""
        return self.clips.data.identity

    def measure(self, objective: nn.Module, rank: int, world_size: int) -> dict[int, Terms]:
        """The terms of every world_size-th micro-batch, on the host, by the number of the micro-batch."""
        device = next(objective.parameters()).device
        found = {}
        for number in range(rank, self.num_batches, world_size):
            chosen = slice(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)
            clips = self.clips(Visits(*(column[chosen] for column in self.clips.visits)))
            for bad in clips.bad:
                log.error("validation: %s, byte %d: %s; replaced by another clip", bad.shard, bad.offset, bad.reason)
            terms: Terms = objective({name: part.to(device) for name, part in clips.tensors.items()})
            found[number] = {name: (total.detach().cpu(), count.cpu()) for name, (total, count) in terms.items()}
        return found

    def combine(self, parts: list[dict[int, Terms]]) -> dict[str, Any]:
        """validation_loss, validation_loss_by_decile and validation_loss_by_frame: means over unmasked elements.

        Micro-batches are added up in their own order, so that the number of ranks changes nothing.
        """
        found = {number: terms for part in parts for number, terms in part.items()}
        assert sorted(found) == list(range(self.num_batches))
        means = mean_terms([found[number] for number in range(self.num_batches)], lambda totals: totals)
        return {f"{VALIDATION}{name}": value for name, value in means.items()}
