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
from ardiff.config import Config, with_overrides
from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.files import remove_leftovers, replacing, write_json
from ardiff.sampling import progress
from ardiff.sampling.conditions import Prompt, class_number, encode_clip, is_picture, read_prompts, text_features
from ardiff.sampling.decoder import Decoder, default_device
from ardiff.sampling.generate import (
    Request,
    Video,
    batches,
    cache_mode,
    can_be_guided,
    cost,
    generate,
    rows_of,
    start,
    video_seeds,
    window_of,
)
from ardiff.sampling.levels import SlidingWindow
from ardiff.sampling.outputs import FORMATS, VideoOutput
from ardiff.sampling.pictures import frame_forwards, schedule_picture
from ardiff.training.weights import load_dit
from ardiff.video import Mp4Writer, contact_sheet

SHEET_ROWS = 16
DECODED_AT_ONCE = 16  # frames that wait for the decoder at most


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of the sampler, shared with launch/evaluate.py; None means: as in the run's configuration."""
    parser.add_argument("--run", type=Path, help="a run_dir, a checkpoint of it, or an export")
    parser.add_argument("--num_videos", type=int, help="(default sampling.num_videos)")
    parser.add_argument("--num_frames", type=int, help="frames per video (default: a training clip)")
    parser.add_argument("--steps", type=int, help="solver steps per frame (default sampling.num_steps)")
    parser.add_argument("--gap", type=int, help="steps between the starts of neighbouring frames: 0 synchronous, "
                        "--steps frame by frame (default sampling.gap)")  # fmt: skip
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default sampling.guidance)")
    parser.add_argument("--seed", type=int, default=0, help="of all videos (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="videos sampled at a time (default %(default)s)")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged or plain weights")


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this program takes."""
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="one for each video, as in samples.json; classes go by position unless --label says which",
    )
    parser.add_argument("--label", help="class (name or number) of all videos (default: all classes in turn)")
    parser.add_argument("--text", type=Path, metavar="NPY", help="text features [N, D] of all videos; with --prompts "
                        "a folder with one file for each line, 000000.npy ...")  # fmt: skip
    parser.add_argument("--prefix", type=Path, metavar="VIDEO", help="a clip or picture that every video continues")
    parser.add_argument("--prefix_frames", type=int, help="frames taken of it (default: half a training clip)")
    parser.add_argument("--warm_frames", type=int, default=0, help="of these, frames at the end that are noised to the "
                        "levels of a staircase instead of kept (default 0)")  # fmt: skip
    parser.add_argument("--ending", type=Path, metavar="VIDEO", help="a clip or picture that every video ends with "
                        "(for bidirectional models)")  # fmt: skip
    parser.add_argument("--ending_frames", type=int, default=1, help="frames taken of its end (default 1)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one video for each line: prompt||clip")
    parser.add_argument("--arvae", type=Path, help="decodes the samples (default: the one that made the latents)")
    parser.add_argument("--fps", type=float, help="of the videos (default: that of the training videos)")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["mp4"], help="(default mp4)")
    parser.add_argument("--grid", action="store_true", help="also grid.mp4: the first 16 videos side by side")
    parser.add_argument("--save_every", type=int, metavar="N", help="save the state every N frames; the same command "
                        "goes on from there")  # fmt: skip
    parser.add_argument("--show_schedule", type=Path, metavar="PNG", help="draw the level matrix; without --out "
                        "nothing is sampled")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's; the environment says it too


def request_of(options: argparse.Namespace, config: Config) -> tuple[Request, Config]:
    """What the command line asks for, and the configuration with it. Raises UserError where it makes no sense."""
    for name in ("num_videos", "num_frames", "steps", "batch_size", "prefix_frames", "ending_frames", "save_every"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("fps", "guidance"):
        value = getattr(options, name, None)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value}: must be a number above 0")
    if getattr(options, "fps", None) and not 0.01 <= options.fps <= 10_000:
        raise UserError(f"--fps {options.fps}: must lie between 0.01 and 10000")
    num_steps = options.steps or config.sampling.num_steps
    changes = [f"sampling.num_steps={num_steps}"]
    gap = options.gap if options.gap is not None else min(config.sampling.gap, num_steps)
    changes.append(f"sampling.gap={gap}")
    if options.guidance is not None:
        changes.append(f"sampling.guidance={options.guidance}")
    overrides = getattr(options, "overrides", [])
    names = [word.removeprefix("--") for word in overrides if word.startswith("--") or "=" in word]
    wrong = [name for name in names if not name.startswith("sampling.")]
    if wrong:
        raise UserError(f"'{wrong[0]}': a trained model is sampled as it is; only --sampling.* can be changed here")
    config = with_overrides(config, [*changes, *overrides])
    model, sampling = config.model, config.sampling
    if options.guidance not in (None, 1.0) and not can_be_guided(model):
        raise UserError(
            f"--guidance {options.guidance}: this model has no classes or texts to guide towards; leave it at 1"
        )
    if not can_be_guided(model):
        sampling.guidance = 1.0
    seeds = getattr(options, "seeds", None)
    if seeds and not all(0 <= seed < 2**62 for seed in seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: must be whole numbers from 0 to 2^62 - 1")
    count = len(seeds) if seeds else options.num_videos or sampling.num_videos
    if seeds and options.num_videos not in (None, count):
        raise UserError(f"--num_videos {options.num_videos}: but --seeds names {count}")
    labels = [i % model.num_classes if model.num_classes else None for i in range(count)]
    videos = [
        Video(s, label) for s, label in zip(seeds or video_seeds(options.seed, range(count)), labels, strict=True)
    ]
    num_frames = options.num_frames or model.num_frames
    request = Request(videos, num_frames, sampling, options.batch_size)
    window = window_of(sampling)
    rows = rows_of(request, model)  # refuses what is impossible
    if isinstance(window, SlidingWindow):
        window.check(rows)
    return request, config


def generate_with_bar(network: torch.nn.Module, config: Config, request: Request) -> Tensor:
    """`generate` on the GPU if there is one, with a progress bar on stderr."""
    network.to(default_device())
    with tqdm(unit="rows", desc="sampling", disable=None) as bar:

        def advance(row: int, rows: int) -> None:
            bar.total = rows
            bar.update(row - bar.n)

        return generate(network, config, request, advance)


def set_conditions(
    options: argparse.Namespace, request: Request, config: Config, space: LatentSpace, decoder: Decoder
) -> None:
    """Give the videos their classes, texts and frames."""
    prompts = read_prompts(options.prompts) if options.prompts else None
    if prompts is not None:
        _one_video_per_prompt(options, request, config, prompts)
    request.text_tokens, request.warm_frames = space.text_tokens, options.warm_frames
    clips = [options.prefix] if prompts is None else [prompt.clip or options.prefix for prompt in prompts]
    given = max((_prefix_frames(options, config, clip) for clip in clips), default=0)
    ending = options.ending_frames if options.ending else 0
    if given + ending >= request.num_frames:
        raise UserError(
            f"--prefix_frames {given}{f' and --ending_frames {ending}' if ending else ''}: must leave something of "
            f"--num_frames {request.num_frames}"
        )
    least = min((_prefix_frames(options, config, clip) for clip in clips), default=0)
    if not 0 <= request.warm_frames <= least:
        raise UserError(f"--warm_frames {request.warm_frames}: must be at most the {least} frames that are given")
    last = encode_clip(options.ending, ending, config, decoder, "--ending", end=True) if options.ending else None
    label = class_number(options.label, space.classes, config) if options.label is not None else None
    text = text_features(options.text, config, space) if options.text and prompts is None else None
    encoded: dict[Path, Tensor] = {}
    for number, video in enumerate(request.videos):
        clip = clips[number] if prompts else clips[0]
        if clip is not None and clip not in encoded:
            frames, option = _prefix_frames(options, config, clip), "--prompts" if prompts else "--prefix"
            encoded[clip] = encode_clip(clip, frames, config, decoder, option, end=False)
        video.label = label if label is not None else video.label
        video.prefix, video.clip = (encoded[clip], str(clip)) if clip else (None, None)
        video.ending, video.text = last, text
        if prompts:
            video.prompt = prompts[number].text
            if options.text:
                video.text = text_features(options.text / f"{number:06d}.npy", config, space)


def _prefix_frames(options: argparse.Namespace, config: Config, clip: Path | None) -> int:
    """How many frames are taken of a clip: unless told otherwise half a training clip, in whole blocks."""
    if clip is None:
        return 0
    if options.prefix_frames:
        return int(options.prefix_frames)
    if is_picture(clip):
        return 1
    block = config.sampling.block or config.model.block
    return max(1, config.model.num_frames // 2 // block * block)


def _one_video_per_prompt(options: argparse.Namespace, request: Request, config: Config, prompts: list[Prompt]) -> None:
    if options.num_videos not in (None, len(prompts)):
        raise UserError(f"--num_videos {options.num_videos}: but --prompts has {len(prompts)} lines, a video each")
    if options.seeds and len(options.seeds) != len(prompts):
        raise UserError(f"--seeds names {len(options.seeds)} videos, but --prompts has {len(prompts)} lines")
    seeds, classes = options.seeds or video_seeds(options.seed, range(len(prompts))), config.model.num_classes
    request.videos = [Video(seed, i % classes if classes else None) for i, seed in enumerate(seeds)]


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
    """The files of the videos of one batch; decodes their latents a few frames at a time where the decoder allows."""

    def __init__(self, program: Program, numbers: list[int]) -> None:
        size, frames = program.decoder.image_size, program.request.num_frames
        self.num_frames = frames
        out, formats = program.options.out, list(dict.fromkeys(program.options.format))
        names = [f"video_{number:06d}" for number in numbers]
        self.decoder = program.decoder
        self.waiting: list[Tensor] = []  # for a decoder that wants the whole video
        self.videos = [VideoOutput(out, name, formats, frames, (size, size), program.fps) for name in names]

    def __enter__(self) -> Outputs:
        for video in self.videos:
            video.__enter__()
        return self

    def add(self, latents: Tensor) -> None:
        """The next frames [B, n, L, C] of all videos."""
        at_once = DECODED_AT_ONCE
        if not self.decoder.by_frame:
            self.waiting.append(latents)
            if progress.total_frames(self.waiting) < self.num_frames:
                return
            latents, at_once = torch.cat(self.waiting, dim=1), self.num_frames
        for begin in range(0, latents.shape[1], at_once):
            piece = latents[:, begin : begin + at_once]
            for video, part in zip(self.videos, piece, strict=True):
                video.add(self.decoder.decode(part[None])[0], part.numpy())

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
    at_once = DECODED_AT_ONCE if program.decoder.by_frame else videos.shape[1]
    with Mp4Writer(program.options.out / "grid.mp4", rows * side, columns * side, program.fps) as writer:
        for part in videos.split(at_once, dim=1):
            frames = program.decoder.decode(part)
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
    if options.out is None and options.show_schedule is None:
        raise UserError("missing --out DIR, the folder of the videos (or --show_schedule PNG); see --help")
    if options.run is None and options.out is not None:
        raise UserError("missing --run DIR, a run_dir, a checkpoint of it, or an export; see --help")
    if options.run is None:
        request, config = request_of(options, Config())
        show_schedule(options, request, config)
        return cli.EXIT_OK
    network, config, space = load_dit(options.run, options.weights)
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
