"""Sample videos from a trained run, an export or a converted checkpoint.

    python launch/sample.py --run runs/sky --num_videos 8 --num_frames 128 --steps 50 --gap 5 --out samples
    torchrun --nproc_per_node 8 -- launch/sample.py --run runs/sky --num_videos 256 --out samples   # ranks share them
    python launch/sample.py --run runs/sky --num_frames 1024 --sampling.window 16 --save_every 64 --out long
    python launch/sample.py --run runs/sky --gap 5 --show_schedule schedule.png

Writes every video in the formats asked for (mp4), contact_sheet.png (a row per video), latents.npy and samples.json
(how each was made). Settings of the sampler without an option of their own are given as --sampling.solver dpmpp.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config
from ardiff.files import remove_leftovers, replacing, write_json
from ardiff.models.temporal import TemporalCache
from ardiff.sampling import progress
from ardiff.sampling.decoder import Decoder, default_device
from ardiff.sampling.generate import Request, batches, cache_mode, cost, generate, rows_of, start, window_of
from ardiff.sampling.levels import SlidingWindow
from ardiff.sampling.options import (
    add_own_arguments,
    add_sampling_arguments,
    check_options,
    request_of,
    set_conditions,
)
from ardiff.sampling.outputs import VideoOutput
from ardiff.sampling.pictures import frame_forwards, schedule_picture
from ardiff.training.weights import load_dit, vector_of
from ardiff.video import Mp4Writer, contact_sheet

SHEET_ROWS = 16
DECODED_AT_ONCE = 16  # frames that wait for the decoder at most


def generate_with_bar(network: torch.nn.Module, config: Config, request: Request) -> Tensor:
    """`generate` on the GPU if there is one, with a progress bar on stderr."""
    network.to(default_device())
    with tqdm(unit="rows", desc="sampling", disable=None) as bar:

        def advance(row: int, rows: int) -> None:
            bar.total = rows
            bar.update(row - bar.n)

        return generate(network, config, request, advance)


class Program:
    """Samples the share of the videos that is this rank's, decodes and writes them as they come."""

    def __init__(
        self, options: argparse.Namespace, network: torch.nn.Module, config: Config, request: Request, decoder: Decoder
    ) -> None:
        self.options, self.network, self.config, self.request = options, network, config, request
        self.decoder = decoder
        space = decoder.space
        self.fps = options.fps or (space.fps / config.data.stride if space.fps else config.sampling.fps)
        self.results: dict[int, dict[str, Any]] = {}  # by the number of the video

    def sample(self, mine: list[int]) -> None:
        """Make the videos with these numbers."""
        share = Request(**{**vars(self.request), "videos": [self.request.videos[number] for number in mine]})
        groups = list(batches(share))
        with tqdm(unit="frames", desc="sampling", disable=None, total=len(mine) * share.num_frames) as bar:
            for group in groups:
                self._batch(share, group, [mine[i] for i in group], bar)

    def _batch(self, share: Request, group: list[int], numbers: list[int], bar: tqdm) -> None:
        rollout = start(self.network, self.config, share, group)
        state = self.options.out / "state" / f"batch_{numbers[0]:06d}.safetensors"
        every = self.options.save_every
        mark = progress.fingerprint(share, group, self.network) if every else ""
        before = progress.load(state, rollout, mark) if every else None
        if before is not None:
            tqdm.write(f"{state.name}: goes on at frame {before.shape[1]} of {share.num_frames}", file=sys.stderr)
        with Outputs(self, numbers) as outputs:
            parts = [before] if before is not None and before.shape[1] else []
            if parts:
                outputs.add(parts[0])
                bar.update(parts[0].shape[1] * len(group))
            saved = progress.total_frames(parts)
            for _, latents in rollout:
                parts.append(latents.cpu())
                outputs.add(parts[-1])
                bar.update(latents.shape[1] * len(group))
                if every and (progress.total_frames(parts) >= saved + every or rollout.done):
                    saved = progress.total_frames(parts)
                    progress.save(state, rollout, progress.joined(parts, latents), mark)
        for i, output in enumerate(outputs.videos):
            sheet = np.stack(output.sheet) if numbers[i] < SHEET_ROWS else None
            self.results[numbers[i]] = {"files": output.files, "latents": output.latents, "sheet": sheet}

    def describe(self, number: int, files: list[str]) -> dict[str, Any]:
        """How one video was made."""
        video, classes = self.request.videos[number], self.decoder.space.classes
        name = classes[video.label] if video.label is not None and video.label < len(classes) else None
        return {"number": number, "files": files, "seed": video.seed, "label": video.label, "class": name,
                "prompt": video.prompt, "clip": video.clip, "given_frames": list(video.shape_key)}  # fmt: skip


class Outputs:
    """The files of the videos of one batch; decodes their latents a few frames at a time."""

    def __init__(self, program: Program, numbers: list[int]) -> None:
        size, frames = program.decoder.image_size, program.request.num_frames
        out, formats = program.options.out, list(dict.fromkeys(program.options.format))
        names = [f"video_{number:06d}" for number in numbers]
        self.decoder = program.decoder
        self.caches = [TemporalCache() for _ in numbers]
        self.videos = [VideoOutput(out, name, formats, frames, (size, size), program.fps) for name in names]

    def __enter__(self) -> Outputs:
        for video in self.videos:
            video.__enter__()
        return self

    def add(self, latents: Tensor) -> None:
        """The next frames [B, n, L, C] of all videos."""
        for piece in latents.split(DECODED_AT_ONCE, dim=1):
            for video, part, cache in zip(self.videos, piece, self.caches, strict=True):
                video.add(self.decoder.decode(part[None], cache)[0], part.numpy())

    def __exit__(self, *error: Any) -> None:
        for video in self.videos:
            video.__exit__(*error)


def write_summary(program: Program, results: dict[int, dict[str, Any]]) -> None:
    """contact_sheet.png, latents.npy and samples.json of all videos."""
    options, request = program.options, program.request
    order = sorted(results)
    contact_sheet(options.out / "contact_sheet.png", [results[n]["sheet"] for n in order if n < SHEET_ROWS])
    with replacing(options.out / "latents.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, np.stack([results[n]["latents"] for n in order]), allow_pickle=False)
    if options.grid:
        _write_grid(program, [results[n]["latents"] for n in order[:SHEET_ROWS]])
    settings = {
        "run": str(options.run),
        "weights": options.weights,
        "ema": options.ema,
        "num_frames": request.num_frames,
        "warm_frames": request.warm_frames,
        "sampling": asdict(request.sampling),
        "seed": options.seed,
        "prefix": str(options.prefix) if options.prefix else None,
        "ending": str(options.ending) if options.ending else None,
        "text": str(options.text) if options.text else None,
        "prompts": str(options.prompts) if options.prompts else None,
        "fps": program.fps,
        "videos": [program.describe(n, results[n]["files"]) for n in order],
    }
    write_json(options.out / "samples.json", settings)


def _write_grid(program: Program, latents: list[np.ndarray]) -> None:
    """grid.mp4: videos [F, L, C] as tiles, decoded a few frames at a time."""
    side = program.decoder.image_size
    columns = math.ceil(math.sqrt(len(latents)))
    rows = math.ceil(len(latents) / columns)
    videos = torch.from_numpy(np.stack(latents).astype(np.float32))
    cache = TemporalCache()
    with Mp4Writer(program.options.out / "grid.mp4", rows * side, columns * side, program.fps) as writer:
        for part in videos.split(DECODED_AT_ONCE, dim=1):
            frames = program.decoder.decode(part, cache)
            tiles = np.zeros((frames.shape[1], rows * side, columns * side, 3), np.uint8)
            for i, video in enumerate(frames):
                top, left = i // columns * side, i % columns * side
                tiles[:, top : top + side, left : left + side] = video
            writer.add(tiles)


def show_schedule(options: argparse.Namespace, request: Request, config: Config) -> None:
    """Draw the level matrix and tell what it costs."""
    prefix, ending = request.videos[0].shape_key
    rows, window = rows_of(request, config.model, prefix, ending), window_of(request.sampling)
    sliding = window if isinstance(window, SlidingWindow) else None
    schedule_picture(options.show_schedule, rows, sliding)
    cached = cache_mode(config.model, request.sampling, prefix - request.warm_frames, ending) == "exact"
    forwards, everything = cost(request, config.model, prefix, ending), frame_forwards(rows, cache=False)
    how = "cached" if cached else "not cached"
    print(
        f"{options.show_schedule}: {rows.num_rows} rows, {forwards:,} frame-forwards a video ({how}; all frames in all "
        f"rows: {everything:,})"
    )


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Sample videos from a trained run.",
        "python launch/sample.py --run runs/sky --num_videos 8 --num_frames 128 --steps 50 --gap 5 --out samples",
    )
    parser.takes_settings = True
    add_sampling_arguments(parser)
    add_own_arguments(parser)
    options, overrides = cli.parse_with_overrides(parser)
    options.overrides = overrides
    check_options(options)
    if options.run is None:
        request, config = request_of(options, Config())
        show_schedule(options, request, config)
        return cli.EXIT_OK
    network, config, space = load_dit(options.run, vector_of(options.weights, options.ema))
    request, config = request_of(options, config)
    decoder = Decoder(space, options.arvae or config.data.arvae)
    set_conditions(options, request, config, space, decoder)
    if options.show_schedule:
        show_schedule(options, request, config)
        if options.out is None:
            return cli.EXIT_OK
    return _sample(options, network.to(default_device()), config, request, decoder)


def _sample(
    options: argparse.Namespace, network: torch.nn.Module, config: Config, request: Request, decoder: Decoder
) -> int:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    remove_leftovers(options.out)
    program = Program(options, network, config, request, decoder)
    for group in batches(request):
        start(network, config, request, group)  # refuses what is impossible before anything is written
    program.sample(list(range(len(request.videos)))[rank::size])
    results = _gathered(program.results, size)
    if rank == 0:
        write_summary(program, results)
        if options.save_every:
            _forget_states(options.out / "state")
        print(f"{len(request.videos)} videos of {request.num_frames} frames and contact_sheet.png in {options.out}")
    return cli.EXIT_OK


def _forget_states(folder: Path) -> None:
    """Remove the saved states of this generation, which is complete."""
    for path in folder.glob("batch_*.safetensors"):
        path.unlink()
    with contextlib.suppress(OSError):  # it is not there, or holds something else
        folder.rmdir()


def _gathered(results: dict[int, dict[str, Any]], size: int) -> dict[int, dict[str, Any]]:
    """The results of all ranks; waits for them."""
    if size == 1:
        return results
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish far apart
    everything: list[Any] = [None] * size
    dist.all_gather_object(everything, results)
    dist.destroy_process_group()
    return {number: result for part in everything for number, result in part.items()}


if __name__ == "__main__":
    cli.run(main)
