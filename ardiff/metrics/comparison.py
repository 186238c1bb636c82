"""Held-out videos through an auto-encoder and through linear codes of single frames, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ardiff.data.dataset import ShardSet
from ardiff.data.tar import BLOCK, parse_header
from ardiff.metrics.latents import LatentStatistics
from ardiff.metrics.linear_codes import Code
from ardiff.metrics.reconstruction import PIECE, Distance, Reconstruction, Scores
from ardiff.metrics.sheet import ORIGINAL, SHEET_ROWS, SheetRow

ARVAE = "AR-VAE"
WORST = 8  # videos in the table
SHORTEST = 16  # frames of a video that are taken, before videos are left out


def choose_clips(
    lengths: Sequence[int], max_frames: int | None, num_frames: int | None = None
) -> list[tuple[int, int]]:
    """Which videos of these lengths are measured, and how many of their first frames: (video, frames) in order.

    num_frames: of a video at most. max_frames: of all of them at most; then the videos are cut to one length, and where
    16 frames of each are too many, videos spread evenly over the data set are taken.
    """
    limit = num_frames or max(lengths)
    wanted = np.minimum(np.asarray(lengths), limit)
    videos = np.arange(len(wanted))
    if max_frames is None or wanted.sum() <= max_frames:
        return list(zip(videos.tolist(), wanted.tolist(), strict=True))
    count = min(len(wanted), max(1, max_frames // min(SHORTEST, limit)))
    videos = np.linspace(0, len(wanted) - 1, count).round().astype(int)
    length = next(n for n in range(limit, 0, -1) if np.minimum(wanted[videos], n).sum() <= max_frames)
    return [(int(video), int(min(wanted[video], length))) for video in videos]


def video_id(shards: ShardSet, video: int) -> str:
    """The id of a video: the key of its sample, read from the tar header in front of its first data."""
    name, offset = shards.place_of(video)
    file = os.open(name, os.O_RDONLY)
    try:
        header = os.pread(file, BLOCK, offset - BLOCK)
    finally:
        os.close(file)
    return parse_header(header, offset - BLOCK, Path(name)).key


@dataclass
class Comparison:
    """What came out.

    methods: per method its `numbers` per frame and the means over all frames (see `Scores.means`). videos: of each its
    id, frames and per method psnr and (of two frames and more) flicker. latents: see `LatentStatistics.result`. rows:
    (label, uint8 [SHEET_FRAMES * columns, H, W, 3]) of the contact sheet.
    """

    methods: dict[str, dict[str, float]]
    videos: list[dict[str, Any]]
    latents: dict[str, float | list[float]]
    frames: int
    frames_per_second: float  # encoded and decoded by the auto-encoder
    rows: list[tuple[str, np.ndarray]] = field(default_factory=list)


def compare(
    network: nn.Module,
    shards: ShardSet,
    clips: Sequence[tuple[int, int]],
    codes: dict[str, Code],
    lpips: Distance | None = None,
    shown: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> Comparison:
    """Measure a network (encode and decode as of ARVAE) and `codes` on `clips` as of `choose_clips`.

    shown: the methods in the columns of the contact sheet, after the originals. progress: told of frames as they are
    done.
    """
    methods = [*codes, ARVAE]
    work, statistics = Reconstruction(network.eval()), LatentStatistics()
    total = {name: Scores(lpips) for name in methods}
    drawn = set(np.linspace(0, len(clips) - 1, min(len(clips), SHEET_ROWS)).round().astype(int).tolist())
    result = Comparison({}, [], {}, 0, 0.0)
    for number, (video, length) in enumerate(clips):
        scores = {name: Scores(lpips) for name in methods}
        row = SheetRow(length, (ORIGINAL, *shown)) if shown and number in drawn else None
        for first, pictures, latents in _rebuilt(work, _parts(shards, video, length), codes):
            for name in methods:
                scores[name].add(pictures[ORIGINAL], pictures[name])
            statistics.add(latents)
            if row is not None:
                row.add(first, pictures)
            progress(len(latents))
        identity = video_id(shards, video)
        for name in methods:
            total[name].merge(scores[name])
        result.videos.append(_of_video(identity, length, scores))
        if row is not None:
            result.rows.append((f"{identity}\nframes {', '.join(map(str, row.places))}", row.pictures()))
    numbers = {name: code.numbers for name, code in codes.items()} | {ARVAE: statistics.numbers}
    result.methods = {name: {"numbers": numbers[name], **scores.means()} for name, scores in total.items()}
    result.latents, result.frames = statistics.result(), work.frames
    result.frames_per_second = work.frames / work.seconds
    return result


def _parts(shards: ShardSet, video: int, length: int) -> Iterator[np.ndarray]:
    """The first frames of a video, uint8 [n, H, W, 3] at a time."""
    for first in range(0, length, PIECE):
        yield shards.read_frames(video, first, min(PIECE, length - first))


@torch.no_grad()
def _rebuilt(
    work: Reconstruction, video: Iterator[np.ndarray], codes: dict[str, Code]
) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
    """Per part of a video: its first frame, pictures [n, 3, H, W] by method, the auto-encoder's latents [n, L, C]."""
    first = 0
    for piece in work.stream(video):
        pictures = {ORIGINAL: piece.original, ARVAE: piece.rebuilt}
        pictures |= {name: code(piece.original) for name, code in codes.items()}
        yield first, pictures, piece.latents
        first += len(piece.latents)


def _of_video(identity: str, length: int, scores: dict[str, Scores]) -> dict[str, Any]:
    means = {name: part.means() for name, part in scores.items()}
    found: dict[str, Any] = {"id": identity, "frames": length}
    for measure in ("psnr", "flicker"):
        if all(measure in part for part in means.values()):
            found[measure] = {name: part[measure] for name, part in means.items()}
    return found


def table(found: Comparison, source: str) -> list[str]:
    """The figures, and the videos that the auto-encoder rebuilds worst, as lines of text. source: where they lie."""
    names = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS", "gradient_energy": "gradients", "flicker": "flicker"}
    shown = [name for name in names if name in found.methods[ARVAE]]
    lines = [f"{found.frames} frames of {len(found.videos)} videos ({source}), means over frames:"]
    lines.append(f"  {'':14s}{'numbers':>8s}" + "".join(f"{names[name]:>11s}" for name in shown))
    original = {"gradient_energy": found.methods[ARVAE]["original_gradient_energy"]}
    for method, means in {ORIGINAL: original, **found.methods}.items():
        cells = "".join(f"{_figure(name, means):>11s}" for name in shown)
        lines.append(f"  {method:14s}{means.get('numbers', ''):>8}{cells}".rstrip())
    lines.append("  gradients: their energy, how sharp frames are; flicker: changes that the originals do not have")
    lines.append(f"PSNR of the videos that the {ARVAE} rebuilds worst:")
    lines.append(f"  {'id':24s}{'frames':>8s}" + "".join(f"{method:>13s}" for method in found.methods))
    for video in sorted(found.videos, key=lambda video: video["psnr"][ARVAE])[:WORST]:
        cells = "".join(f"{video['psnr'][method]:13.2f}" for method in found.methods)
        lines.append(f"  {video['id'][-24:]:24s}{video['frames']:8d}{cells}")
    latents = found.latents
    lines.append(
        f"latents: effective rank {latents['effective_rank']:.1f} of {found.methods[ARVAE]['numbers']}, "
        f"{latents['dead_channels']:.1%} of the numbers dead; {found.frames_per_second:.0f} frames/s"
    )
    return lines


def _figure(name: str, means: dict[str, float]) -> str:
    return f"{means[name]:.{2 if name == 'psnr' else 4}f}" if name in means else ""
