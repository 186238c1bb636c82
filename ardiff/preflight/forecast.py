"""What the run will need, from what was measured: memory against the device's, room for checkpoints, time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high
from typing import Any

import torch

from ardiff.monitor import estimates
from ardiff.preflight.checks import Context, Remark, Report
from ardiff.preflight.network import AMONG
from ardiff.preflight.storage import checkpoints_in, require_room

GIB = 2**30
CONTEXT_GB = 1.5  # GiB of a GPU that CUDA, NCCL and libraries keep
PROGRAM_GB = 1.0  # GiB of host memory for a rank's program and libraries
TIGHT = 0.9  # of the memory


def forecast(context: Context, reports: Sequence[Report]) -> tuple[dict[str, Any], list[Remark]]:
    """Estimates for the report, and what follows from them. Rank 0, when all have been collected."""
    if context.config is None or context.ds_settings is None:
        return {"not_estimated": "no configuration"}, []
    found: dict[str, Any] = {}
    remarks: list[Remark] = []
    if context.trains == "DiT":
        found["memory_gb"] = _memory(context)
        if notes := _notes(context):
            found["notes"] = notes
        remarks += _compare_memory(context, found["memory_gb"], reports)
        found["step_s"] = _step(context, reports)
        remarks += _compare_reading(context, found["step_s"], reports)
    else:
        found["not_estimated"] = f"memory and time of a step: not known for the {context.trains}"
    size = _checkpoint_bytes(context)
    if size is not None:
        found["checkpoint_gb"] = size / GIB
        remarks += _compare_room(context, size, reports)
    return found, remarks


def _memory(context: Context) -> dict[str, float]:
    assert context.config is not None and context.ds_settings is not None
    on_gpu = context.device.type == "cuda"
    return estimates.memory_under(context.config, context.ds_settings, context.run_size, on_gpu, _num_context(context))


def _num_context(context: Context) -> int | None:
    """Tokens of text: the data's. None without text, and where there are no data to ask."""
    if context.config is None or not context.config.model.context_dim:
        return None
    space = None if context.job is None else context.job.latent_space
    return None if space is None else space.text_tokens


def _notes(context: Context) -> list[str]:
    """How far the estimates are to be believed."""
    notes = []
    if context.config is not None and context.config.model.context_dim and _num_context(context) is None:
        notes.append("text is not counted, as its length is the data's: give --data.shards")
    if context.device.type == "cpu":
        notes.append("on CPUs a step takes far longer than estimated, as it is bound by more than matrix products")
    return notes


def _compare_memory(context: Context, needed: dict[str, float], reports: Sequence[Report]) -> list[Remark]:
    """Devices, or hosts of CPU ranks, that the model does not fit on."""
    remedy = "lower train.micro_batch_size, set model.activation_checkpointing, or use more ranks"
    remarks = []
    for report in reports:
        size = report.figure("memory_gb")
        if size is not None:
            what, room, wanted = report.figure("device"), size - CONTEXT_GB, needed["total"]
        else:
            first = next(one for one in reports if one.host == report.host)
            available = first.figure("host_available_gb")
            if first is not report or available is None:
                continue
            ranks = sum(one.host == report.host for one in reports)
            what, room = "the host", available
            wanted = ranks * (needed["total"] + PROGRAM_GB)
        if wanted > TIGHT * room:
            fits = wanted <= room
            text = (
                f"a run needs about {wanted:.1f} GiB (estimated), {what} has {room:.1f} free for it"
                f"{', which is tight' if fits else ''}; {remedy}"
            )
            remarks.append(Remark(text, (report.rank,), warning=fits))
    return remarks


def _step(context: Context, reports: Sequence[Report]) -> dict[str, float] | None:
    """Seconds of a step by part, from the slowest rank's matrix products and the bandwidth of a large all-reduce."""
    assert context.config is not None and context.ds_settings is not None
    rates = [report.figure("matmul_tflops") for report in reports]
    known = [rate for rate in rates if rate]
    if not known:
        return None
    zero = estimates.Zero.of(context.ds_settings)
    return estimates.step_seconds(
        context.config,
        context.run_size,
        zero.precision,
        1e12 * min(known),
        _bandwidth(reports),
        stage=zero.stage,
        bucket=zero.bucket,
        overlap=zero.overlap,
        num_context=_num_context(context),
    )


def _bandwidth(reports: Sequence[Report]) -> float | None:
    """Of the largest all-reduce among all ranks."""
    measured = [
        one
        for report in reports[:1]
        for one in report.figure("collectives") or []
        if one["scope"] == AMONG and one["op"] == "all_reduce"
    ]
    return max(measured, key=lambda one: one["bytes"])["bus_gb_per_s"] if measured else None


def _compare_reading(context: Context, step: dict[str, float] | None, reports: Sequence[Report]) -> list[Remark]:
    """Whether shards are read more slowly than steps would use them."""
    rates = [report.figure("clips_per_s") for report in reports]
    known = [rate for rate in rates if rate]
    if step is None or not known or context.config is None or context.device.type == "cpu":
        return []  # where steps are bound by more than arithmetic, the estimate is far too short
    needed = context.config.train.global_batch_size / context.run_size / step["total"]
    typical = median_high(known)
    if typical >= needed:
        return []
    text = (
        f"a rank reads {typical:.0f} clips/s, but steps would use {needed:.0f}: training would wait for data; put the "
        "shards on a faster disk or set data.cache_dir"
    )
    return [Remark(text, warning=True)]


def _checkpoint_bytes(context: Context) -> float | None:
    """Master weights, two moments and the averages, all fp32."""
    assert context.config is not None
    if context.job is not None:
        with torch.device("meta"):
            objective = context.job.build_objective()
        parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    elif context.trains == "DiT":
        parameters = estimates.num_parameters(context.config)
    else:
        return None
    return 4.0 * parameters * (3 + 1 + len(context.config.train.extra_ema_decays))


def _compare_room(context: Context, size: float, reports: Sequence[Report]) -> list[Remark]:
    folder, free = context.options.run_dir, reports[0].figure("disk_free_gb") if reports else None
    if folder is None or free is None or context.config is None:
        return []
    failure, warning = require_room(size, context.config.train.keep_checkpoints, checkpoints_in(folder), free, folder)
    remarks = [Remark(failure)] if failure else []
    return remarks + ([Remark(warning, warning=True)] if warning else [])
