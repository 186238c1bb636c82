"""Where metrics go: metrics.jsonl (exact), TensorBoard (to look at), the console (one line a report)."""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ardiff import cli
from ardiff.errors import UserError
from ardiff.files import remove_leftovers, write_text
from ardiff.monitor.dashboard import VALIDATION, Dashboard, scalars
from ardiff.video import gif_bytes

METRICS = "metrics.jsonl"
RECENT = 200  # reports, among which every figure of a run is
RANKS = Path("logs") / "ranks.jsonl"


@dataclass(frozen=True)
class Details:
    """What a report says besides its metrics."""

    ranks: dict[str, Any] = field(default_factory=dict)  # a line of logs/ranks.jsonl
    charts: dict[str, float] = field(default_factory=dict)  # of TensorBoard only: tag -> value
    extremes: str | None = None  # a table, for TensorBoard's text


class MetricsWriter:
    """Appends to run_dir/metrics.jsonl, logs/ranks.jsonl and tensorboard, from `first_step` on.

    Lines of later steps, and half a line, that an interrupted run left behind are cut off first, so that the file
    equals an uninterrupted run's.
    """

    def __init__(self, run_dir: Path, first_step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _quieten_tensorboard()
        self.max_steps = max_steps
        self._lines, self._ranks = (_open_after(run_dir / name, first_step) for name in (METRICS, RANKS))
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._dashboard = Dashboard(self._board)
        for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-RECENT:]:  # before the run went on
            self._dashboard.see(tag for tag, _ in scalars(json.loads(line)))
        self._started = time.perf_counter()
        self._first_step = first_step

    def write(self, metrics: dict[str, Any], details: Details | None = None) -> None:
        """One report: JSON lines (floats read back bit-exactly), TensorBoard scalars, a line for people."""
        details = details or Details()
        with self._told():
            for file, line in ((self._lines, metrics), (self._ranks, details.ranks)):
                if line:
                    file.write(json.dumps(_plain(line)) + "\n")
                    file.flush()
            self._chart(metrics, details.charts)
            if details.extremes is not None:
                self._board.add_text("nodes/extremes", details.extremes, metrics["step"])
        cli.say(self._summary(metrics))

    def _chart(self, metrics: dict[str, Any], others: dict[str, float]) -> None:
        drawn = [*scalars(metrics), *others.items()]
        for tag, value in drawn:
            self._board.add_scalar(tag, value, metrics["step"])
        self._dashboard.see(tag for tag, _ in drawn)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk or the like is the user's to mend, and is told with the file."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._lines.name}: cannot be written ({error.strerror or error}); make room and start again, "
                "the run goes on from its newest checkpoint"
            ) from error

    def add_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show uint8 [H, W, 3] under TensorBoard's images."""
        self._board.add_image(tag, picture, step, dataformats="HWC")

    def add_video(self, tag: str, frames: np.ndarray, step: int, fps: float) -> None:
        """Show uint8 frames [F, H, W, 3] as a moving picture under TensorBoard's images."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = frames.shape[1:3]
        picture = gif_bytes(frames, fps)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture)
        self._board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def flush(self) -> None:
        """Have the lines on the disk before a checkpoint is: a resumed run takes them for complete."""
        with self._told():
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush and close; what cannot be written any more has been told before."""
        for file in (self._lines, self._ranks, self._board):
            with suppress(OSError):
                file.close()

    def _summary(self, metrics: dict[str, Any]) -> str:
        step = metrics["step"]
        seconds = (time.perf_counter() - self._started) / (step - self._first_step + 1)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.max_steps - step)))
        filled = round(20 * step / self.max_steps)
        mfu = f" mfu {metrics['mfu']:.1%}" if metrics.get("mfu") else ""
        measured = metrics.get(f"{VALIDATION}psnr")
        held_out = "" if measured is None else f" held-out PSNR {measured:.2f} dB"
        if (loss := metrics.get(f"{VALIDATION}loss")) is not None:
            held_out += f" held-out loss {loss:.4f}"
        return (
            f"[{'#' * filled}{'.' * (20 - filled)}] step {step}/{self.max_steps} loss {metrics['loss']:.4f} "
            f"grad {metrics['grad_norm']:.3f} lr {metrics['lr']:.2e} {metrics['clips_per_s']:.1f} clips/s "
            f"data wait {metrics['data_wait_frac']:.0%}{mfu}{held_out} left {left}"
        )


def _open_after(path: Path, step: int) -> TextIO:
    """A file of JSON lines, open to append those from `step` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    write_text(path, "".join(lines_before(path, step)))
    return path.open("a", encoding="utf-8")


def lines_before(path: Path, step: int) -> list[str]:
    """The complete lines of a metrics.jsonl or ranks.jsonl that belong to steps before `step`."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] >= step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept


@functools.cache  # once is enough
def _quieten_tensorboard() -> None:
    """Its thread dies of a full disk with a traceback; the error comes up again, and is told, at the next report."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not (isinstance(found.exc_value, OSError) and type(found.thread).__name__ == "_AsyncWriterThread"):
            before(found)

    threading.excepthook = hook


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings that Python's float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
