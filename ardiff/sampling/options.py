"""What the command lines of the sampling programs ask for: options, and what they make of a request."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from ardiff.config import Config, with_overrides
from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.sampling.conditions import Prompt, class_number, encode_clip, is_picture, read_prompts, text_features
from ardiff.sampling.decoder import Decoder
from ardiff.sampling.generate import Request, Video, can_be_guided, rows_of, video_seeds, window_of
from ardiff.sampling.levels import SlidingWindow
from ardiff.sampling.outputs import FORMATS


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of the sampler, shared with launch/evaluate.py; None means: as in the run's configuration."""
    parser.add_argument("--run", type=Path, help="a run_dir, a checkpoint of it, or an export")
    parser.add_argument("--num_videos", type=int, help="(default sampling.num_videos)")
    parser.add_argument("--num_frames", type=int, help="frames per video (default: a training clip)")
    parser.add_argument("--steps", type=int, help="solver steps per frame (default sampling.num_steps)")
    parser.add_argument("--gap", type=int, help="steps between the starts of neighbouring frames: 0 synchronous, "
                        "--steps frame by frame (default sampling.gap)")  # fmt: skip
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (default "
                        "sampling.guidance)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of all videos (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="videos sampled at a time (default %(default)s)")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged or plain weights")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="which average, of train.ema_decay and "
                        "train.extra_ema_decays (default the first)")  # fmt: skip


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
    parser.add_argument("--ending_frames", type=int, help="frames taken of its end (default 1)")
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
    fps = getattr(options, "fps", None)
    if fps is not None and not 0.01 <= fps <= 10_000:  # NaN included
        raise UserError(f"--fps {fps}: must lie between 0.01 and 10000")
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
    if not can_be_guided(model):
        asked = options.guidance is not None or any(name.partition("=")[0] == "sampling.guidance" for name in names)
        if asked and sampling.guidance != 1.0:
            raise UserError(
                f"guidance = {sampling.guidance}: this model has no classes or texts to guide towards; leave it at 1"
            )
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


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect, or a picture that could not be written, before anything is loaded."""
    for name, clips in (("prefix_frames", ("prefix", "prompts")), ("ending_frames", ("ending",))):
        value = getattr(options, name)
        if value is not None and not any(getattr(options, clip) for clip in clips):
            raise UserError(f"--{name} {value}: of which clip? Name it with {' or '.join(f'--{c}' for c in clips)}")
    picture = options.show_schedule
    if picture is not None and (picture.suffix.lower() != ".png" or picture.is_dir()):
        raise UserError(f"--show_schedule {picture}: must be the name of a .png file")
    if options.out is None and picture is None:
        raise UserError("missing --out DIR, the folder of the videos (or --show_schedule PNG); see --help")
    if options.run is not None:
        return
    if options.out is not None:
        raise UserError("missing --run DIR, a run_dir, a checkpoint of it, or an export; see --help")
    for name in ("prefix", "ending", "prompts", "label", "text", "ema"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} {getattr(options, name)}: needs --run DIR, the model that it is for")


def set_conditions(
    options: argparse.Namespace, request: Request, config: Config, space: LatentSpace, decoder: Decoder
) -> None:
    """Give the videos their classes, texts and frames."""
    prompts = read_prompts(options.prompts) if options.prompts else None
    if prompts is not None:
        _one_video_per_prompt(options, request, config, prompts)
    request.text_tokens, request.warm_frames = space.text_tokens, options.warm_frames
    clips = [options.prefix] if prompts is None else [prompt.clip or options.prefix for prompt in prompts]
    if options.prefix_frames and not any(clips):
        raise UserError(f"--prefix_frames {options.prefix_frames}: but --prompts {options.prompts} names no clips")
    given = max((_prefix_frames(options, config, clip) for clip in clips), default=0)
    ending = (options.ending_frames or 1) if options.ending else 0
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
