"""Disturb training in every way there is, start it again, and compare it with the undisturbed run, bit for bit.

    python -m tests.end_to_end.faults [--list] [--only NAME ...] [--rounds N] [--seed S] [--out DIR] [--jobs N]

Ends with 1 when anything deviates; the folders of scenarios that failed are kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.faults import disk
from tests.end_to_end.faults.bench import Bench, DeviationError, NotPossibleError, Tally
from tests.end_to_end.faults.scenarios import SCENARIOS

HEADER = ("scenario", "rounds", "in a write", "starts", "seconds", "result")
WIDTHS = (24, 6, 10, 6, 7)


@dataclass
class Row:
    """What came of a scenario."""

    name: str
    tally: Tally
    seconds: float
    result: str
    failed: bool = False

    def __str__(self) -> str:
        hits = "-" if self.tally.hits is None else str(self.tally.hits)
        cells = (self.name, str(self.tally.rounds), hits, str(self.tally.starts), f"{self.seconds:.0f}")
        return _line((*cells, self.result))


def _line(cells: Sequence[str]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells[:-1], WIDTHS, strict=True))
    )
    return "  ".join([first, *rest, cells[-1]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen scenarios and print the table."""
    options = _options(arguments)
    if options.list:
        for name, (function, rounds) in SCENARIOS.items():
            about = (getattr(function, "func", function).__doc__ or "").splitlines()[0]
            print(f"{name:24} {rounds:3} rounds  {about}")
        return 0
    folder = options.out or Path(tempfile.mkdtemp(prefix="faults-"))
    if not disk.can_mount(folder / "mount"):
        _again_as_root_of_a_namespace()
    begin = time.monotonic()
    bench = Bench(folder.absolute(), options.seed)
    print(f"seed {options.seed}, {folder}\n{_line(HEADER)}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: _run(bench, name, options.rounds), options.only or SCENARIOS))
    failed = [row for row in rows if row.failed]
    _print_summary(rows, time.monotonic() - begin)
    if failed:
        print(f"kept: {', '.join(str(folder / row.name) for row in failed)}")
    elif options.out is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the scenarios, and nothing else")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="NAME", help="these scenarios")
    parser.add_argument("--rounds", type=int, help="of each scenario, instead of its own number")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="folder of all runs, which is kept (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at a time")
    return parser.parse_args(arguments)


def _again_as_root_of_a_namespace() -> None:
    """Where mounting is forbidden, a user namespace may allow it: be this program again inside one, if that works."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.environ.get("FAULTS_INSIDE") or shutil.which("unshare") is None:
        return
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0:
        os.environ["FAULTS_INSIDE"] = "1"
        os.execvp(inside[0], [*inside, sys.executable, "-m", "tests.end_to_end.faults", *sys.argv[1:]])


def _run(bench: Bench, name: str, rounds: int | None) -> Row:
    function, usual = SCENARIOS[name]
    begin = time.monotonic()
    tally, failed = Tally(), False
    try:
        function(bench, tally, rounds or usual)
        result = "; ".join(["ok", *tally.notes])
    except NotPossibleError as reason:
        result = f"skipped: {reason}"
    except DeviationError as deviation:
        result, failed = f"FAILED: {deviation}", True
    except Exception:
        result, failed = f"FAILED: {traceback.format_exc()}", True
    tally.starts = len(list((bench.folder / name).glob("*/start_*.log")))
    if not failed:
        shutil.rmtree(bench.folder / name, ignore_errors=True)
    row = Row(name, tally, time.monotonic() - begin, result, failed)
    print(row, flush=True)
    return row


def _print_summary(rows: list[Row], seconds: float) -> None:
    rounds, starts = (sum(getattr(row.tally, key) for row in rows) for key in ("rounds", "starts"))
    counted = [row.tally for row in rows if row.tally.hits is not None]
    hits, of = sum(tally.hits or 0 for tally in counted), sum(tally.rounds for tally in counted)
    failed, skipped = sum(row.failed for row in rows), sum(row.result.startswith("skipped") for row in rows)
    print(
        f"{len(rows)} scenarios, {rounds} faults ({hits} of {of} kills and full disks in the middle of writing a "
        f"checkpoint), {starts} starts, {seconds:.0f} s: {failed} failed, {skipped} skipped"
    )


if __name__ == "__main__":
    sys.exit(main())
