"""Find videos, decode each one strictly and list them in corpus.jsonl with what is wrong with the unusable ones.

    python -m data_tools.scan_videos videos/ --out corpus.jsonl

Folders are searched to any depth, links followed. In a folder with its videos in sub-folders the name of the
sub-folder is the label. The split follows from the content of the file, so copies of a video fall into the same one.

Started again, videos whose path and sha256 are already listed as ok (in --out, or beside it in the .partial
file of a run that was killed) are not decoded again and keep their caption; the rest is worked out anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ardiff import cli
from ardiff.data.corpus import OK, CorpusEntry, format_entry, parse_entry, read_corpus, write_corpus
from ardiff.errors import UserError
from ardiff.files import remove_leftovers, sha256
from ardiff.video import EXTENSIONS, VideoError, check
from data_tools.common import require
from data_tools.pool import default_workers, run_in_processes


def find_videos(inputs: Sequence[Path]) -> dict[str, str | None]:
    """Absolute path -> label of every video file below the inputs, sorted by path.

    Raises UserError for an input that does not exist or a folder that cannot be listed.
    """
    found: dict[str, str | None] = {}
    for given in inputs:
        root = Path(os.path.abspath(given))  # noqa: PTH100 (resolve() would replace links by their targets)
        if root.is_dir():
            for path in _walk(root):
                folders = path.relative_to(root).parts[:-1]
                found[str(path)] = folders[0] if folders else None
        elif root.exists():
            found.setdefault(str(root), None)
        else:
            raise UserError(f"{given}: no such file or folder")
    return dict(sorted(found.items(), key=lambda item: Path(item[0]).parts))


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                yield Path(folder, name)


def examine(item: tuple[str, CorpusEntry | None], report: Callable[[CorpusEntry], None]) -> None:
    """Check one video and report its entry, whose id, label and split are still to be filled in."""
    report(_examine(*item))


def _examine(path: str, known: CorpusEntry | None) -> CorpusEntry:
    try:
        digest = sha256(Path(path))
    except OSError as error:
        return CorpusEntry("0", path, f"cannot be read ({error.strerror})")
    if known is not None and known.sha256 == digest:
        return replace(known, id="0", label=None, split=None)
    try:
        info = check(Path(path))
    except VideoError as error:
        return CorpusEntry("0", path, error.reason, sha256=digest)
    return CorpusEntry(
        id="0",
        path=path,
        status=OK,
        codec=info.codec,
        width=info.width,
        height=info.height,
        fps=f"{info.fps.numerator}/{info.fps.denominator}",
        num_frames=info.num_frames,
        sha256=digest,
    )


def assign_splits(entries: list[CorpusEntry], fraction: float) -> list[CorpusEntry]:
    """Set the split of the ok entries by their sha256: about `fraction` of them become validation videos.

    With a fraction between 0 and 1 and at least two different videos neither split stays empty.
    """
    digests = sorted({entry.sha256 for entry in entries if entry.ok and entry.sha256})
    count = sum(int(digest[:16], 16) < fraction * 2**64 for digest in digests)
    if 0 < fraction < 1 and len(digests) >= 2:
        count = min(max(count, 1), len(digests) - 1)
    splits: dict[str | None, str] = dict.fromkeys(digests, "train")
    splits.update(dict.fromkeys(digests[:count], "validation"))
    return [replace(entry, split=splits[entry.sha256] if entry.ok else None) for entry in entries]


def scan(
    videos: dict[str, str | None], known: dict[str, CorpusEntry], journal: Path, workers: int, timeout: float
) -> list[CorpusEntry]:
    """Examine all videos (path -> label) in parallel, noting each result in `journal`; entries in their order."""
    paths = list(videos)
    results: dict[int, CorpusEntry] = {}
    items = [(path, known.get(path)) for path in paths]
    rejected = 0
    with journal.open("a", encoding="utf-8") as notes, tqdm(total=len(paths), unit="files", disable=None) as bar:
        for event in run_in_processes(examine, items, workers, timeout):
            if event.failure:
                results[event.item] = CorpusEntry("0", paths[event.item], f"decoding failed: {event.failure}")
            elif not event.done:
                results[event.item] = event.value
                if event.value.ok:
                    # The split is only a filler that makes the line well-formed: it is decided at the end.
                    print(format_entry(replace(event.value, split="train")), file=notes, flush=True)
            if event.done:
                rejected += not results[event.item].ok
                bar.set_postfix(rejected=rejected, refresh=False)
                bar.update()
    width = max(6, len(str(len(paths))))
    return [replace(results[number], id=f"{number:0{width}d}", label=videos[path]) for number, path in enumerate(paths)]


def earlier_results(out: Path, journal: Path) -> dict[str, CorpusEntry]:
    """Path -> ok entry of earlier runs. Raises UserError when `out` exists and is no corpus."""
    entries = read_corpus(out) if out.exists() else []
    if journal.exists():
        for line in journal.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entries.append(parse_entry(line))
            except ValueError:
                continue  # the half line of a killed run
    return {entry.path: entry for entry in entries if entry.ok}


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = cli.parser(
        "Find videos, decode each one strictly and list them in corpus.jsonl.",
        "python -m data_tools.scan_videos videos/ --out corpus.jsonl",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="folders or video files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the corpus.jsonl to write")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, help="share of validation videos (default %(default)s)"
    )
    parser.add_argument("--min_frames", type=int, default=2, help="reject shorter videos (default %(default)s)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one per core)")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds after which a file is given up (default %(default)g)"
    )
    options = parser.parse_args(arguments)
    require("--validation_fraction", options.validation_fraction, 0, 1)
    require("--min_frames", options.min_frames, 1)
    require("--workers", options.workers, 1)
    require("--timeout", options.timeout, 1)

    out: Path = options.out
    videos = find_videos(options.inputs)
    if not videos:
        names = ", ".join(map(str, options.inputs))
        raise UserError(f"{names}: no videos found; looked for {', '.join(sorted(EXTENSIONS))}")
    journal = _journal(out)
    entries = scan(videos, earlier_results(out, journal), journal, options.workers, options.timeout)
    entries = [_long_enough(entry, options.min_frames) for entry in entries]
    entries = assign_splits(entries, options.validation_fraction)
    write_corpus(out, entries)
    journal.unlink()
    return _summarize(out, entries)


def _long_enough(entry: CorpusEntry, min_frames: int) -> CorpusEntry:
    if not entry.ok or entry.num_frames >= min_frames:
        return entry
    return replace(entry, status=f"has {entry.num_frames} frames, fewer than --min_frames {min_frames}")


def _journal(out: Path) -> Path:
    """The file beside `out` for results so far. Raises UserError when nothing can be written there."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file in it, such as {out}/corpus.jsonl")
    journal = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        journal.touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    remove_leftovers(out.parent)
    return journal


def _summarize(out: Path, entries: Sequence[CorpusEntry]) -> int:
    """Print what was found; returns the exit code. Raises UserError when nothing is usable."""
    rejected = [entry for entry in entries if not entry.ok]
    for entry in rejected:
        print(f"rejected {entry.path}: {entry.status}", file=sys.stderr)
    usable = len(entries) - len(rejected)
    validation = sum(entry.split == "validation" for entry in entries)
    print(f"{out}: {usable} ok ({usable - validation} train, {validation} validation), {len(rejected)} rejected")
    if not usable:
        raise UserError(f"none of the {len(entries)} videos is usable")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
