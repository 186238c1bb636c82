"""Find videos, decode each one strictly, cut it into scenes, and list all in corpus.jsonl with what is wrong with some.

    python -m data_tools.scan_videos videos/ --out corpus.jsonl

INPUT is a folder, a video file, a folder of pictures (the frames of one video), or a list (.csv, .jsonl, .txt). Folders
are searched to any depth, links followed. In a folder with its videos in sub-folders the name of the sub-folder is the
label.

What is found out about each file is kept in corpus.jsonl.results: started again, also after a kill, the program decodes
only files that are new or have changed, or all of them with other settings for scenes. Captions that were written into
the corpus stay.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ardiff import cli
from ardiff.data.corpus import OK, SPLITS, CorpusEntry, format_entry, read_corpus, write_corpus
from ardiff.errors import UserError
from ardiff.files import remove_leftovers
from ardiff.video import EXTENSIONS, FOLDER_FPS
from data_tools.common import alone, plural, require
from data_tools.pool import default_workers, run_in_processes
from data_tools.scanning.corpus_entries import DUPLICATES, EntryRules, keep_captions, make_entries
from data_tools.scanning.inputs import Source, find_sources
from data_tools.scanning.lists import ClassList, read_classes
from data_tools.scanning.scan_results import Result, ResultsFile, Task, examine
from data_tools.scanning.scenes import DETECTORS, THRESHOLDS, SceneSettings

# Slow to import, and needed in every process: the second half by what this program imports, as Python imports the
# program again in each of them.
PRELOAD = (
    "cv2",
    "scenedetect.detectors",
    "imagehash",
    "scipy.fftpack",
    "ardiff.cli",
    "data_tools.scanning.corpus_entries",
)


def scan(
    sources: Sequence[Source], kept: ResultsFile, settings: SceneSettings, workers: int, timeout: float
) -> list[Result]:
    """Examine all videos in parallel, noting each result in `kept`; the results in the order of the sources."""
    results = {number: Result(source.path, "missing") for number, source in enumerate(sources) if source.missing}
    numbers = [number for number in range(len(sources)) if number not in results]
    tasks = []
    for number in numbers:
        known = kept.known.get(sources[number].path)
        tasks.append(Task(sources[number].path, settings, None if known is None else known.sha256))
    rejected = len(results)
    # On a terminal a bar from the start; in the log of a batch job a line now and then.
    every, delay = (0.1, 0.0) if sys.stderr.isatty() else (30.0, 30.0)
    with tqdm(total=len(sources), initial=rejected, unit="files", mininterval=every, delay=delay) as bar:
        for event in run_in_processes(examine, tasks, workers, timeout, preload=PRELOAD):
            number, path = numbers[event.item], tasks[event.item].path
            if event.failure:
                results[number] = Result(path, f"decoding failed: {event.failure}")
            elif not event.done and event.value is None:
                results[number] = kept.known[path]
            elif not event.done:
                results[number] = event.value
                if event.value.sha256 is not None:
                    kept.add(event.value)
            if event.done:
                rejected += results[number].status != OK
                bar.set_postfix(rejected=rejected, refresh=False)
                bar.update()
    return [results[number] for number in range(len(sources))]


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    options = _parse(arguments)
    out: Path = options.out
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file in it, such as {out}/corpus.jsonl")
    class_list = read_classes(options.labels) if options.labels else None
    sources = find_sources(options.inputs, options.root, class_list)
    if not sources:
        names = ", ".join(map(str, options.inputs))
        looked_for = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"{names}: no videos found; looked for {looked_for}, and folders of PNG or JPEG pictures")
    rules = _rules(options, class_list, sources)
    settings = _scene_settings(options)
    with alone(out, out.with_name(f".{out.name}.lock")):
        return _scan_into(out, sources, settings, rules, options)


def _scan_into(out: Path, sources: Sequence[Source], settings: SceneSettings, rules: EntryRules, options: Any) -> int:
    """Write the corpus and the results; returns the exit code."""
    earlier = read_corpus(out) if out.exists() else []
    kept = ResultsFile(out.with_name(out.name + ".results"), settings)
    remove_leftovers(out.parent, own=True)
    results = scan(sources, kept, settings, options.workers, options.timeout)
    entries, lost = keep_captions(make_entries(sources, results, rules), earlier)
    if lost:
        previous = _keep_previous(out, earlier)
        what = "1 caption belongs to a scene that is" if lost == 1 else f"{lost} captions belong to scenes that are"
        print(f"{what} not in the corpus any more; see {previous}", file=sys.stderr)
    if not any(entry.ok for entry in entries) and any(entry.ok for entry in earlier):
        _print_rejected(entries)
        raise UserError(f"{_none_usable(entries)}; {out} is left as it was")
    write_corpus(out, entries)
    kept.finish(result for result in results if result.sha256 is not None)
    return _summarize(out, entries)


def _keep_previous(out: Path, earlier: Sequence[CorpusEntry]) -> Path:
    """Write the corpus as it was beside `out`, under a name that no other one has; returns it."""
    content = "".join(format_entry(entry) + "\n" for entry in earlier).encode()
    number, previous = 0, out.with_name(out.name + ".previous")
    # One with the same content is from a run that was killed after it had written that.
    while os.path.lexists(previous) and not (previous.is_file() and previous.read_bytes() == content):
        number += 1
        previous = out.with_name(f"{out.name}.previous.{number}")
    write_corpus(previous, earlier)
    return previous


def _parse(arguments: list[str] | None) -> Any:
    parser = cli.parser(
        "Find videos, decode each one strictly, split it into scenes, and list all in corpus.jsonl.",
        "python -m data_tools.scan_videos videos/ --out corpus.jsonl",
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="folders, videos, frame folders, lists (csv, jsonl, txt)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the corpus.jsonl to write")
    parser.add_argument("--root", type=Path, metavar="DIR", help="for relative paths in lists (default: list's folder)")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="all classes with their numbers, such as UCF-101's classInd.txt"
    )
    parser.add_argument("--split", choices=SPLITS, help="put all videos here, except where a list says otherwise")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, help="share of validation videos (default %(default)s)"
    )
    parser.add_argument("--test_fraction", type=float, default=0.0, help="share of test videos (default %(default)s)")
    parser.add_argument(
        "--group", metavar="REGEX", help="videos whose paths match with equal text (of group 1) share a split"
    )
    parser.add_argument("--min_frames", type=int, default=2, help="reject shorter videos (default %(default)s)")
    parser.add_argument(
        "--scenes", choices=DETECTORS, default="adaptive", help="how cuts are found (default %(default)s)"
    )
    parser.add_argument(
        "--scene_threshold",
        type=float,
        help="a cut changes more; adaptive: times the changes around it (default {adaptive:g}), content: mean change, "
        "0 to 255 (default {content:g})".format(**THRESHOLDS),
    )
    parser.add_argument(
        "--scene_min_change", type=float, default=15, help="adaptive: least mean change of a cut (default %(default)g)"
    )
    parser.add_argument(
        "--black_below",
        type=float,
        default=8,
        help="mean brightness of black frames, cut out; 0: off (default %(default)g)",
    )
    parser.add_argument(
        "--min_scene_frames", type=int, default=16, help="reject shorter scenes of a cut video (default %(default)s)"
    )
    parser.add_argument("--fps", default=str(FOLDER_FPS), help="frame rate of frame folders (default %(default)s)")
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default="flag",
        help="what to do with near-identical ones (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds after which a file is given up (default %(default)g)"
    )
    options = parser.parse_args(arguments)
    for name in ("validation_fraction", "test_fraction"):
        require(f"--{name}", getattr(options, name), 0, 1)
    for name in ("min_frames", "min_scene_frames", "workers", "timeout"):
        require(f"--{name}", getattr(options, name), 1)
    require("--scene_min_change", options.scene_min_change, 0, 255)
    require("--black_below", options.black_below, 0, 255)
    if options.validation_fraction + options.test_fraction > 1:
        raise UserError("--validation_fraction and --test_fraction: must not be more than 1 together")
    return options


def _rules(options: Any, class_list: ClassList | None, sources: Sequence[Source]) -> EntryRules:
    """The options that decide how results become entries. Raises UserError for those that make no sense."""
    try:
        fps = Fraction(options.fps).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if fps <= 0:
        raise UserError(f"--fps {options.fps}: must be a positive number, such as 25 or 30000/1001")
    group = None
    if options.group is not None:
        try:
            group = re.compile(options.group)
        except re.error as error:
            raise UserError(f"--group {options.group}: is not a regular expression ({error})") from error
        if not any(group.search(source.path) for source in sources):
            raise UserError(f"--group {options.group}: matches none of the paths; the first is {sources[0].path}")
    return EntryRules(
        min_frames=options.min_frames,
        min_scene_frames=options.min_scene_frames,
        black_below=options.black_below,
        folder_fps=fps,
        duplicates=options.duplicates,
        class_index={} if class_list is None else class_list.index,
        group=group,
        split=options.split,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
    )


def _scene_settings(options: Any) -> SceneSettings:
    if options.scenes == "none":
        return SceneSettings("none", 0, 0, 0)
    threshold = options.scene_threshold
    if threshold is None:
        threshold = THRESHOLDS[options.scenes]
    require("--scene_threshold", threshold, 1 if options.scenes == "adaptive" else 0, 255)
    min_change = options.scene_min_change if options.scenes == "adaptive" else 0
    return SceneSettings(options.scenes, float(threshold), float(min_change), float(options.black_below))


def _summarize(out: Path, entries: Sequence[CorpusEntry]) -> int:
    """Print what was found; returns the exit code. Raises UserError when nothing is usable."""
    usable = [entry for entry in entries if entry.ok]
    _print_rejected(entries)
    splits = Counter(entry.split for entry in usable)
    parts = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split] or split != "test")
    videos = len({entry.path for entry in usable})
    from_videos = f" from {plural(videos, 'video')}" if videos != len(usable) else ""
    print(f"{out}: {len(usable)} ok{from_videos} ({parts}), {len(entries) - len(usable)} rejected")
    split_of = {entry.id: entry.split for entry in entries}
    duplicates = [entry for entry in usable if entry.duplicate_of is not None]
    if duplicates:
        print(f"{len(duplicates)} of them {_are(duplicates)} nearly identical to others: see duplicate_of")
    apart = [entry for entry in duplicates if split_of.get(entry.duplicate_of or "") not in (None, entry.split)]
    if apart:
        where = "in another split than their originals, as --split or a list says"
        print(f"{len(apart)} of these {_are(apart)} {where}", file=sys.stderr)
    if not usable:
        raise UserError(_none_usable(entries))
    return cli.EXIT_OK


def _are(entries: Sequence[CorpusEntry]) -> str:
    return "is" if len(entries) == 1 else "are"


def _none_usable(entries: Sequence[CorpusEntry]) -> str:
    return "the only video is not usable" if len(entries) == 1 else f"none of the {len(entries)} videos is usable"


def _print_rejected(entries: Sequence[CorpusEntry]) -> None:
    for entry in entries:
        if not entry.ok:
            end = entry.first_frame + entry.num_frames - 1
            where = f", frames {entry.first_frame} to {end}" if entry.num_frames else ""
            print(f"rejected {entry.path}{where}: {entry.status}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
