"""See within minutes whether a cluster is fit to train on: every host, what connects them, and what the run needs.

    torchrun --nproc_per_node 8 launch/preflight.py --config ardiff_xl --data.shards /data/latents --run_dir runs/sky

Runs on every rank, under the same launchers as launch/train.py. Exit codes: 0 all is well, 1 a check failed, 2 a
mistake in the command.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.errors import UserError
from ardiff.files import check_writable, write_json
from ardiff.preflight import program
from ardiff.preflight.result import Result
from ardiff.preflight.table import lines_of
from launch import train, train_vae

EXAMPLE = (
    "torchrun --nproc_per_node 8 launch/preflight.py --config ardiff_xl --ds_config ds_configs/zero2.json "
    "--data.shards /data/latents --run_dir runs/sky --json preflight.json"
)
PROGRAMS = {"train": train, "train_vae": train_vae}
TIMEOUT = 60.0


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line: options and settings of the configuration. Raises UserError."""
    parser = cli.parser("Check hosts, network, data and configuration before a run.", EXAMPLE, "ardiff_xl")
    parser.add_argument("--ds_config", type=Path, help="DeepSpeed JSON (default: zero2.json on GPUs, zero2_cpu.json)")
    parser.add_argument("--run_dir", type=Path, help="where the run will keep its checkpoints; nothing is left there")
    parser.add_argument("--program", choices=PROGRAMS, default="train", help="what will be run (default: train)")
    parser.add_argument("--world_size", type=int, help="ranks of the run, if spare hosts are checked along")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well, by rank 0")
    parser.add_argument("--quick", action="store_true", help="measure for seconds instead of half a minute")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"that a rank has to come, and for each check; what takes longer has failed (default {TIMEOUT:g})",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options, overrides = cli.parse_with_overrides(parser)
    if not 1 <= options.timeout < math.inf:
        raise UserError(f"--timeout {options.timeout:g}: must be a number of seconds, at least 1")
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world_size {options.world_size}: must be at least 1")
    if options.json is not None and os.environ.get("RANK", "0") == "0":  # other hosts need not have that folder
        check_writable("--json", options.json)
    return options, overrides


def tell(result: Result, path: Path | None) -> int:
    """Print the report, and write it where it is asked for; returns the exit code."""
    cli.say("\n".join(lines_of(result)))
    code = cli.EXIT_OK if result.ok else cli.EXIT_FAILURE
    if path is None:
        return code
    try:
        write_json(path, result.as_json())
    except OSError as error:  # the other ranks wait for the exit code
        cli.complain(UserError(f"--json {path}: cannot be written ({error.strerror})"))
        return cli.EXIT_USER_ERROR if result.ok else code
    return code


def main() -> int:
    """The program."""
    options, overrides = parse()
    chosen = PROGRAMS[options.program]
    try:
        return program.run(
            options,
            overrides,
            chosen.build_job,
            chosen.NAME,
            chosen.FIXED,
            lambda result: tell(result, options.json),
        )
    except program.StoppedError as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return cli.EXIT_INTERRUPTED


if __name__ == "__main__":
    cli.run(main)
