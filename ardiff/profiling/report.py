"""A profile as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ardiff.profiling.comparing import Check
from ardiff.profiling.timeline import PARTS


def text(profile: dict[str, Any]) -> str:
    """The whole profile as tables."""
    parts = (_head, _speeds, _breakdown, _memory, _kernels, _sweep, _traffic, _scaling)
    return "\n\n".join(filter(None, (part(profile) for part in parts))) + "\n"


def comparison(checks: Sequence[Check]) -> str:
    """The model of scaling against measured steps."""
    rows = [
        [
            f"{check.source} -> {check.ranks}",
            f"{check.links_from}",
            f"{check.predicted_ms:.1f}",
            f"{check.measured_ms:.1f}",
            f"{check.error:+.1%}",
            f"{check.communication_ms:.1f}",
            f"{check.measured_communication_ms:.1f}",
        ]
        for check in checks
    ]
    head = ["ranks", "links of", "predicted ms", "measured ms", "error", "communication, waiting", "measured"]
    return (
        "Scaling model against measured steps (compute by the speed that ranks had there)\n" + table(head, rows) + "\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned; the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _head(profile: dict[str, Any]) -> str:
    machine, setting = profile["machine"], profile["setting"]
    threads = f", {machine['threads_per_rank']} thread(s) each" if machine["device"] == "CPU" else ""
    return (
        f"{machine['ranks']} rank(s) on {machine['device']}{threads}, {setting['model']['parameters'] / 1e6:.1f} M "
        f"parameters, {setting['precision']}, ZeRO-{setting['zero_stage']}\n"
        f"global batch {setting['global_batch_size']} = {machine['ranks']} x {setting['micro_batch_size']} x "
        f"{setting['accumulation']} accumulation, activation checkpointing "
        f"{'on' if setting['activation_checkpointing'] else 'off'}, {setting['data']}\n"
        f"{setting['steps']} steps after {setting['warmup']} of warm-up, a report every {setting['report_every']}; "
        f"left out: {setting['left_out']}"
    )


def _speeds(profile: dict[str, Any]) -> str:
    rates, step = profile["rates"], profile["step"]
    peak = f"{rates['peak_tflops']:.1f} TFLOP/s of {rates['peak_from']}" if rates["peak_tflops"] else "none is known"
    rows = [
        [
            "step",
            f"{step['step_ms']:.1f} ms",
            f"median {step['step_ms_median']:.1f}",
        ],
        ["clips/s", f"{rates['clips_per_s']:.1f}", ""],
        ["tokens/s", f"{rates['tokens_per_s']:,.0f}", ""],
        ["", "as the mask needs", "dense"],
        [
            "TFLOP/s per device",
            f"{rates['tflops_per_device']:.3f}",
            f"{rates['tflops_per_device_dense']:.3f}",
        ],
        [
            "with recomputation",
            f"{rates['hardware_tflops_per_device']:.3f}",
            f"{rates['hardware_tflops_per_device_dense']:.3f}",
        ],
        ["MFU", _share(rates["mfu"]), _share(rates["mfu_dense"])],
        ["HFU", _share(rates["hfu"]), _share(rates["hfu_dense"])],
        ["of measured matmul", "", f"{rates['of_matmul']:.1%} of {rates['matmul_tflops']:.3f} TFLOP/s"],
    ]
    note = f"  {rates['convention']}; peak: {peak}"
    return "Speed\n" + table(["", "", ""], rows).split("\n", 2)[2] + "\n" + note


def _breakdown(profile: dict[str, Any]) -> str:
    step = profile["step"]
    parts, total = {name: step["parts_ms"][name] for name in PARTS}, step["parts_ms_sum"]
    by_rank = step["parts_ms_by_rank"]
    rows = [
        [name, f"{ms:.2f}", f"{ms / total:.1%}", f"{max(rank[name] for rank in by_rank):.2f}"]
        for name, ms in parts.items()
    ]
    rows.append(["sum", f"{total:.2f}", "100.0%", ""])
    return (
        "A step by part (mean over ranks)\n"
        + table(["part", "ms", "share", "longest rank"], rows)
        + f"\n  sum against the steps timed: {step['sum_against_timed_step']:+.2%}, against the median step "
        f"without the stop-watch: {step['sum_against_step']:+.2%} (its overhead: {step['overhead_of_timing']:+.2%})"
    )


def _memory(profile: dict[str, Any]) -> str:
    memory = profile["memory"]
    rows = [
        [kind, f"{size:.3f}", f"{memory['held_gb'][kind]:.3f}" if kind in memory["held_gb"] else ""]
        for kind, size in memory["estimated_gb"].items()
    ]
    rows[-1][2] = f"{memory['peak_gb']:.3f}"
    return (
        "Memory per rank, GiB\n"
        + table(["kind", "estimated", "measured"], rows)
        + f"\n  measured total: peak, {memory['peak_of']}\n  of the host's memory besides, estimated per rank: "
        f"{memory['host_estimated_gb']['loader']:.3f} for batches, {memory['host_estimated_gb']['checkpoint']:.3f} for "
        "a checkpoint being written"
    )


def _kernels(profile: dict[str, Any]) -> str:
    rows = [
        [_short(kernel["name"]), f"{kernel['calls']:.0f}", f"{kernel['ms']:.2f}", f"{kernel['share']:.1%}"]
        for kernel in profile["kernels"]
    ]
    trace = f"\n  trace for Perfetto or TensorBoard: {profile['trace']}" if profile["trace"] else ""
    return "Kernels of rank 0 by time, per step\n" + table(["kernel", "calls", "ms", "share"], rows) + trace


def _sweep(profile: dict[str, Any]) -> str:
    sweep = profile["sweep"]
    if not sweep["candidates"]:
        return ""
    rows = []
    for one in sweep["candidates"]:
        measured = one["clips_per_s"] is not None
        rows.append(
            [
                str(one["micro_batch_size"]),
                "on" if one["activation_checkpointing"] else "off",
                f"{one['clips_per_s']:.1f}" if measured else "",
                f"{one['step_ms']:.1f}" if measured else "",
                f"{one['peak_gb']:.2f}" if measured else "",
                f"{one['estimated_gb']:.2f}" if one["estimated_gb"] is not None else "",
                one["note"],
            ]
        )
    head = ["micro-batch", "checkpointing", "clips/s", "step ms", "peak GiB", "estimated GiB", "note"]
    best = f"best: {sweep['best_settings']}" if sweep["best"] else "none fits"
    return (
        "Sweep\n" + table(head, rows) + f"\n  {best} (the fastest that leaves {sweep['margin']:.0%} of the memory free)"
    )


def _traffic(profile: dict[str, Any]) -> str:
    traffic = profile["traffic"]
    if profile["machine"]["ranks"] < 2:
        return ""
    rows = [
        [name, f"{traffic[f'{key}_bytes'] / 1e6:.2f}", f"{traffic[f'{key}_bytes_model'] / 1e6:.2f}"]
        for name, key in (("gradients reduced", "reduced"), ("weights gathered", "gathered"))
    ]
    return "Data of DeepSpeed's collectives per step, MB\n" + table(["", "counted", "by the model"], rows)


def _scaling(profile: dict[str, Any]) -> str:
    scaling, blocks = profile["scaling"], []
    titles = {
        "weak": "Scaling by the model, as many clips per rank as here",
        "strong": "Scaling by the model, the same global batch",
    }
    head = [
        "GPUs",
        "global batch",
        "micro-batch",
        "step ms",
        "compute",
        "reduction",
        "gather",
        "waiting",
        "clips/s",
        "efficiency",
    ]
    for name, title in titles.items():
        rows = [
            [
                str(one["ranks"]),
                str(one["global_batch_size"]),
                str(one["micro_batch_size"]),
                *(f"{one[key]:.1f}" for key in ("step_ms", "compute_ms", "reduction_ms", "gather_ms", "waiting_ms")),
                f"{one['clips_per_s']:,.0f}",
                f"{one['efficiency']:.1%}",
            ]
            for one in scaling[name]
        ]
        if rows:
            blocks.append(f"{title}\n{table(head, rows)}")
    notes = "\n".join(f"  - {line}" for line in scaling["assumptions"])
    return "\n".join(blocks) + f"\n  assumed:\n{notes}" if blocks else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
