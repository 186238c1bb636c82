"""Worker processes that may crash or hang without harm: only the item at hand is lost.

A plain pool of processes breaks as a whole when a decoder crashes, and waits for ever when one hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

# A fork of this process would copy the locks of its threads, and a fresh Python would take seconds to import what it
# needs. So processes are forked from a server that has imported it and has no threads of its own.
CONTEXT = multiprocessing.get_context("forkserver")

Function = Callable[[Any, Callable[[Any], None]], None]


@dataclass(frozen=True)
class Event:
    """Something that happened to item number `item`; with `done` it is the last event of that item.

    `value` is what the function reported; `failure` says in words why an item was given up.
    """

    item: int
    done: bool = False
    value: Any = None
    failure: str | None = None


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    item: int = -1
    deadline: float = float("inf")


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_processes(
    function: Function, items: Sequence[Any], workers: int, timeout: float, preload: Sequence[str] = ()
) -> Iterator[Event]:
    """Call `function(item, report)` for every item; yield an event per report and one when the item is done.

    `function` must be a function of a module and may call `report(value)` as often as it likes. An item whose
    process dies, raises or is silent for more than `timeout` seconds fails, and the others go on. Modules in `preload`
    are imported once, not by every process.
    """
    CONTEXT.set_forkserver_preload([function.__module__, *preload])
    waiting = list(range(len(items)))[::-1]
    pool: list[_Worker] = []
    try:
        while waiting or pool:
            while waiting and len(pool) < workers:
                pool.append(_start(function))
                _give(pool[-1], items, waiting, timeout)
            patience = max(0.0, min(worker.deadline for worker in pool) - time.monotonic())
            ready = wait([worker.pipe for worker in pool], timeout=patience)
            for worker in list(pool):
                event = _receive(worker) if worker.pipe in ready else _overdue(worker, timeout)
                if event is None:
                    continue
                worker.deadline = time.monotonic() + timeout
                if event.failure is not None or (event.done and not waiting):
                    _stop(worker)
                    pool.remove(worker)
                elif event.done:
                    _give(worker, items, waiting, timeout)
                yield event
    finally:
        for worker in pool:
            _stop(worker)


def _start(function: Function) -> _Worker:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_work, args=(function, theirs), daemon=True)
    with _ctrl_c_held():
        process.start()
    theirs.close()  # so that the death of the process ends the pipe
    return _Worker(process, ours)


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """A process started in here never sees Ctrl-C, which is meant for its parent; the parent sees it afterwards."""
    resource_tracker.ensure_running()  # Python starts it beside the first process, and lets Ctrl-C through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _give(worker: _Worker, items: Sequence[Any], waiting: list[int], timeout: float) -> None:
    worker.item = waiting.pop()
    worker.deadline = time.monotonic() + timeout
    with suppress(OSError):  # it died meanwhile: reading from the pipe will tell
        worker.pipe.send(items[worker.item])


def _receive(worker: _Worker) -> Event:
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Event(worker.item, done=True, failure=f"its process died ({reason})")
    if kind == "failure":
        return Event(worker.item, done=True, failure=value)
    return Event(worker.item, done=kind == "done", value=value)


def _overdue(worker: _Worker, timeout: float) -> Event | None:
    if time.monotonic() < worker.deadline:
        return None
    return Event(worker.item, done=True, failure=f"no answer within {timeout:g} s")


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _work(function: Function, pipe: Connection) -> None:
    """Life of a worker process: items come through the pipe until it ends."""
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def report(value: Any) -> None:
        pipe.send(("value", value))

    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            function(item, report)
        except Exception as error:  # whatever it is, it concerns this item only
            pipe.send(("failure", f"{type(error).__name__}: {error}"))
            return
        pipe.send(("done", None))


def _die_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside a run that was started anew."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
