"""Encode the videos of a corpus, or shards of pictures, into latent shards with a trained AR-VAE.

    python -m data_tools.extract_latents --corpus corpus.jsonl --arvae runs/arvae --out latents/
    torchrun --nproc_per_node 8 -m data_tools.extract_latents --frames shards/ --arvae runs/arvae --out latents/
    deepspeed --module data_tools.extract_latents --corpus corpus.jsonl --arvae runs/arvae --out latents/ --flip

The train split goes to --out, the others to --out/validation and --out/test, each with its manifest.json. Shards that
are complete are kept, so a run that was killed and started again finishes the rest, to the same bytes, whatever the
number of ranks.

Exit code 0: all videos are in the shards; 1: some could not be used and were left out; 2: a mistake in the command.

What needs torch is imported late: the processes that decode import this module first.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, it works from a clone as well

from ardiff import cli
from ardiff.data.corpus import SPLITS
from ardiff.errors import EchoedError, UserError
from ardiff.files import remove_leftovers
from data_tools.common import alone, claim_folder, die_with_launcher, output_folder, plural, require
from data_tools.sharding.progress import Progress
from data_tools.sharding.sampling import add_rate_arguments, parse_rate

if TYPE_CHECKING:
    from data_tools.sharding.latent_inputs import Inputs, LatentTask
    from data_tools.sharding.latent_shards import LatentWriter
    from data_tools.sharding.ranks import Ranks

RESULTS = "**/*.tar"


@dataclass
class Work:
    """What a rank needs to know before it begins: the same on all ranks."""

    inputs: Inputs
    tasks: list[LatentTask]
    writer: LatentWriter
    details: dict[str, Any]  # of all manifests
    settings: dict[str, Any]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.parser(
        "Encode the videos of a corpus, or shards of pictures, into latent shards with a trained AR-VAE.",
        "python -m data_tools.extract_latents --corpus corpus.jsonl --arvae runs/arvae --out latents/",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", type=Path, metavar="FILE", help="videos listed by scan_videos")
    what.add_argument("--frames", type=Path, metavar="DIR", help="or shards of pictures made by shard_videos")
    parser.add_argument(
        "--arvae", type=Path, required=True, metavar="CHECKPOINT", help="a run_dir, a checkpoint of it, or an export"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    add_rate_arguments(parser)
    parser.add_argument("--flip", action="store_true", help="encode and store the mirrored frames as well")
    parser.add_argument(
        "--text", type=Path, metavar="DIR_OR_NPZ", help="text features to be stored with the latents: a folder of "
        "ID.npy files, or a .npz file with an array ID per video: float16 or float32 [tokens, D]"
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="frames encoded at a time (default %(default)s)")
    parser.add_argument("--shard_mb", type=float, default=64, help="about the size of a shard (default %(default)g)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:1")
    parser.add_argument("--decode_workers", type=int, help="decoding processes per rank (default: its cores)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds without a frame that end a video (default %(default)g)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense."""
    for name in ("batch_size", "decode_workers", "timeout"):
        value = getattr(options, name)
        if value is not None:
            require(f"--{name}", value, 1)
    require("--shard_mb", options.shard_mb, 0.001, 1e6)
    if options.frames is not None and (options.stride is not None or options.fps is not None):
        raise UserError("--stride and --fps are for --corpus; the pictures of --frames are taken as they are")


def prepare(options: argparse.Namespace, ranks: Ranks) -> Work:
    """Read everything that may be wrong, before anything is written. Raises UserError."""
    from ardiff.training.weights import load_arvae
    from data_tools.sharding.encoding import Encoder, choose_device
    from data_tools.sharding.latent_inputs import from_corpus, from_frames
    from data_tools.sharding.latent_shards import LatentWriter
    from data_tools.sharding.ranks import share_of_cores
    from data_tools.sharding.text_features import TextFeatures

    _check(options)
    device = choose_device(options.device, ranks.local_rank)
    rate = parse_rate(options.stride, options.fps)
    network, arvae_id = load_arvae(options.arvae)
    config = network.config
    if options.frames is None:
        inputs = from_corpus(options.corpus, rate)
    else:
        inputs = from_frames(options.frames, config.image_size, named=options.text is not None)
    text = TextFeatures(options.text, inputs.keys()) if options.text else None
    details: dict[str, Any] = {"tokens": config.num_tokens, "channels": config.channels, "size": config.image_size}
    if options.flip:
        details["flipped"] = True
    if text is not None:
        details["text_dim"] = text.dim
    settings = {
        **details,
        **inputs.settings,
        "arvae_id": arvae_id,
        "text": text.digest if text else None,
        "batch_size": options.batch_size,  # the last digits of latents may depend on it
        "shard_mb": options.shard_mb,
    }
    details["arvae"] = {"id": arvae_id, "path": str(options.arvae.resolve())}
    encoder = Encoder(network, device, options.batch_size, options.flip, share_of_cores(ranks))
    writer = LatentWriter(encoder, arvae_id, text)
    tasks = inputs.tasks(options.out, writer.size, 1e6 * options.shard_mb)
    return Work(inputs, tasks, writer, details, settings)


def claim(out: Path, work: Work, until_the_end: ExitStack) -> list[int]:
    """Make the folders ready (by one process for all); returns the numbers of the shards that are to be written."""
    from data_tools.sharding.tasks import forget_manifest

    until_the_end.enter_context(alone(out))
    output_folder(out)
    claim_folder(out, work.settings, RESULTS)
    for folder in {task.folder for task in work.tasks}:
        output_folder(folder)
    unfinished = [number for number, task in enumerate(work.tasks) if not task.finished()]
    for folder in {work.tasks[number].folder for number in unfinished}:
        forget_manifest(folder)
    return unfinished


def extract(options: argparse.Namespace, work: Work, unfinished: list[int], ranks: Ranks) -> dict[str, str]:
    """Write this rank's share of the unfinished shards.

    Returns path -> reason of what all ranks together had to leave out. Raises UserError on all ranks if any does.
    """
    from data_tools.sharding.latent_shards import Stopped
    from data_tools.sharding.ranks import FrameCounter, share_of_cores

    for folder in {task.folder for task in work.tasks}:
        remove_leftovers(folder, own=True)  # of this machine, which may be another than that of rank 0
    total = sum(task.frames for task in work.tasks)
    before = total - sum(work.tasks[number].frames for number in unfinished)
    progress = Progress(total, before, shown=ranks.is_main)
    uncounted = FrameCounter(progress, ranks)
    if ranks.is_main and unfinished and len(unfinished) < ranks.size:
        few = f"{plural(len(unfinished), 'shard')} for {ranks.size} ranks: some have nothing to do"
        print(f"{few}; a smaller --shard_mb, in another --out, would give more", file=sys.stderr)
    mine = [work.tasks[number] for number in unfinished[ranks.rank :: ranks.size]]
    workers = options.decode_workers or share_of_cores(ranks)
    mistake: UserError | None = None
    try:
        work.writer.write(mine, workers, options.timeout, uncounted.add, uncounted.tell_and_ask)
    except Stopped:
        pass  # the rank that failed says why
    except (UserError, OSError) as error:
        mistake = cli.as_user_error(error)
        if mistake is None:
            raise
        ranks.fail()
    uncounted.tell_and_ask()
    results = ranks.gather(work.writer.skipped, uncounted.tell_and_ask)
    uncounted.tell_and_ask()  # by now all ranks have counted theirs
    progress.close()
    ranks.agree(mistake)
    if ranks.is_main and unfinished:
        print(
            f"{plural(progress.done - before, 'frame')} in {progress.seconds():.1f} s, {progress.rate():.1f} frames/s"
        )
    return {path: reason for result in results for path, reason in result.items()}


def write_manifests(out: Path, work: Work) -> list[str]:
    """Write the manifests of all splits; returns a line about each. Raises UserError when there is nothing at all."""
    from ardiff.data.shards import Moments, finished_shard
    from data_tools.sharding.tasks import finish_folder, longest_text

    lines, found = [], 0
    for split in SPLITS:
        tasks = [task for task in work.tasks if task.split == split]
        if not tasks:
            continue
        folder = tasks[0].folder
        remove_leftovers(folder, own=True)
        shards = [shard for task in tasks if (shard := finished_shard(folder, task.name))]
        details = {**work.details, **work.inputs.details[split], "split": split}
        if shards:
            details["mean"], details["std"] = Moments.merge(shard.statistics for shard in shards)
        if "text_dim" in details:
            details["text_tokens"] = longest_text(folder, shards)
        lines.append(finish_folder(folder, "latents", shards, work.inputs.classes, details))
        found += len(shards)
    if not found:
        raise UserError(f"--out {out}: none of the videos could be used; scan them again")
    return lines


def run(options: argparse.Namespace, ranks: Ranks, until_the_end: ExitStack) -> int:
    """The program on one rank. Raises UserError on all ranks together."""
    from data_tools.sharding.tasks import tell_skipped

    work: Work | None = None
    mistake: UserError | None = None
    try:
        work = prepare(options, ranks)
    except (UserError, OSError) as error:
        mistake = cli.as_user_error(error)
        if mistake is None:
            raise
    ranks.agree(mistake)
    assert work is not None
    ready = work
    unfinished = ranks.from_main(lambda: claim(options.out, ready, until_the_end))
    skipped = {**work.inputs.skipped, **extract(options, work, unfinished, ranks)}

    def finish() -> None:
        tell_skipped(skipped)
        for line in write_manifests(options.out, ready):
            print(line, flush=True)

    ranks.from_main(finish)  # which all wait for
    return cli.EXIT_FAILURE if skipped else cli.EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        die_with_launcher()
    options = _parse(arguments)
    from data_tools.sharding.ranks import RankGone, join, leave

    ranks = join()
    try:
        return _run_telling(options, ranks)
    except RankGone:
        print("another rank has ended without a word; the same command goes on", file=sys.stderr)
        return cli.EXIT_FAILURE
    finally:
        leave()


def _run_telling(options: argparse.Namespace, ranks: Ranks) -> int:
    """As `run`; but a launcher ends all processes when one fails, so nobody leaves before rank 0 has told why."""
    try:
        with ExitStack() as until_the_end:
            return run(options, ranks, until_the_end)
    except UserError as error:
        if ranks.size == 1:
            raise
        if ranks.is_main:
            cli.complain(UserError(str(error)))
        ranks.gather(None)
        raise EchoedError(str(error)) from error


if __name__ == "__main__":
    cli.run(main)
