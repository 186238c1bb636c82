"""Decode the videos of a corpus into shards of pictures, from which the AR-VAE is trained.

    python -m data_tools.shard_videos --corpus corpus.jsonl --out shards/ --size 256 --fps 8

The train split goes to --out, the others to --out/validation and --out/test, each with its manifest.json. Frames are
scaled to a shorter side of --size and cropped to the centre square. Which video belongs to which shard follows from
the corpus and the settings alone, so a run that was killed and started again gives the same bytes.

Exit code 0: all videos are in the shards; 1: some could not be used and were left out, or a shard is unfinished;
2: a mistake in the command.

What needs torch is imported late: the processes that decode import this module first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ardiff import cli
from ardiff.data.corpus import SPLITS, CorpusEntry, classes, read_corpus
from ardiff.errors import UserError
from ardiff.files import remove_leftovers, sha256
from data_tools.common import alone, claim_folder, output_folder, plural, require, split_folder
from data_tools.pool import default_workers
from data_tools.sharding.pictures import FORMATS, FrameSettings, picture_bytes
from data_tools.sharding.sampling import add_rate_arguments, as_text, class_numbers, common_fps, parse_rate, usable_at

QUALITY = 95
MAX_FRAMES = 100_000  # the names of a sample's pictures have five digits


def _parse(arguments: list[str] | None) -> Any:
    parser = cli.parser(
        "Decode the videos of a corpus into shards of pictures for the AR-VAE.",
        "python -m data_tools.shard_videos --corpus corpus.jsonl --out shards/ --size 256 --fps 8",
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="made by scan_videos")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels (default %(default)s)")
    add_rate_arguments(parser)
    parser.add_argument(
        "--format", choices=sorted(FORMATS), default="jpg", help="of the pictures (default %(default)s)"
    )
    parser.add_argument("--quality", type=int, help=f"of jpg and webp, 1 to 100 (default {QUALITY})")
    parser.add_argument("--shard_mb", type=float, default=64, help="about the size of a shard (default %(default)g)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds without a frame that end a video (default %(default)g)"
    )
    options = parser.parse_args(arguments)
    require("--size", options.size, 8, 4096)
    if options.quality is not None and options.format == "png":
        raise UserError(f"--quality {options.quality}: is for jpg and webp; png is lossless, so leave it out")
    options.quality = QUALITY if options.quality is None else options.quality
    require("--quality", options.quality, 1, 100)
    require("--shard_mb", options.shard_mb, 0.001, 1e6)
    for name in ("workers", "timeout"):
        require(f"--{name}", getattr(options, name), 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    options = _parse(arguments)
    settings = FrameSettings(options.size, parse_rate(options.stride, options.fps), options.format, options.quality)
    corpus = read_corpus(options.corpus)
    entries, skipped = usable_at(options.corpus, corpus, settings.rate, MAX_FRAMES)
    with alone(options.out):
        return _write(options, settings, corpus, entries, skipped)


def _write(
    options: Any,
    settings: FrameSettings,
    corpus: Sequence[CorpusEntry],
    entries: Sequence[CorpusEntry],
    skipped: dict[str, str],
) -> int:
    """Shard the chosen `entries`; `skipped` are paths of those left out so far, with reasons. Returns the exit code."""
    from ardiff.data.shards import finished_shard
    from data_tools.sharding.frame_shards import plan_tasks, run_tasks
    from data_tools.sharding.tasks import finish_folder, tell_skipped

    details = {**settings.as_json(), "corpus_sha256": sha256(options.corpus)}
    out = output_folder(options.out)
    derived = claim_folder(
        out,
        {**details, "shard_mb": options.shard_mb},
        results="**/*.tar",
        derive=lambda: {"picture_bytes": picture_bytes(entries, settings, options.workers, options.timeout)},
    )
    by_split = {split: [entry for entry in entries if entry.split == split] for split in SPLITS}
    tasks = {
        split: plan_tasks(
            output_folder(split_folder(out, split)),
            chosen,
            class_numbers(corpus),
            settings,
            derived["picture_bytes"],
            1e6 * options.shard_mb,
        )
        for split, chosen in by_split.items()
        if chosen
    }
    undecoded, unwritten = run_tasks([*chain(*tasks.values())], options.workers, options.timeout)
    tell_skipped({**skipped, **undecoded})
    if unwritten:
        for line in unwritten:
            print(f"not written {line}", file=sys.stderr)
        print(f"not written: {plural(len(unwritten), 'shard')}, so there is no manifest; run again", file=sys.stderr)
        return cli.EXIT_FAILURE
    for split, of_split in tasks.items():
        folder = of_split[0].folder
        remove_leftovers(folder, own=True)
        shards = [shard for task in of_split if (shard := finished_shard(folder, task.name))]
        fps = common_fps(by_split[split], settings.rate)
        more = {"split": split, "fps": as_text(fps) if fps else None}
        print(finish_folder(folder, "frames", shards, classes(corpus), {**details, **more}))
    return cli.EXIT_FAILURE if skipped or undecoded else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
