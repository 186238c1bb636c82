"""Where metrics go: metrics.jsonl (exact), TensorBoard (to look at), the console (one line a report)."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ardiff import cli
from ardiff.errors import UserError
from ardiff.files import write_text
from ardiff.video import gif_bytes

METRICS = "metrics.jsonl"
VALIDATION = "validation_"  # what names of figures on held-out data begin with


class MetricsWriter:
    """Appends to run_dir/metrics.jsonl and run_dir/tensorboard, from `first_step` on.

    Lines of later steps, and half a line, that an interrupted run left behind are cut off first, so that the file
    equals an uninterrupted run's.
    """

    def __init__(self, run_dir: Path, first_step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _quieten_tensorboard()
        self.max_steps = max_steps
        path = run_dir / METRICS
        write_text(path, "".join(lines_before(path, first_step)))
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._started = time.perf_counter()
        self._first_step = first_step

    def write(self, metrics: dict[str, Any]) -> None:
        """One report: a JSON line (floats read back bit-exactly), TensorBoard scalars, a line for people."""
        with self._told():
            self._lines.write(json.dumps({key: _plain(value) for key, value in metrics.items()}) + "\n")
            self._lines.flush()
            self._chart(metrics)
        cli.say(self._summary(metrics))

    def _chart(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        for key, value in metrics.items():
            chart = f"validation/{key.removeprefix(VALIDATION)}" if key.startswith(VALIDATION) else key
            if isinstance(value, list):
                for i, part in enumerate(value):
                    if part is not None:
                        self._board.add_scalar(f"{chart}/{i:02d}", part, step)
            elif isinstance(value, dict):
                for name, part in value.items():
                    self._board.add_scalar(f"{chart}/{name}", part, step)
            elif key != "step" and value is not None:
                self._board.add_scalar(chart if chart != key else f"train/{key}", value, step)

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
        for file in (self._lines, self._board):
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


def lines_before(path: Path, step: int) -> list[str]:
    """The complete lines of a metrics.jsonl that belong to steps before `step`."""
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
