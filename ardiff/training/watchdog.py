"""Finding a run that hangs: stacks and phase of every rank on disk, the likely cause in one line, exit code 3.

A rank that stops stalls the collectives of all others, so every rank notices by itself, at about the same time. They
meet in the run's folder, because nothing else can be relied on any more.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ardiff import cli
from ardiff.training import hangs, run_dir

log = logging.getLogger("ardiff")
RECORDER = 2.0  # seconds that torch's flight recorder has for its answer
START = 60.0  # seconds more until the second step: imports, compilation and connections come before it


class Watchdog:
    """Ends the process with `cli.EXIT_HUNG` when it makes no progress for `minutes`; active while entered.

    Before the second step it waits a minute more.

    run_dir: shared by all ranks; gets logs/hang_rank00000.txt and so on, and exit.json, in case of a hang.
    `enter` and `beat` are progress; both are cheap enough for every step.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, minutes: float) -> None:
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.limit = minutes * 60  # seconds; `_allowed` is what counts now
        self._allowed, self._step_changes = self.limit + START, 0
        # Ranks notice a hang up to one step (or checkpoint) apart, so they wait for each other in proportion.
        self.patience = min(60.0, max(2.0, self.limit / 20))
        self._tick = min(5.0, self.limit / 20)
        self._state = ("starting", 0, time.time())  # a new object at every progress
        self._ended, self._hangs = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: Any = None  # the file that is open for the stacks of a rank whose watchdog cannot run

    def enter(self, phase: str, step: int) -> None:
        """Note what this rank does from now on, such as "training step", and at which step."""
        if step != self._state[1] and self._step_changes < 2:
            self._step_changes += 1
            if self._step_changes == 2:
                self._allowed = self.limit
        self._state = (phase, step, time.time())

    def beat(self) -> None:
        """Note that the phase goes on."""
        phase, step, _ = self._state
        self._state = (phase, step, time.time())

    def __enter__(self) -> Watchdog:
        try:
            hangs.clear(self.run_dir, self.rank, self.world_size)
            self._stacks = hangs.held_file(self.run_dir, self.rank).open("w", encoding="utf-8")
        except OSError as error:  # a full disk: the hang is found all the same
            log.warning("watchdog: cannot write to %s (%s)", hangs.folder(self.run_dir), error.strerror)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._hangs.is_set():  # the collective has failed meanwhile: leave telling the cause to the watchdog
            self._thread.join()
        self._thread.join(self._tick + 5.0)
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            hangs.held_file(self.run_dir, self.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        """Count the seconds that this thread has seen go by without progress.

        It sees none while the machine sleeps or the process is suspended: after such a gap it counts anew.
        """
        seen, still, last = self._state, 0.0, time.monotonic()
        armed, armed_for = 0.0, 0.0
        while not self._ended.wait(self._tick):
            now = time.monotonic()
            passed, last = now - last, now
            if self._state is not seen or passed > max(3 * self._tick, self.limit / 5):
                seen, still = self._state, 0.0
            else:
                still += passed
            if still >= self._allowed:
                self._hangs.set()
                self._end(*seen)
            if now - armed > self.limit / 8 or armed_for != self._allowed:
                armed, armed_for = now, self._allowed
                self._arm()

    def _arm(self) -> None:
        """Have the stacks dumped should this thread not come back here in time.

        A library that holds the GIL stops every Python thread; faulthandler's is not one. It is a little faster than
        the other ranks' watchdogs, which then find the stacks.
        """
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.truncate(0)  # of a time that passed
            self._stacks.seek(0)
            faulthandler.dump_traceback_later(0.9 * self._allowed, file=self._stacks)

    def _end(self, phase: str, step: int, since: float) -> None:
        """Tell and end. A disk or a console that hangs itself must not keep this process alive."""
        faulthandler.cancel_dump_traceback_later()
        report = threading.Thread(target=self._report, args=(phase, step, since), name="watchdog report", daemon=True)
        report.start()
        report.join(3 * self.patience + 30)
        os._exit(cli.EXIT_HUNG)

    def _report(self, phase: str, step: int, since: float) -> None:
        told_before = run_dir.read_exit(self.run_dir)
        try:
            self._write(phase, step, since)
        except OSError:  # a full disk: the others take this rank for one that does not answer
            faulthandler.dump_traceback(all_threads=True)
        # Asking the recorder may hang itself, in the driver that all wait for.
        asking = threading.Thread(target=self._add_collectives, name="watchdog recorder", daemon=True)
        asking.start()
        asking.join(RECORDER)
        started = time.monotonic()
        while time.monotonic() - started < self.patience:
            answers = hangs.read(self.run_dir, self.world_size)
            if len(answers) == self.world_size:
                break
            time.sleep(0.1)
        answers.setdefault(self.rank, hangs.Answer(phase, step, since))
        if min(answers) == self.rank:  # rank 0, or whoever comes first where that one is stopped
            self._tell(answers, step)
        else:
            self._wait_until_told(told_before)
        # Into the log as well: the next start sets these files aside, under names with their time. Last, because what
        # hangs may hold the log's lock.
        with contextlib.suppress(OSError):
            log.info("%s", hangs.file(self.run_dir, self.rank).read_text(encoding="utf-8"))

    def _write(self, phase: str, step: int, since: float) -> None:
        path = hangs.file(self.run_dir, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # so that nobody reads half of it
        answer = {"rank": self.rank, "phase": phase, "step": step, "since": since}
        who = {"host": socket.gethostname(), "pid": os.getpid(), "at": f"{hangs.clock(time.time())}"}
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({**answer, **who}) + "\n")
            file.write(
                f"rank {self.rank}: no progress in phase '{phase}' at step {step} since {hangs.clock(since)}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        temporary.replace(path)

    def _add_collectives(self) -> None:
        """Write what this rank is waiting for behind its stacks; a help that may fail in any way."""
        with contextlib.suppress(Exception):
            waiting = hangs.open_collectives()
            with hangs.file(self.run_dir, self.rank).open("a", encoding="utf-8") as file:
                file.write("\ncollectives that have not ended, the newest last:\n")
                file.writelines(f"  {line}\n" for line in waiting or ["none"])

    def _tell(self, answers: dict[int, hangs.Answer], step: int) -> None:
        held = hangs.adopt_held(self.run_dir, self.world_size, answers)
        minutes = self._allowed / 60
        summary = hangs.summary(answers, self.world_size, held)
        reason = f"hang: no progress for {minutes:.3g} min: {summary}; stacks in {hangs.folder(self.run_dir)}"
        run_dir.write_exit(self.run_dir, reason, cli.EXIT_HUNG, step)
        log.error("%s", reason)

    def _wait_until_told(self, before: dict[str, Any] | None) -> None:
        """The launcher ends all ranks when one does, so nobody leaves before exit.json says why."""
        until = time.monotonic() + self.patience + 2
        while time.monotonic() < until:
            told = run_dir.read_exit(self.run_dir)
            if told is not None and told != before and told.get("code") == cli.EXIT_HUNG:
                return
            time.sleep(0.1)
