"""How TensorBoard shows a run: which chart a figure belongs to, and the page of charts that matter.

The page is TensorBoard's tab "Custom Scalars"; `URL/#custom_scalars` opens on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

VALIDATION = "validation_"  # what names of figures on held-out data begin with
NODES = "nodes"  # of metrics.jsonl; drawn GPU by GPU and node by node, see `ardiff.monitor.nodes.charts`
SPEED = (
    *("clips_per_s", "tokens_per_s", "tflops_per_gpu", "mfu", "step_ms", "data_wait_frac", "slowest_rank"),
    *("slowest_rank_ratio", "peak_memory_gb", "host_rss_gb", "alloc_retries"),
)

# Category -> title -> tags, as regular expressions; a chart whose tags a run does not have is left out.
CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Training": {
        "loss": ("train/loss", "validation/loss"),
        "learning rate": ("train/lr",),
        "gradient norm": ("train/grad_norm",),
        "gradient norm by layer": ("grad_norm_of/.*",),
        "skipped steps, bad samples": ("train/skipped_steps", "train/bad_samples"),
    },
    "Loss by noise level and by frame": {
        # Lines of a run have one colour: of what jitters, a few.
        "by decile of the timestep (00: nearly clean)": ("loss_by_decile/0[0369]",),
        "of the 1st, 8th, 16th, ... frame": ("loss_by_frame/(00|07|15|31|63|127)",),
        "held out, by decile of the timestep": ("validation/loss_by_decile/.*",),
        "held out, by frame": ("validation/loss_by_frame/.*",),
    },
    "Auto-encoder": {
        "PSNR, held out (dB)": ("validation/psnr",),
        "SSIM, held out": ("validation/ssim",),
        "mean squared error": ("train/mse",),
        "KL divergence": ("train/kl",),
        "perceptual distance": ("train/perceptual", "validation/lpips"),
        "adversarial terms": ("train/adversarial", "train/discriminator_loss"),
        "discriminator: share it judges right": ("train/discriminator_right",),
        "gradient energy to the original's, flicker": ("validation/gradient_energy_ratio", "validation/flicker"),
        "rank of the latents": ("validation/effective_rank", "validation/dead_channels"),
    },
    "Throughput": {
        "clips per second": ("speed/clips_per_s",),
        "model FLOPs utilization (MFU)": ("speed/mfu",),
        "TFLOP/s per GPU": ("speed/tflops_per_gpu",),
        "step (ms)": ("speed/step_ms",),
        "share of the time spent waiting for data": ("speed/data_wait_frac",),
        "slowest rank's own work to the median": ("speed/slowest_rank_ratio",),
        "memory of a rank, greatest (GiB)": ("speed/peak_memory_gb", "speed/host_rss_gb"),
    },
    "GPUs": {
        "utilization (%)": ("gpu/utilization/.*",),
        "power (W)": ("gpu/power_w/.*",),
        "temperature (C)": ("gpu/temperature_c/.*",),
        "memory (GiB)": ("gpu/memory_used_gb/.*",),
        "SM clock (MHz)": ("gpu/sm_clock_mhz/.*",),
        "throttled (% of the time)": ("gpu/throttled/.*",),
        "NVLink, received (GiB/s)": ("gpu/nvlink_rx_gb_s/.*",),
        "ECC errors, uncorrected": ("gpu/ecc_uncorrected/.*",),
    },
    "Hosts": {
        "processors (%)": ("host/cpu/.*", "host/steal/.*"),
        "memory that can still be had (GiB)": ("host/available_gb/.*",),
        "network (MB/s)": ("host/net_.*",),
        "InfiniBand and RoCE (MB/s)": ("host/ib_.*",),
        "disks (MB/s)": ("host/disk_.*",),
        "time in which something waited (%)": (".*_pressure/.*",),
    },
}


class Board(Protocol):
    """The part of torch's SummaryWriter that a page needs."""

    def add_custom_scalars(self, layout: dict[str, Any]) -> None:
        """Write a layout; the last one counts."""


def scalars(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values of a line of metrics.jsonl, as far as they are numbers of one chart each."""
    for key, value in metrics.items():
        if key in ("step", NODES) or value is None:
            continue
        chart = f"validation/{key.removeprefix(VALIDATION)}" if key.startswith(VALIDATION) else key
        if isinstance(value, list):
            yield from ((f"{chart}/{i:02d}", part) for i, part in enumerate(value) if part is not None)
        elif isinstance(value, dict):
            yield from ((f"{chart}/{name}", part) for name, part in value.items())
        elif chart != key:
            yield chart, value
        else:
            yield f"{'speed' if key in SPEED else 'train'}/{key}", value


class Dashboard:
    """The page; it grows when figures appear that were not there before."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._tags: set[str] = set()
        self._drawn: dict[str, Any] = {}

    def see(self, tags: Iterable[str]) -> None:
        """Take in the tags of a report; writes the page anew if there is more to show."""
        if (new := set(tags) - self._tags) and (found := layout(self._tags | new)) != self._drawn:
            self._board.add_custom_scalars(found)
            self._drawn = found
        self._tags |= new


def layout(tags: set[str]) -> dict[str, Any]:
    """The charts that a run with these tags has, as `SummaryWriter.add_custom_scalars` takes them.

    A chart is the same in all runs that have it: TensorBoard then shows them in one.
    """
    found: dict[str, Any] = {}
    for category, titles in CHARTS.items():
        for title, patterns in titles.items():
            if any(re.fullmatch(pattern, tag) for pattern in patterns for tag in tags):
                found.setdefault(category, {})[title] = ["Multiline", [f"^{pattern}$" for pattern in patterns]]
    return found
