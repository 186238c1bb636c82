"""Where the time of training goes on the machines at hand, and what it would be on more of them.

    deepspeed launch/profile_throughput.py --config ardiff_xl --ds_config ds_configs/zero2.json --out profiles/xl

The same file works under torchrun, launch/submit.py and plain python. It trains with what launch/train.py trains with,
on random latents unless --data.shards names real ones, and leaves profile.txt, profile.json and profile.png in --out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.config import Config, to_yaml
from ardiff.errors import UserError
from ardiff.files import write_json, write_text
from ardiff.launching.orphans import stop_with_launcher
from ardiff.profiling import comparing, plots, report
from ardiff.profiling.program import Plan, run
from ardiff.profiling.scaling import gpus
from ardiff.training import distributed
from ardiff.training.engine import accumulation_steps, read_ds_config
from ardiff.training.program import default_ds_config
from launch.train import build_job

CHECKPOINTING = {"both": (False, True), "on": (True,), "off": (False,)}


def main() -> int:
    """The program."""
    parser = _parser()
    options, _ = parser.parse_known_args()
    if options.compare:
        return _compare(options)
    distributed.launcher_environment()
    stop_with_launcher()
    prepared: tuple[Config, dict[str, Any], Plan] | None = None
    mistake: UserError | None = None
    try:
        prepared = _prepare(parser)
    except (UserError, OSError) as error:
        mistake = cli.as_user_error(error)
        if mistake is None or os.environ["WORLD_SIZE"] == "1":
            raise
    train = prepared[0].train if prepared else Config().train
    try:
        world = distributed.start(train.num_threads, train.collective_timeout_minutes)
        world.agree(mistake)
        assert prepared is not None
        config, ds_settings, plan = prepared
        world.require_equal({"the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]})
        say = _progress() if world.is_main else lambda _: None
        profile = run(build_job, config, ds_settings, world, options.out, plan, say)
        if world.is_main:
            _write(profile, options.out)
        world.barrier()
    finally:
        distributed.finish()
    return cli.EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "Profile training: speed, MFU, a step by part, memory, kernels, sweep, scaling.",
        "deepspeed launch/profile_throughput.py --config ardiff_xl --ds_config ds_configs/zero2.json --out profiles/xl",
        "ardiff_xl",
    )
    add = parser.add_argument
    add("--ds_config", type=Path, help="DeepSpeed JSON (default: zero2.json on GPUs, zero2_cpu.json)")
    add("--out", type=Path, help="folder for profile.txt, profile.json and profile.png")
    add("--steps", type=int, default=20, help="optimizer steps that are measured (default 20), and as many with marks")
    add("--warmup", type=int, default=5, help="steps before that (default 5)")
    add(
        "--micro_batches",
        default="auto",
        metavar="LIST",
        help="sizes to sweep, as 4,8,16; auto: around train.micro_batch_size; none: no sweep (default auto)",
    )
    add(
        "--checkpointing",
        choices=("both", "on", "off", "configured"),
        default="both",
        help="activation checkpointing in the sweep (default both)",
    )
    add("--trace", action="store_true", help="write a trace for Perfetto or TensorBoard to OUT/trace")
    add("--gpus", default="8..512", metavar="RANGE", help="scaling model: 8..512 (doubling) or a list (default 8..512)")
    add("--gpus_per_node", type=int, help="in the scaling model (default: as here on several hosts, 8 on one)")
    add("--node_gb_per_s", type=float, help="bus bandwidth across nodes, GB/s (default: measured, or 90 assumed)")
    add("--peak_tflops", type=float, help="peak of a device, where none is known or another base is wanted")
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="profile nothing: check the scaling model with profiles of the same training on several numbers of ranks",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _prepare(parser: argparse.ArgumentParser) -> tuple[Config, dict[str, Any], Plan]:
    """Everything that can be refused before processes connect."""
    options, config = cli.parse_with_config(parser)
    if options.out is None:
        raise UserError("missing --out (folder for profile.txt, profile.json and profile.png); see --help")
    for name, least in (("steps", 1), ("warmup", 0), ("gpus_per_node", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    for name in ("node_gb_per_s", "peak_tflops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be above 0")
    ds_settings = read_ds_config(options.ds_config or default_ds_config())
    accumulation_steps(config, int(os.environ["WORLD_SIZE"]))
    options.out.mkdir(parents=True, exist_ok=True)
    configured = (config.model.activation_checkpointing,)
    plan = Plan(
        steps=options.steps,
        warmup=options.warmup,
        sizes=_sizes(options.micro_batches),
        checkpointing=CHECKPOINTING.get(options.checkpointing, configured),
        trace=options.trace,
        gpus=_numbers("gpus", options.gpus, gpus, "8..512 or 8,24,96"),
        ranks_per_node=options.gpus_per_node,
        node_gb_per_s=options.node_gb_per_s,
        peak_tflops=options.peak_tflops,
    )
    return config, ds_settings, plan


def _sizes(text: str) -> list[int] | None:
    if text in ("auto", "none"):
        return None if text == "auto" else []
    return sorted(_numbers("micro_batches", text, lambda part: [int(word) for word in part.split(",")], "4,8,16"))


def _numbers(name: str, text: str, parse: Callable[[str], list[int]], example: str) -> tuple[int, ...]:
    try:
        found = parse(text)
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--{name} {text}: must be whole numbers above 0, as in {example}")
    return tuple(sorted(set(found)))


def _progress() -> Callable[[str], None]:
    """Lines to where standard output leads now: the lines of metrics that training prints are sent elsewhere."""
    stream = sys.stdout

    def say(line: str) -> None:
        print(line, file=stream, flush=True)

    return say


def _write(profile: dict[str, Any], out: Path) -> None:
    words = report.text(profile)
    write_json(out / comparing.PROFILE, profile)
    write_text(out / "profile.txt", words)
    plots.picture(profile).save(out / "profile.png")
    cli.say(f"\n{words}\nwritten: {out / 'profile.txt'}, {comparing.PROFILE}, profile.png")


def _compare(options: argparse.Namespace) -> int:
    checks = comparing.compare([comparing.read(folder) for folder in options.compare])
    if not checks:
        raise UserError("--compare: give profiles of different numbers of ranks")
    cli.say(report.comparison(checks))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "scaling.json", [check.as_json() for check in checks])
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
