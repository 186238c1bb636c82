"""List, verify, measure, repair, show and compare folders of shards.

    python -m data_tools.inspect_shards list latents/
    python -m data_tools.inspect_shards verify latents/
    python -m data_tools.inspect_shards stats latents/
    python -m data_tools.inspect_shards repair latents/ --out repaired/
    python -m data_tools.inspect_shards sheet latents/ --out sheet.png
    python -m data_tools.inspect_shards compare latents/ other/

DIR is a folder with manifest.json, or some of its tars as a brace or glob pattern. The data sets in its subfolders
validation and test are included. Nothing in DIR is ever changed.

Exit code 0: nothing found (equal, for compare); 1: something was found; 2: a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ardiff import cli
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from data_tools.common import plural, require
from data_tools.inspection.repair import RepairedPart, repair
from data_tools.inspection.shard_comparison import compare
from data_tools.inspection.shard_folders import Part, Problem, open_parts, printable, total
from data_tools.inspection.shard_listing import list_shards, read_descriptions, sample_row
from data_tools.inspection.shard_sheet import choose_shards, write_sheet
from data_tools.inspection.shard_statistics import statistics
from data_tools.inspection.verification import verify
from data_tools.pool import default_workers


def run_list(options: argparse.Namespace) -> int:
    """The shards of each data set, or with --samples what is in them."""
    parts = open_parts(options.dir)
    if options.samples:
        return _list_samples(parts, options.json)
    listings = [list_shards(part) for part in parts]
    if options.json:
        print(json.dumps([listing.as_json() for listing in listings], indent=1))
    else:
        for listing in listings:
            _print(listing.lines())
    return _exit_code(line.problems for listing in listings for line in listing.shards)


def _list_samples(parts: list[Part], as_json: bool) -> int:
    """A line per sample; with --json an object per line."""
    problems = []
    for part in parts:
        for entry in part.chosen:
            tar = part.folder / entry.file
            if not as_json:
                print(tar)
            try:
                for sample in read_descriptions(tar):
                    row = sample_row(sample, part.manifest.classes)
                    print(json.dumps({"shard": str(tar), **row}) if as_json else _row_of(row))
            except ShardError as error:
                problems.append(Problem.of(error))
            except OSError as error:
                problems.append(Problem(str(tar), f"cannot be read ({error.strerror})"))
    _print(map(str, problems), sys.stderr)
    return _exit_code([problems])


def _row_of(row: dict[str, Any]) -> str:
    words = [f"{row['frames']} frames", row["class"] or "no class", row["source"], row["caption"]]
    return printable(f"  {row['key']}  {'  '.join(str(word) for word in words if word)}")


def run_verify(options: argparse.Namespace) -> int:
    """One line per problem, then the totals."""
    result = verify(options.dir, options.fast, options.workers, options.timeout)
    counts = {"problems": len(result.problems), "shards": result.shards, "videos": result.videos}
    if options.json:
        print(json.dumps({**counts, "frames": result.frames, "found": [asdict(p) for p in result.problems]}, indent=1))
        return _exit_code([result.problems])
    _print(map(str, result.problems))
    looked_at = f"{plural(result.shards, 'shard')} in {plural(len(result.parts), 'data set')}"
    how = "files, sizes and indexes only" if options.fast else "every sample"
    sound = "" if options.fast else "sound "
    content = f"{plural(result.videos, sound + 'video')}, {plural(result.frames, 'frame')}"
    print(f"{plural(len(result.problems), 'problem')} in {looked_at} ({how}): {content}")
    return _exit_code([result.problems])


def run_stats(options: argparse.Namespace) -> int:
    """Numbers about each data set."""
    results = statistics(open_parts(options.dir), options.workers, options.timeout)
    if options.json:
        print(json.dumps([result.values for result in results], indent=1))
    else:
        for result in results:
            _print(result.lines())
    for result in results:
        _print((f"not counted: {problem}" for problem in result.problems), sys.stderr)
    return _exit_code(result.problems for result in results)


def run_repair(options: argparse.Namespace) -> int:
    """Each sample that is left out, then a line per data set."""
    results = repair(options.dir, options.out, options.keep_unchecked, options.copy, options.workers, options.timeout)
    for result in results:
        _print(f"left out {problem}" for problem in result.dropped)
        _print((f"not written {line}" for line in result.unwritten), sys.stderr)
        for tar in result.unchecked:
            print(f"{tar}: the descriptions (KEY.json) of what was kept carry no checksum of their own")
        print(_repaired(result))
    unwritten = sum(len(result.unwritten) for result in results)
    if unwritten:
        print(f"{plural(unwritten, 'shard')} not written; start the repair again", file=sys.stderr)
    return cli.EXIT_FAILURE if any(r.dropped or r.unwritten or not r.entries for r in results) else cli.EXIT_OK


def _repaired(result: RepairedPart) -> str:
    if result.unwritten or not result.entries:
        return f"{result.out}: no manifest, as {'shards are missing' if result.unwritten else 'no sample is left'}"
    changed = len(result.entries) - result.same
    lost = f"{plural(result.lost, 'video')} left out" if result.lost else "no video left out"
    return f"{result.out}: {total(result.entries)} ({changed} changed); {lost}"


def run_sheet(options: argparse.Namespace) -> int:
    """A PNG, and on stdout which video is in which row."""
    part = open_parts(options.dir)[0]
    shards = choose_shards(part, options.shard)
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: must be a .png file")
    sheet = write_sheet(options.out, part, shards, options.num_videos, options.arvae)
    _print(_row_of(row) for row in sheet.rows)
    _print((f"not shown: {problem}" for problem in sheet.problems), sys.stderr)
    print(f"{options.out}: {plural(len(sheet.rows), 'video')}, one per row in this order")
    return _exit_code([sheet.problems])


def run_compare(options: argparse.Namespace) -> int:
    """What differs, split by split."""
    differences, problems = compare(options.dir, options.other, options.workers, options.timeout)
    if options.json:
        found = {"equal": not problems and not any(d.found for d in differences)}
        print(json.dumps({**found, "splits": [vars(d) for d in differences]}, indent=1))
    else:
        for difference in differences:
            _print(difference.lines())
    _print((f"not compared: {problem}" for problem in problems), sys.stderr)
    return cli.EXIT_FAILURE if problems or any(difference.found for difference in differences) else cli.EXIT_OK


def _print(lines: Iterable[str], file: Any = None) -> None:
    for line in lines:
        print(line, file=file)


def _exit_code(problems: Iterable[list[Problem]]) -> int:
    return cli.EXIT_FAILURE if any(problems) else cli.EXIT_OK


def _parse(arguments: list[str] | None) -> Any:
    parser = cli.parser(
        "List, verify, measure, repair, show and compare folders of shards. Nothing in DIR is ever changed.",
        "python -m data_tools.inspect_shards verify latents/",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Any, name: str, text: str, reads: bool = True, json_too: bool = True) -> Any:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=function)
        added.add_argument("dir", metavar="DIR", help="a folder with manifest.json, or its tars as a pattern")
        if reads:
            added.add_argument(
                "--workers",
                type=int,
                default=default_workers(),
                help="processes (default: one per core; 0: only this one)",
            )
            added.add_argument(
                "--timeout", type=float, default=600, help="seconds after which a shard is given up (default 600)"
            )
        if json_too:
            added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    added = command(run_list, "list", "The shards with their sizes and states, and a summary.", reads=False)
    added.add_argument("--samples", action="store_true", help="list the samples instead (with --json one per line)")
    added = command(run_verify, "verify", "Check everything; one line per problem.")
    added.add_argument("--fast", action="store_true", help="only files, sizes and indexes, not the samples")
    command(run_stats, "stats", "Statistics of latents or pictures, lengths, classes and sources.")
    added = command(run_repair, "repair", "Write a new data set without what is damaged.", json_too=False)
    added.add_argument("--out", type=Path, required=True, metavar="NEWDIR", help="folder for the new data set")
    added.add_argument(
        "--keep_unchecked", action="store_true", help="keep samples that look right but for which no checksum is left"
    )
    added.add_argument("--copy", action="store_true", help="copy unchanged shards instead of making hard links")
    added = command(run_sheet, "sheet", "A contact sheet: a row per video.", reads=False, json_too=False)
    added.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    added.add_argument("--shard", metavar="NAME", help="videos of this shard only (default: of all)")
    added.add_argument("--arvae", type=Path, metavar="CHECKPOINT", help="decodes latents (default: the one in the manifest)")  # fmt: skip # noqa: E501
    added.add_argument("--num_videos", type=int, default=8, help="rows at most (default %(default)s)")
    added = command(run_compare, "compare", "What differs between two data sets.")
    added.add_argument("other", metavar="OTHER", help="the data set to compare with")
    options = parser.parse_args(arguments)
    for name, low in (("workers", 0), ("timeout", 1), ("num_videos", 1)):
        if hasattr(options, name):
            require(f"--{name}", getattr(options, name), low)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    options = _parse(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    cli.run(main)
