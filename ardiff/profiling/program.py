"""The whole of a profile: train and measure, look into it, sweep, model. The result is one JSON object."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ardiff.config import Config
from ardiff.data.urls import split_credentials
from ardiff.errors import UserError
from ardiff.monitor.estimates import BYTES, Zero, memory_under, node_memory, num_parameters
from ardiff.monitor.throughput import peak_flops
from ardiff.preflight.compute import SIDE, matmul_rate
from ardiff.profiling import kernels, links, memory, rates, scaling
from ardiff.profiling.session import Measured, built, measure, profiled, session
from ardiff.profiling.sweep import MARGIN, Candidate, best, default_sizes, out_of_memory, sweep
from ardiff.profiling.synthetic import synthetic_latents
from ardiff.profiling.timeline import GATHER, REDUCTION
from ardiff.training import run_dir
from ardiff.training.distributed import World
from ardiff.training.job import Job

VERSION = 1
MATMUL_SECONDS = {"cuda": 2.0, "cpu": 0.5}
MASK_CONVENTION = (
    "a multiply-add is 2 FLOPs, training 3 forward passes; attention counts the pairs that the mask allows (dense: all)"
)


@dataclass(frozen=True)
class Plan:
    """What is asked for besides the configuration.

    sizes: of micro-batches to sweep, None for those around the configured one, empty for no sweep. checkpointing: to
    sweep. ranks_per_node: of the machines that the model of scaling speaks of, None for `model_nodes`. peak_tflops: of
    one device, instead of what is known of it.
    """

    steps: int = 20
    warmup: int = 5
    sizes: list[int] | None = None
    checkpointing: tuple[bool, ...] = (False, True)
    trace: bool = False
    gpus: tuple[int, ...] = ()
    ranks_per_node: int | None = None
    node_gb_per_s: float | None = None
    peak_tflops: float | None = None


def run(
    build_job: Callable[[Config], Job],
    config: Config,
    ds_settings: dict[str, Any],
    world: World,
    out: Path,
    plan: Plan,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The profile (collective); complete on rank 0 only. Raises UserError, on every rank alike, where it cannot be."""
    synthetic = not (config.data.shards or config.data.mixture)
    config = profiled(copy.deepcopy(config), plan.steps)
    work = out / "work"
    _remove(work, world)  # of a profile that was ended
    world.barrier()
    try:
        with contextlib.ExitStack() as stack:
            if synthetic:
                config.data.shards = str(stack.enter_context(synthetic_latents(config, world, work)))
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_reports_aside(out / "training.log", world))
            return _profile(build_job, config, ds_settings, world, out, plan, say, synthetic)
    finally:
        _remove(work, world)


def _remove(folder: Path, world: World) -> None:
    """On every node, as each may have a disk of its own."""
    if world.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _profile(
    build_job: Callable[[Config], Job],
    config: Config,
    ds_settings: dict[str, Any],
    world: World,
    out: Path,
    plan: Plan,
    say: Callable[[str], None],
    synthetic: bool,
) -> dict[str, Any]:
    device, kind = world.device, world.device.type
    say("rate of a plain matrix product")
    matmul = min(world.gather(matmul_rate(device, SIDE[kind], MATMUL_SECONDS[kind])[0]))
    memory.reset_peak(device)
    found = _train(build_job, config, ds_settings, world, out, plan, say)
    measured, precision = found.measured, found.precision
    candidates: list[Candidate] = []
    sizes = default_sizes(config, world.size) if plan.sizes is None else plan.sizes
    if sizes:
        work, modes = out / "work", plan.checkpointing
        candidates = sweep(
            build_job, config, ds_settings, world, work, sizes, modes, plan.steps, say, found.num_context
        )
    if world.size > 1:
        say("bandwidth of collectives")
    linked = links.measured_links(world, plan.node_gb_per_s)
    if not world.is_main:
        return {}
    parameters, zero = num_parameters(config), Zero.of(ds_settings)
    compute = scaling.compute_of(
        measured.mean_parts,
        world.size,
        config.train.micro_batch_size,
        config.train.global_batch_size,
        stage=zero.stage,
        overlap=zero.overlap,
        parameters=parameters,
        width=BYTES[precision],
        bucket=zero.bucket,
        gathers=found.groups,
        reduce_calls=sum(sent.calls for name, sent in measured.sent.items() if "gather" not in name),
        speed=measured.speed,
    )
    inside = measured.mean_parts[REDUCTION] + measured.mean_parts[GATHER]
    compute = scaling.with_waiting(compute, linked, inside)
    return {
        "version": VERSION,
        "machine": _machine(world),
        "setting": _setting(config, compute, precision, parameters, plan, synthetic),
        "step": measured.as_json(),
        "rates": _rates(config, measured, world, plan, matmul, found.num_context),
        "memory": found.memory,
        "kernels": [kernel.as_json() for kernel in found.kernels],
        "trace": str(found.trace) if found.trace else None,
        "sweep": _sweep_json(candidates),
        "traffic": _traffic(measured, compute),
        "links": linked.as_json(),
        "compute": compute.as_json(),
        "scaling": _scaling_json(compute, linked, plan),
        "versions": run_dir.versions(),
    }


def _setting(
    config: Config, compute: scaling.Compute, precision: str, parameters: int, plan: Plan, synthetic: bool
) -> dict[str, Any]:
    """What was trained."""
    return {
        "model": {"parameters": parameters, "mask": config.model.mask},
        "precision": precision,
        "zero_stage": compute.stage,
        "overlap_comm": compute.overlap,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": config.train.global_batch_size // (config.train.micro_batch_size * compute.ranks),
        "activation_checkpointing": config.model.activation_checkpointing,
        "attention_backend": config.model.attention_backend,
        "data": "synthetic latents" if synthetic else split_credentials(config.data.shards or "a mixture")[0],
        "steps": plan.steps,
        "warmup": plan.warmup,
        "report_every": config.train.log_every,
        "left_out": "checkpoints, sample videos, validation, spike detection",
    }


def _rates(
    config: Config, measured: Measured, world: World, plan: Plan, matmul: float, num_context: int | None
) -> dict[str, Any]:
    """Speeds, and what they are shares of. matmul: FLOP/s of a plain matrix product."""
    peak = plan.peak_tflops * 1e12 if plan.peak_tflops else peak_flops(world.device)
    speeds = rates.rates(config, measured.step_ms / 1000, world.size, peak, num_context)
    return {
        **speeds.as_json(),
        "convention": MASK_CONVENTION,
        "training_gflops_per_clip": rates.training_flops(config.model, num_context) / 1e9,
        "training_gflops_per_clip_dense": rates.training_flops(config.model, num_context, dense=True) / 1e9,
        "peak_tflops": peak / 1e12 if peak else None,
        "peak_from": "--peak_tflops" if plan.peak_tflops else "the data sheet (dense bf16)" if peak else None,
        "matmul_tflops": matmul / 1e12,
        "of_matmul": speeds.hardware_tflops_per_device_dense * 1e12 / matmul,
    }


@dataclass(frozen=True)
class _Found:
    """What training as configured has shown."""

    measured: Measured
    precision: str
    memory: dict[str, Any]
    kernels: list[kernels.Kernel]
    trace: Path | None
    groups: int  # of parameters
    num_context: int | None  # tokens of text in front of the frames, where the model reads any


def _train(
    build_job: Callable[[Config], Job],
    config: Config,
    ds_settings: dict[str, Any],
    world: World,
    out: Path,
    plan: Plan,
    say: Callable[[str], None],
) -> _Found:
    train, on_gpu = config.train, world.device.type == "cuda"
    trace = out / "trace" / "rank0.pt.trace.json.gz" if plan.trace else None
    job = built(build_job, config, world)
    try:
        with session(job, out / "work", ds_settings, world) as trainer:
            measured = measure(trainer, plan.warmup, plan.steps, say)
            kinds = memory.held(trainer)
            peaks = world.gather(memory.peak_gb(world.device))  # before the profiler takes memory for itself
            say("kernels by time")
            table = kernels.kernels(trainer, trace)
            precision, groups = trainer.engine.precision, len(trainer.flat.layout)
    except BaseException as error:
        if out_of_memory(error):
            raise UserError(
                f"out of memory with train.micro_batch_size = {train.micro_batch_size}: lower it, or set "
                "--model.activation_checkpointing true"
            ) from error
        raise
    num_context = job.latent_space.text_tokens if job.latent_space and config.model.context_dim else None
    found = {
        "estimated_gb": memory_under(config, ds_settings, world.size, on_gpu, num_context),
        "held_gb": kinds,
        "host_estimated_gb": node_memory(config, world.size, world.local_size),
        "peak_gb": max(peaks),
        "peak_of": "allocated on the GPU" if on_gpu else "the process, program and libraries included",
    }
    return _Found(measured, precision, found, table, trace if world.is_main else None, groups, num_context)


@contextmanager
def _reports_aside(path: Path, world: World) -> Iterator[None]:
    """The lines of metrics that training prints go to a file."""
    if not world.is_main:
        yield
        return
    with path.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def _cores(world: World) -> float:
    """CPU cores that a rank has to itself; 0 on GPUs."""
    if world.device.type == "cuda":
        return 0.0
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)) / world.local_size)


def _machine(world: World) -> dict[str, Any]:
    device = world.device
    return {
        "host": platform.node(),
        "ranks": world.size,
        "ranks_per_host": world.local_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "cores_per_rank": _cores(world),
    }


def _sweep_json(candidates: list[Candidate]) -> dict[str, Any]:
    chosen = best(candidates)
    return {
        "candidates": [candidate.as_json() for candidate in candidates],
        "margin": MARGIN,
        "best": chosen.as_json() if chosen else None,
        "best_settings": chosen.settings if chosen else None,
    }


def _traffic(measured: Measured, compute: scaling.Compute) -> dict[str, Any]:
    """Bytes that DeepSpeed sent in a step, and those that the model of scaling takes."""
    micro_steps = compute.global_batch_size // (compute.micro_batch_size * compute.ranks)
    reductions = micro_steps if compute.stage == 2 else 1
    sent = measured.sent
    return {
        "reduced_bytes": sum(sent[name].bytes for name in sent if "gather" not in name),
        "reduced_bytes_model": reductions * compute.gradient_bytes,
        "gathered_bytes": sum(sent[name].bytes for name in sent if "gather" in name),
        "gathered_bytes_model": compute.weight_bytes if compute.ranks > 1 else 0,
    }


def model_nodes(linked: links.Links, ranks: int) -> int:
    """Ranks per node of larger clusters: as here where `ranks` are on several nodes, otherwise 8 at least."""
    return linked.ranks_per_node if ranks > linked.ranks_per_node else max(8, ranks)


def _scaling_json(compute: scaling.Compute, linked: links.Links, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {}
    per_node = plan.ranks_per_node or model_nodes(linked, compute.ranks)
    there = replace(linked, ranks_per_node=per_node)
    for name, model in (("weak", scaling.weak), ("strong", scaling.strong)):
        predicted = model(compute, there, plan.gpus)
        shares = scaling.efficiencies(predicted) if predicted else []
        found[name] = [{**one.as_json(), "efficiency": share} for one, share in zip(predicted, shares, strict=True)]
    overlap = "hidden behind the backward pass but for the last bucket" if compute.overlap else "not overlapped"
    found["assumptions"] = [
        f"reduction {overlap} (overlap_comm = {str(compute.overlap).lower()})",
        f"ranks wait {compute.waiting_ms:.1f} ms per step for slower ones, as here, in proportion to compute"
        if compute.ranks > 1
        else "no rank is slower than the others",
        "data wait, logging and rest stay as measured",
        f"{per_node} rank(s) on every node",
        *linked.assumed,
    ]
    return found
