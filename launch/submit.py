"""Start a training program on several ranks, pass signals on to them, and start it again after failures.

    python launch/submit.py --launcher torchrun --ranks 8 --max_restarts 5 -- launch/train.py --run_dir runs/sky ...

Exit codes are those of the rank programs: 0 done or stopped by a signal, 1 failure, 2 a mistake in the command, 3 a
rank that hangs, 130 interrupted at once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching.command import LAUNCHERS, Launch, split
from ardiff.launching.orphans import PATIENCE
from ardiff.launching.supervisor import supervise

EXAMPLE = "python launch/submit.py --launcher torchrun --ranks 8 --max_restarts 5 -- launch/train.py --run_dir runs/sky"


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Start a training program on several ranks of this machine; the program and its options come behind --.",
        EXAMPLE,
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun", help="default: torchrun")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one for every GPU (default 1)")
    parser.add_argument(
        "--max_restarts", type=int, default=0, help="start again so often after failures and hangs (default 0)"
    )
    parser.add_argument(
        "--stop_minutes",
        type=float,
        default=PATIENCE / 60,
        help=f"time for the last step and checkpoint after a signal, before all is killed (default {PATIENCE / 60:g})",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the command that would be run, and do nothing")
    own, command = split(sys.argv[1:])
    if not command and not {"-h", "--help"} & set(own):
        raise UserError(f"nothing to start: put the program behind --, as in {EXAMPLE}")
    options = parser.parse_args(own)
    if options.max_restarts < 0:
        raise UserError(f"--max_restarts {options.max_restarts}: must be at least 0")
    if not options.stop_minutes > 0:
        raise UserError(f"--stop_minutes {options.stop_minutes:g}: must be greater than 0")
    launch = Launch(options.launcher, options.ranks, tuple(command))
    folder = launch.run_dir
    if options.dry_run:
        print(launch.describe())
        return cli.EXIT_OK
    _tell(f"{options.ranks} rank(s) with {options.launcher}, run_dir {folder}")
    return supervise(launch, options.max_restarts, 60 * options.stop_minutes, _tell)


def _tell(line: str) -> None:
    cli.say(f"{time.strftime('%H:%M:%S')} submit: {line}")


if __name__ == "__main__":
    cli.run(main)
