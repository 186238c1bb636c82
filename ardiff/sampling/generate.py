"""From a trained network to latents: what to sample, noise by video, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.config import Config, ModelConfig, SamplingConfig
from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.randomness import Stream, hashed, normals
from ardiff.sampling.guidance import Guidance
from ardiff.sampling.levels import ADRows, MatrixRows, Rows, SlidingWindow, pinned_levels
from ardiff.sampling.pictures import frame_forwards
from ardiff.sampling.rollout import Rollout
from ardiff.sampling.sampler import Window, build_rollout, collect, conditions_of


@dataclass
class Video:
    """One video to be made: a function of its seed and conditions, whatever else is in its batch."""

    seed: int
    label: int | None = None
    text: Tensor | None = None  # [N, D], features of its text
    prefix: Tensor | None = None  # [P, L, C]: its first frames, as latents of the model
    ending: Tensor | None = None  # [E, L, C]: its last frames
    prompt: str | None = None  # for the record
    clip: str | None = None  # that its prefix was taken from, for the record

    @property
    def shape_key(self) -> tuple[int, int]:
        """What must be equal within a batch."""
        return tuple(0 if part is None else len(part) for part in (self.prefix, self.ending))  # type: ignore[return-value]


@dataclass
class Request:
    """Which videos, how long, and how."""

    videos: list[Video]
    num_frames: int
    sampling: SamplingConfig
    batch_size: int = 8
    text_tokens: int = 0  # as many as the model was trained with: texts are padded with zeros, and no text is all zeros
    warm_frames: int = 0  # frames of the prefix that start at the levels of the staircase instead of clean


def video_seeds(seed: int, numbers: Sequence[int]) -> list[int]:
    """The seeds of the videos with these numbers; each can be given again on its own."""
    return [int(key >> np.uint64(2)) for key in hashed(seed, Stream.SAMPLES, np.array(numbers, dtype=np.int64))]


def default_request(config: Config, num_videos: int, seed: int) -> Request:
    """Videos as long as training clips with the settings of `config.sampling`, all classes in turn."""
    classes = config.model.num_classes
    labels = [i % classes if classes else None for i in range(num_videos)]
    videos = [Video(s, label) for s, label in zip(video_seeds(seed, range(num_videos)), labels, strict=True)]
    sampling = config.sampling
    if not classes and config.model.architecture != "reference":  # texts are not known here
        sampling = replace(sampling, guidance=1.0)
    return Request(videos, config.model.num_frames, sampling)


def rows_of(request: Request, model: ModelConfig, prefix: int = 0, ending: int = 0) -> Rows:
    """The level matrix of a request."""
    sampling = request.sampling
    if ending:
        if sampling.gap:
            raise UserError(
                f"gap = {sampling.gap}: frames that are given at the end need synchronous sampling, gap = 0"
            )
        last = range(request.num_frames - ending, request.num_frames)
        return MatrixRows(pinned_levels(request.num_frames, sampling.num_steps, [*range(prefix), *last]))
    block = sampling.block or model.block
    return ADRows(request.num_frames, sampling.num_steps, sampling.gap, block, prefix - request.warm_frames)


def window_of(sampling: SamplingConfig) -> Window | None:
    """The window that the settings ask for."""
    if sampling.sliding:
        history = None if sampling.history < 0 else sampling.history
        return SlidingWindow(sampling.sliding, history, sampling.variable, sampling.partition, sampling.lookahead)
    return (sampling.window, sampling.sink) if sampling.window else None


def cache_mode(model: ModelConfig, sampling: SamplingConfig, prefix: int = 0, ending: int = 0) -> str:
    """`exact` where finished frames can be cached, else `none`; or what the settings insist on."""
    if sampling.cache != "auto":
        return sampling.cache
    block = 1 if model.mask == "frame_causal" else model.block
    fits = (sampling.block or model.block) % block == 0 and prefix % block == 0
    possible = model.mask != "bidirectional" and model.context == "strict" and not sampling.sliding and not ending
    return "exact" if possible and fits else "none"


def batches(request: Request) -> Iterator[list[int]]:
    """Numbers of the videos that are made together: equal numbers of given frames, at most `batch_size`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, video in enumerate(request.videos):
        groups.setdefault(video.shape_key, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), request.batch_size):
            yield group[start : start + request.batch_size]


def start(network: nn.Module, config: Config, request: Request, numbers: Sequence[int]) -> Rollout:
    """The rollout of some videos of a request, which can be made together. Raises UserError for impossible settings."""
    model, sampling = config.model, request.sampling
    device = next(network.parameters()).device
    videos = [request.videos[number] for number in numbers]
    prefix, ending = videos[0].shape_key
    flat = model.architecture == "reference" and model.reference.positions == "flat"
    if flat and request.num_frames > model.num_frames and not sampling.sliding:
        raise UserError(
            f"num_frames = {request.num_frames}: this network has positions for {model.num_frames} frames only; use "
            f"--sampling.sliding {model.num_frames}"
        )
    rows = rows_of(request, model, prefix, ending)
    shape = (model.tokens_per_frame, model.in_channels)

    def noise(first: int, count: int) -> Tensor:
        drawn = np.zeros((len(videos), count, *shape), dtype=np.float32)
        for i, video in enumerate(videos):
            for frame in range(count):
                drawn[i, frame] = normals(video.seed, Stream.SAMPLES, first + frame, shape)
        return torch.from_numpy(drawn).to(device)

    rows = _kept_full(rows, sampling)
    given = _given(videos, request.num_frames, device)
    return build_rollout(
        network,
        rows,
        noise,
        Schedule.from_config(config.diffusion, config.vae.image_size, model.num_frames),
        _guidance(network, request, model, videos, device),
        cache=cache_mode(model, sampling, prefix - request.warm_frames, ending),
        window=window_of(sampling),
        given=given,
        warm=given if request.warm_frames else None,
        solver=sampling.solver,
        eta=sampling.eta,
        step_seeds=np.array([video.seed for video in videos], dtype=np.int64),
        length=request.num_frames,
    )


def _kept_full(rows: Rows, sampling: SamplingConfig) -> Rows:
    """Rows without end for a window of fixed length, which then stays full; frames after the last are thrown away."""
    fixed = sampling.sliding and sampling.history >= 0 and not sampling.variable
    if fixed and isinstance(rows, ADRows) and rows.gap and (rows.num_frames or 0) > sampling.sliding:
        return replace(rows, num_frames=None)
    return rows


def cost(request: Request, model: ModelConfig, prefix: int = 0, ending: int = 0) -> int:
    """Frames that go through the network for one video and guidance branch."""
    rows, window = rows_of(request, model, prefix, ending), window_of(request.sampling)
    cached = cache_mode(model, request.sampling, prefix, ending) == "exact"
    total = rows.num_rows
    assert total is not None
    sliding = window if isinstance(window, SlidingWindow) else None
    return frame_forwards(_kept_full(rows, request.sampling), cached, sliding, total)


def generate(
    network: nn.Module, config: Config, request: Request, on_row: Callable[[int, int], None] | None = None
) -> Tensor:
    """Latents of the model [V, F, L, C] on the host, from a network on any device.

    on_row(done, total) reports progress over all batches.
    """
    shape = (request.num_frames, config.model.tokens_per_frame, config.model.in_channels)
    found = torch.empty(len(request.videos), *shape)
    done, groups = 0, list(batches(request))
    for number, numbers in enumerate(groups):
        rollout = start(network, config, request, numbers)
        rows = rollout.num_rows or 0

        def report(row: int, rows: int, done: int = done, left: int = len(groups) - number) -> None:
            if on_row is not None:
                on_row(done + row, done + rows * left)

        found[numbers] = collect(rollout, torch.empty(len(numbers), *shape), report)
        done += rows
    return found


def _given(videos: Sequence[Video], num_frames: int, device: torch.device) -> Tensor | None:
    """The given frames [B, P, L, C], or with an ending the whole video [B, F, L, C] that holds them."""
    if videos[0].prefix is None and videos[0].ending is None:
        return None
    prefix = [video.prefix for video in videos if video.prefix is not None]
    if videos[0].ending is None:
        return torch.stack(prefix).to(device)
    ending = torch.stack([video.ending for video in videos if video.ending is not None])
    whole = ending.new_zeros(len(videos), num_frames, *ending.shape[2:])
    whole[:, -ending.shape[1] :] = ending
    if prefix:
        whole[:, : len(prefix[0])] = torch.stack(prefix)
    return whole.to(device)


def can_be_guided(model: ModelConfig) -> bool:
    """Whether there is anything to guide towards: classes, texts, or the context that a published network holds."""
    return bool(model.num_classes or model.context_dim or model.architecture == "reference")


def _guidance(
    network: nn.Module, request: Request, model: ModelConfig, videos: Sequence[Video], device: torch.device
) -> Guidance:
    label = null_context = context = None
    if videos[0].label is not None:
        label = torch.tensor([video.label for video in videos], device=device)
    if model.context_dim:
        null_context = torch.zeros(len(videos), request.text_tokens, model.context_dim, device=device)
        context = null_context.clone()
        for i, video in enumerate(videos):
            if video.text is not None:
                context[i, : len(video.text)] = video.text.to(device)
    return conditions_of(network, len(videos), request.sampling.guidance, label, context, null_context)
