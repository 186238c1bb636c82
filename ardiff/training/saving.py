"""Writing checkpoints in the background: training waits for a copy to host memory only.

The format is that of checkpoint.py. Each rank copies its share between two steps; a thread of its own then writes it
aside, flushes and hashes it. When all ranks have finished, rank 0 renames the folder and prunes older ones. The
threads talk over a process group of their own, because the main threads go on using theirs.
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ardiff import cli
from ardiff.config import Config, to_yaml
from ardiff.data.urls import without_credentials
from ardiff.errors import CheckpointError, EchoedError, UserError
from ardiff.files import sha256, sync, write_json, write_text
from ardiff.training import checkpoint
from ardiff.training.checkpoint import State
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.flat import FlatState

log = logging.getLogger("ardiff")
PATIENCE = 60.0  # seconds that `close` leaves to a checkpoint that is being written
NOTICEABLE = 1.0  # seconds of waiting for the checkpoint before that deserve a warning
SMALL_FILES = 1 << 20  # bytes of state.json and the like, about
NICENESS = 10  # of the writing thread
GIB = 2**30
# What a user mends; a path that is not there may be that of a network disk that another rank's folder reaches late.
_USERS_ERRNOS = cli.USERS_ERRNOS - {errno.ENOENT}
_Failure = tuple[bool, str]  # whether the user can mend it, and what to tell


class Saver:
    """Writes the checkpoints of a run, one at a time (collective: all ranks make one).

    A checkpoint holds the state as it was at `begin`, whatever training does afterwards. A failure on any rank is one
    on every rank: no rank has a checkpoint that another lacks. It is a UserError where the user has to make room or
    the like, and otherwise a CheckpointError: a disk of the network that does not answer now may do so at the next
    start.
    """

    def __init__(self, run_dir: Path, config: Config, world: World) -> None:
        self.stalled_seconds = 0.0  # that the last `begin` kept training waiting
        self.written_seconds = 0.0  # that writing the last finished checkpoint took
        self._run_dir, self._config, self._world = run_dir, config, world
        timeout = datetime.timedelta(minutes=config.train.collective_timeout_minutes)
        self._writers = replace(world, control=dist.new_group(backend="gloo", timeout=timeout))
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._warned = False

    @property
    def failed(self) -> bool:
        """Whether it is known here that the last checkpoint could not be written. The ranks do not learn it at the same
        step: let them agree on it, then `wait` raises it on all.
        """
        return self._failure is not None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written here just now."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, state: State, flat: FlatState, ema: ShardedEMA, objective: nn.Module, probe: Tensor | None = None
    ) -> None:
        """Start a checkpoint of this moment (collective); returns as soon as everything of this rank is copied.

        Waits for the one before. probe: of `probe.take`, on rank 0. Raises as `wait` and `check_space` do.
        """
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        if waited > NOTICEABLE and not self._warned and self._world.is_main:
            self._warned = True
            log.warning(
                "step %d: training waited %.1f s for the checkpoint before, which was still being written; if that is "
                "the rule, checkpoints take longer than their interval: raise train.save_every or train.save_minutes",
                state.step,
                waited,
            )
        self.check_space(flat, ema, objective, probe)
        tensors = flat.export(ema.vectors(), self._room)
        if self._world.is_main:
            for name, buffer in objective.named_buffers():
                host = self._room(f"buffer.{name}", buffer.numel(), buffer).view(buffer.shape)
                tensors[f"buffer.{name}"] = host.copy_(buffer.detach(), non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        contents = {checkpoint.rank_file(self._world.rank): tensors}
        if probe is not None:
            contents[checkpoint.PROBE] = {"prediction": probe}
        document = {**asdict(state), "slices": self._world.gather(flat.ranges())}  # a copy, of lists that change too
        self.stalled_seconds = time.perf_counter() - start
        self._thread = threading.Thread(target=self._write, args=(document, contents), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written (collective). If the last one failed, raises UserError or CheckpointError, the
        same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> bool:
        """Leave what is being written some time to end, and tell if it does not. Each rank by itself; raises nothing.

        Returns whether nothing is being written any more. The thread does not keep the process alive, so a disk that
        does not answer only costs this checkpoint.
        """
        if self._thread is not None:
            self._thread.join(PATIENCE)
        if self.writing:
            log.error(
                "rank %d: the checkpoint is not written after %g s more and is given up; earlier ones are intact",
                self._world.rank,
                PATIENCE,
            )
        return not self.writing

    def check_space(self, flat: FlatState, ema: ShardedEMA, objective: nn.Module, probe: Tensor | None = None) -> None:
        """Refuse to go on where the disk has no room for one more checkpoint (collective).

        Raises UserError on every rank if so, CheckpointError where the disk does not tell.
        """
        needed = 0
        for vectors in (flat.vectors() | ema.vectors()).values():
            for (start, end), master, _ in zip(flat.ranges(), flat.partitions, vectors, strict=False):
                needed += (end - start) * master.element_size()  # a discriminator's groups come last, without average
        if self._world.is_main:
            needed += SMALL_FILES + sum(buffer.nbytes for buffer in objective.buffers())
            needed += 0 if probe is None else probe.nbytes
        total = sum(self._world.gather(needed))
        self._on_main(self._world, self._run_dir, partial(_require_space, self._run_dir, total))

    def _room(self, name: str, length: int, like: Tensor) -> Tensor:
        """Host memory for a tensor, the same for every checkpoint; of a GPU's, pinned."""
        host = self._staged.get(name)
        if host is None or (host.numel(), host.dtype) != (length, like.dtype):
            host = torch.empty(length, dtype=like.dtype, pin_memory=like.is_cuda)
            self._staged[name] = host
        return host

    def _write(self, document: dict[str, Any], contents: dict[str, dict[str, Tensor]]) -> None:
        """The thread. All of its collectives are met by the threads of the other ranks, whatever fails."""
        start = time.perf_counter()
        with suppress(OSError):  # training goes first where cores are scarce
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        final = checkpoint.step_directory(self._run_dir, document["step"])
        try:
            self._on_main(self._writers, final, partial(checkpoint.unfinished(final).mkdir, parents=True))
            parts = self._writers.gather(self._write_own(final, contents))
            failures = [part["failure"] for part in parts if "failure" in part]
            if failures:
                if self._world.is_main:
                    shutil.rmtree(checkpoint.unfinished(final), ignore_errors=True)
                raise _as_error(max(failures, key=lambda failure: failure[0]), self._world.is_main)
            self._on_main(self._writers, final, partial(_finish, final, document, parts, self._config))
        except (UserError, CheckpointError) as error:  # to be raised by the main thread
            self._failure = error
            return
        except Exception as error:  # a rank that has gone, say
            self._failure = _as_error(_not_written(final, error), self._world.is_main)
            self._failure.__cause__ = error
            return
        self.written_seconds = time.perf_counter() - start
        if self._world.is_main:
            waited, took = self.stalled_seconds, self.written_seconds
            log.info("checkpoint %s (training waited %.2f s, written in %.1f s)", final, waited, took)

    def _write_own(self, final: Path, contents: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Write this rank's files; says what they are, or what went wrong."""
        folder, files = checkpoint.unfinished(final), {}
        try:
            for name, content in contents.items():
                save_file(content, folder / name)
                (folder / name).chmod(folder.stat().st_mode & 0o666)  # otherwise the owner's alone
                sync(folder / name)
                files[name] = _describe(folder / name)
        except Exception as error:  # all ranks must hear of it
            return {"failure": _not_written(final, error, f"rank {self._world.rank}: ")}
        return {"files": files}

    def _on_main(self, world: World, what: Path, act: Callable[[], object]) -> None:
        """Run `act` on rank 0 (collective); if it fails, every rank raises UserError or CheckpointError."""
        cause: Exception | None = None  # where it happened

        def attempt() -> _Failure | None:
            nonlocal cause
            try:
                act()
            except Exception as error:
                cause = error
                return _not_written(what, error)
            return None

        failure = world.from_main(attempt)
        if failure is not None:
            raise _as_error(failure, world.is_main) from cause


def _require_space(run_dir: Path, needed: int) -> None:
    folder = (run_dir / "checkpoints").absolute()  # which may lie on a disk of its own
    checkpoint.remove_unfinished(folder)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{run_dir}: a checkpoint needs {needed / GIB:.3g} GiB, but {free / GIB:.3g} GiB are free; make room "
            "(train.keep_checkpoints says how many are kept) and start again"
        )


def _not_written(what: Path, error: Exception, where: str = "") -> _Failure:
    """Whether a user can mend what kept a checkpoint from being written, and one line that says so."""
    if isinstance(error, UserError):
        return True, str(error)
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors, whose errors are no OSErrors
        number = int(found[1])
    is_users = number in _USERS_ERRNOS
    reason = where + (" ".join(str(error).split()) or type(error).__name__)
    mend = "make room and " if number in (errno.ENOSPC, errno.EDQUOT) else "mend that and " if is_users else ""
    text = f"{what}: the checkpoint could not be written ({reason}); earlier ones are intact, {mend}start again"
    return is_users, text


def _as_error(failure: _Failure, is_main: bool) -> Exception:
    is_users, text = failure
    if not is_users:
        return CheckpointError(text)
    return UserError(text) if is_main else EchoedError(text)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _finish(final: Path, document: dict[str, Any], parts: list[dict[str, Any]], config: Config) -> None:
    """What rank 0 does when all have written: manifest, rename, `latest`, older ones away."""
    temporary = checkpoint.unfinished(final)
    try:
        write_json(temporary / "state.json", document)
        write_text(temporary / "config.yaml", to_yaml(without_credentials(config)))
        files = {name: described for part in parts for name, described in part["files"].items()}
        files |= {name: _describe(temporary / name) for name in ("state.json", "config.yaml")}
        write_json(temporary / "MANIFEST.json", {"format": checkpoint.FORMAT_VERSION, "files": files})
        if final.exists():  # a checkpoint of the same step that did not verify
            final.rename(final.with_name(f"damaged_{final.name}_{time.time_ns()}"))
        temporary.rename(final)
        sync(final.parent)
        write_text(final.parent / "latest", final.name + "\n")
        checkpoint.prune(final, config.train.keep_checkpoints, config.train.keep_every)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
