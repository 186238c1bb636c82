"""run_dir: it can be made, is shared by all hosts, has room for checkpoints, and is written quickly."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ardiff.errors import UserError
from ardiff.files import remove_leftovers, sync
from ardiff.preflight.checks import Context, Finding, Remark, Report, TooLongError
from ardiff.preflight.comparing import all_of_host
from ardiff.training import run_dir

GIB = 2**30
MIB = 2**20
NOTES = "logs"  # a folder of run_dir that a run does not mind, so that what a kill leaves is in nobody's way
SEEN_WITHIN = 15.0  # seconds: network file systems keep what they know of a folder for some time
SLOW_MB_PER_S = 50.0
CHUNK = 4 * MIB


def check_run_dir(context: Context) -> Finding:
    """Make a file there and look for rank 0's from every host; then write, without leaving anything."""
    folder: Path | None = context.options.run_dir
    if folder is None:
        return Finding(not_checked="no --run_dir")
    found = Finding()
    if context.meeting.is_main:
        try:
            _offer_token(context, folder, found)
        except BaseException:
            context.meeting.publish("token", None)
            raise
    try:
        token = context.meeting.read("token", context.limit)
    except TooLongError:
        return Finding(not_checked="rank 0 has not written there in time")
    if token is None:
        return Finding(not_checked="rank 0 could not write there")
    name, content = token
    seen = context.meeting.wait(lambda: _sees(folder / NOTES, name, content), SEEN_WITHIN)
    found.figures["run_dir_shared"] = seen
    if seen:
        found.figures["write_mb_per_s"] = write_speed(_place_to_write(folder), (16 if context.quick else 64) * MIB)
    else:
        found.failures.append(
            f"--run_dir {folder}: what rank 0 writes there is not seen here; it must be a folder that all hosts "
            "share, under the same path"
        )
    return found


def _offer_token(context: Context, folder: Path, found: Finding) -> None:
    if context.config is not None:
        run_dir.check(folder, context.config, context.trains, context.fixed, "auto")
    if run_dir.is_ours(folder) and run_dir.in_use(folder):
        found.warnings.append(f"--run_dir {folder}: a run is writing there; stop it, or choose another")
    made = _make(folder / NOTES)
    path = folder / NOTES / f".preflight.tmp.{platform.node()}.{os.getpid()}"
    context.clean_up.callback(_remove, path, made)  # rank 0 ends last, so everyone has looked by then
    remove_leftovers(folder / NOTES, own=True)
    content = secrets.token_hex(8)
    path.write_text(content, encoding="ascii")
    sync(path)
    existing = shutil.disk_usage(_place_to_write(folder))
    found.figures |= {"disk_gb": existing.total / GIB, "disk_free_gb": existing.free / GIB}
    context.meeting.publish("token", [path.name, content])


def _make(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(token: Path, folders: Sequence[Path]) -> None:
    token.unlink(missing_ok=True)
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # somebody else uses it by now
            return


def _sees(folder: Path, name: str, content: str) -> bool:
    try:
        list(folder.iterdir())  # makes a network file system ask its server
        return (folder / name).read_text(encoding="ascii") == content
    except (OSError, UnicodeError):
        return False


def _place_to_write(folder: Path) -> Path:
    """Where checkpoints go, which may be a disk of its own."""
    checkpoints = folder / "checkpoints"
    return checkpoints if checkpoints.is_dir() else folder


def write_speed(folder: Path, size: int) -> float:
    """MB/s of a new file up to its being on the disk. It has no name while it is written, so that nothing is left
    behind even by a kill.
    """
    path = folder / f".preflight-{secrets.token_hex(4)}.tmp.{platform.node()}.{os.getpid()}"
    block = memoryview(os.urandom(CHUNK))  # which no file system can compress
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        path.unlink()
        begin = time.perf_counter()
        written = 0
        while written < size:
            written += os.write(handle, block[: size - written])
        os.fsync(handle)
        return written / 1e6 / max(time.perf_counter() - begin, 1e-9)
    finally:
        os.close(handle)


def compare_run_dir(reports: Sequence[Report]) -> list[Remark]:
    """Hosts that write slowly."""
    speeds = {report.rank: report.figure("write_mb_per_s") for report in reports}
    return [
        Remark(
            f"run_dir is written at {speed:.0f} MB/s; checkpoints will take long: use a faster disk or file system",
            all_of_host(reports, rank),
            warning=True,
        )
        for rank, speed in speeds.items()
        if speed is not None and speed < SLOW_MB_PER_S
    ]


def require_room(checkpoint_bytes: float, kept: int, present: int, free_gb: float, folder: Path) -> tuple[str, str]:
    """A failure and a warning ("" for neither) about the room for checkpoints.

    kept: checkpoints that a run keeps, train.keep_checkpoints; one more is being written before the oldest goes.
    present: those that are there already, which take no more room.
    """
    one = checkpoint_bytes / GIB
    if one > free_gb:
        return f"{folder}: a checkpoint needs {one:.3g} GiB, but {free_gb:.3g} GiB are free; make room", ""
    needed = max(1, kept + 1 - present) * one
    if needed > free_gb:
        return "", (
            f"{folder}: {kept} checkpoints and the one being written need {needed:.3g} GiB more, but {free_gb:.3g} GiB "
            "are free; make room or lower train.keep_checkpoints"
        )
    return "", ""


def checkpoints_in(folder: Path) -> int:
    """How many checkpoints of a run lie there."""
    try:
        return sum(path.name.startswith("step_") for path in (folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UserError(f"{folder / 'checkpoints'}: cannot be read ({error.strerror})") from error
