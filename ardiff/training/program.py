"""The frame of launch/train.py and launch/train_vae.py: command line, checks before anything starts, exit.json."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ardiff import cli
from ardiff.config import Config, TrainConfig, to_yaml
from ardiff.errors import EchoedError, UserError
from ardiff.files import remove_leftovers
from ardiff.launching.orphans import stop_with_launcher
from ardiff.training import distributed, run_dir
from ardiff.training.engine import accumulation_steps, read_ds_config
from ardiff.training.job import Job
from ardiff.training.loop import FINISHED, Outcome, train
from ardiff.training.rank_log import open_rank_log
from ardiff.training.stop import StopSignal
from ardiff.training.trainer import Trainer
from ardiff.training.watchdog import Watchdog

log = logging.getLogger("ardiff")
BuildJob = Callable[[Config], Job]
_run_dir_is_ours = False  # from when rank 0 has locked it
_trainer: Trainer | None = None  # once it is built
_PEER_GONE = ("closed by peer", "reset by peer", "Read error", "Broken pipe")  # in gloo's and NCCL's words
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def default_ds_config() -> Path:
    """The ds_config of a run that names none."""
    return DS_CONFIGS / ("zero2.json" if torch.cuda.is_available() else "zero2_cpu.json")


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


def main(parser: argparse.ArgumentParser, build_job: BuildJob, name: str, fixed: tuple[str, ...]) -> int:
    """Parse, check, train. A user's mistake ends in one line, exit code 2 and run_dir/exit.json.

    name: what is trained, as in `Job.name`. fixed: sections and settings of the configuration that a run_dir is made
    for; with others it is refused.
    """
    stop = StopSignal()
    options, _ = parser.parse_known_args()
    distributed.launcher_environment()
    stop_with_launcher()
    try:
        outcome = _train(parser, build_job, name, fixed, stop)
        _record(options.run_dir, outcome.reason, cli.EXIT_OK, outcome.step)
    except BaseException as error:
        _record_failure(options.run_dir, error)
        raise
    finally:
        distributed.finish()
        stop.release()
    if outcome.reason == FINISHED:
        log.info("finished at step %d; a larger --train.max_steps would go on", outcome.step)
    else:
        log.info("stopped by %s at step %d; the same command goes on", outcome.reason, outcome.step)
    return cli.EXIT_OK


def _train(
    parser: argparse.ArgumentParser, build_job: BuildJob, name: str, fixed: tuple[str, ...], stop: StopSignal
) -> Outcome:
    _configure_logging()
    prepared: tuple[Path, Config, dict[str, Any], Job] | None = None
    mistake: UserError | None = None
    try:
        prepared = _prepare(parser, build_job, name, fixed)
    except (UserError, OSError) as error:
        mistake = cli.as_user_error(error)
        if mistake is None or os.environ["WORLD_SIZE"] == "1":
            raise
    # A mistake may concern one rank only, such as shards that its node lacks: the ranks meet and agree first.
    train_config = prepared[1].train if prepared else TrainConfig()
    world = distributed.start(train_config.num_threads, train_config.collective_timeout_minutes)
    world.agree(mistake)
    assert prepared is not None
    folder, config, ds_settings, job = prepared
    world.require_equal(
        {
            "data": f"{job.data.identity[:16]} ({len(job.data)} videos, {job.data.visits_per_epoch} clips)",
            "data.order": job.data.order,
            "held-out data": "none" if job.validate is None else job.validate.identity[:16],
            "the latent space": "none" if job.latent_space is None else job.latent_space.arvae_id,
            "the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
        }
    )
    world.from_main(lambda: run_dir.lock(folder))
    global _run_dir_is_ours
    _run_dir_is_ours = True
    stop.listen(config.train.time_limit_minutes)
    if world.is_main:
        remove_leftovers(folder, own=True)
        run_dir.write_exit(folder, run_dir.RUNNING, None, None)  # whatever the start before left
    open_rank_log(folder, world.rank, world.size)
    with Watchdog(folder, world.rank, world.size, config.train.hang_limit) as watchdog:
        watchdog.enter("building the model", 0)
        global _trainer
        _trainer = trainer = Trainer(job, folder, ds_settings, world, watchdog, stop)
        if world.is_main:
            _announce(job, trainer, folder)
        trainer.resume()  # may still refuse, so nothing of the run is written before it
        if world.is_main:
            run_dir.describe(folder, config, job.name, trainer.engine.ds_config, world.size)
            run_dir.write_exit(folder, run_dir.RUNNING, None, trainer.step)
        outcome = train(trainer)
        world.barrier()  # a rank that has gone cuts the connections of one that is still being told
        return outcome


def _prepare(
    parser: argparse.ArgumentParser, build_job: BuildJob, name: str, fixed: tuple[str, ...]
) -> tuple[Path, Config, dict[str, Any], Job]:
    """Everything that can be refused before processes connect."""
    options, config = cli.parse_with_config(parser)
    run_dir.check(options.run_dir, config, name, fixed, options.resume)
    ds_settings = read_ds_config(options.ds_config or default_ds_config())
    world_size = int(os.environ["WORLD_SIZE"])
    accumulation_steps(config, world_size)
    job = build_job(config)
    job.check(world_size)
    return options.run_dir, config, ds_settings, job


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
    for feed in job.every_feed():
        data = feed.data
        short = f", {data.num_short} videos are shorter than a clip and padded" if data.num_short else ""
        clips = "clips" if feed.counts_as == 1 else f"clips of {feed.counts_as} frames"
        log.info(
            "data: %d videos, %d %s per epoch%s, order %s", len(data), data.visits_per_epoch, clips, short, data.order
        )
    for note in job.notes:
        log.info("%s", note)
    log.info("configuration: %s", folder / "config.yaml")


def _configure_logging() -> None:
    logging.raiseExceptions = False  # a terminal that was closed must not litter what goes on without it
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    main_rank = os.environ.get("RANK", "0") == "0"
    log.setLevel(logging.INFO if main_rank else logging.ERROR)
    log.handlers, log.propagate = [handler], False


def _record_failure(folder: Path, error: BaseException) -> None:
    """exit.json of a run that did not end well. The first rank to fail says why, the others follow from it."""
    mistake, rank = cli.as_user_error(error), os.environ.get("RANK", "0")
    if isinstance(mistake, EchoedError) or (not _run_dir_is_ours and run_dir.in_use(folder)):
        return  # rank 0 tells it; or a live run is there, whose record is not ours to write
    step = None if _trainer is None else _trainer.step
    if mistake is not None:
        _record(folder, "user error: " + " ".join(str(mistake).split()), cli.EXIT_USER_ERROR, step, any_rank=True)
        return
    if isinstance(error, KeyboardInterrupt):
        _record(folder, "interrupted", cli.EXIT_INTERRUPTED, step)
        return
    ended = run_dir.read_exit(folder) if _run_dir_is_ours else None
    told = ended is not None and ended.get("reason") != run_dir.RUNNING
    if told and (ended["code"] in (cli.EXIT_HUNG, cli.EXIT_USER_ERROR) or rank != "0"):  # type: ignore[index]
        return  # the cause of this error
    reason = f"{type(error).__name__}: {error}"
    if any(words in reason for words in _PEER_GONE):
        if told:
            return
        reason = f"rank {rank} lost another rank, which has ended (killed, or out of memory?): the launcher says which"
    _record(folder, reason, cli.EXIT_FAILURE, step, any_rank=True)


def _record(folder: Path, reason: str, code: int, step: int | None, any_rank: bool = False) -> None:
    if os.environ.get("RANK", "0") != "0" and not any_rank:
        return
    if code == cli.EXIT_USER_ERROR and not run_dir.is_ours(folder):
        return  # the mistake is the folder itself: leave it as it is
    try:
        run_dir.write_exit(folder, reason, code, step)
    except OSError as error:
        log.error("cannot write %s (%s)", folder / "exit.json", error)
        with contextlib.suppress(OSError):
            (folder / "exit.json").unlink()  # of an earlier end: none is better than a wrong one
