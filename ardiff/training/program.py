"""The frame of launch/train.py and launch/train_vae.py: command line, checks before anything starts, exit.json."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ardiff import cli
from ardiff.config import Config
from ardiff.errors import UserError
from ardiff.training import distributed, run_dir
from ardiff.training.engine import accumulation_steps, read_ds_config
from ardiff.training.job import Job
from ardiff.training.loop import Outcome, Trainer, train

log = logging.getLogger("ardiff")
BuildJob = Callable[[Config], Job]
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def arguments(description: str, example: str, default_config: str) -> argparse.ArgumentParser:
    """The command line of a training program."""
    parser = cli.parser(description, example, default_config)
    parser.add_argument("--run_dir", type=Path, required=True, help="where checkpoints and logs go")
    parser.add_argument("--ds_config", type=Path, help="DeepSpeed JSON (default: zero2.json on GPUs, zero2_cpu.json)")
    parser.add_argument(
        "--resume", choices=("auto", "none"), default="auto", help="auto: from the newest valid checkpoint of run_dir"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def main(parser: argparse.ArgumentParser, build_job: BuildJob, section: str) -> int:
    """Parse, check, train. A user's mistake ends in one line, exit code 2 and run_dir/exit.json.

    `section` of the configuration is what a run_dir is made for: another one there is refused.
    """
    options, _ = parser.parse_known_args()
    distributed.launcher_environment()
    try:
        outcome = _train(parser, build_job, section)
    except UserError as error:
        _record(options.run_dir, "user error: " + " ".join(str(error).split()), cli.EXIT_USER_ERROR, None)
        raise
    except Exception as error:
        _record(options.run_dir, f"{type(error).__name__}: {error}", cli.EXIT_FAILURE, None)
        raise
    finally:
        distributed.finish()
    _record(options.run_dir, outcome.reason, cli.EXIT_OK, outcome.step)
    return cli.EXIT_OK


def _train(parser: argparse.ArgumentParser, build_job: BuildJob, section: str) -> Outcome:
    options, config = cli.parse_with_config(parser)
    _configure_logging()
    # Everything that can be refused is refused before processes connect: no rank is left waiting for another.
    run_dir.check(options.run_dir, config, section, options.resume)
    default = DS_CONFIGS / ("zero2.json" if torch.cuda.is_available() else "zero2_cpu.json")
    ds_settings = read_ds_config(options.ds_config or default)
    accumulation_steps(config, int(os.environ["WORLD_SIZE"]))
    job = build_job(config)
    world = distributed.start(config.train.num_threads, config.train.collective_timeout_minutes)
    trainer = Trainer(job, options.run_dir, ds_settings, world)
    if world.is_main:
        _announce(job, trainer, options.run_dir)
    trainer.resume()  # may still refuse, so nothing is written before it
    if world.is_main:
        run_dir.describe(options.run_dir, config, trainer.engine.ds_config, world.size)
    return train(trainer)


def _announce(job: Job, trainer: Trainer, folder: Path) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.engine.objective.parameters())
    config, world = job.config, trainer.world
    log.info(
        "%s: %.1f M parameters, %d rank(s) on %s, global batch %d = %d ranks x %d x %d accumulation, %d steps",
        job.name,
        parameters / 1e6,
        world.size,
        world.device.type,
        config.train.global_batch_size,
        world.size,
        config.train.micro_batch_size,
        trainer.engine.accumulation,
        config.max_steps,
    )
    plan = trainer.plan
    short = f", {plan.num_short} videos are shorter than a clip and padded" if plan.num_short else ""
    log.info("data: %d videos, %d clips per epoch%s", len(job.shards), plan.visits_per_epoch, short)
    for note in job.notes:
        log.info("%s", note)
    log.info("configuration: %s", folder / "config.yaml")


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    main_rank = os.environ.get("RANK", "0") == "0"
    log.setLevel(logging.INFO if main_rank else logging.ERROR)
    log.handlers, log.propagate = [handler], False


def _record(folder: Path | None, reason: str, code: int, step: int | None) -> None:
    if folder is None or os.environ.get("RANK", "0") != "0":
        return
    if code == cli.EXIT_USER_ERROR and not run_dir.is_ours(folder):
        return  # the mistake is the folder itself: leave it as it is
    try:
        run_dir.write_exit(folder, reason, code, step)
    except OSError as error:
        log.error("cannot write %s (%s)", folder / "exit.json", error)
