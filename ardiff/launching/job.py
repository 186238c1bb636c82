"""One start of a job: from its launcher to the end of the last process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from ardiff.launching import processes
from ardiff.launching.processes import Identity
from ardiff.launching.records import Asked
from ardiff.signals import Catcher

TICK = 0.1  # seconds
LOOK_EVERY = 1.0  # seconds between searches for new ranks
LEFTOVERS = 60.0  # seconds that processes which are no ranks have to end after their launcher has
KILL_PATIENCE = 60.0  # seconds until SIGKILL must have worked
AT_LEAST = 2.0  # of these, whatever signals come: an ordinary kill takes a moment

Tell = Callable[[str], None]


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1 while entered, which it may be by several, one within another."""

    def __init__(self) -> None:
        self.number: int | None = None  # the first signal
        self.numbers: frozenset[int] = frozenset()  # all of them
        self.at_once = False  # Ctrl-C a second time
        self.heard = 0  # signals
        self.deadline = float("inf")  # of time.monotonic(): for the processes, where they have less time than usual
        self._catcher = Catcher(self._remember)
        self._entered = 0

    def __enter__(self) -> StopRequest:
        self._entered += 1
        self._catcher.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._catcher.release()

    def _remember(self, number: int) -> None:
        self.at_once = self.at_once or (number == signal.SIGINT and number in self.numbers)
        self.number = self.number or number
        self.numbers |= {number}
        self.heard += 1

    def describe(self, keeps_run: bool) -> str:
        """What is done about it, for people."""
        assert self.number is not None
        then = "the ranks stop after this step, with a checkpoint" if keeps_run else "passed on to all processes"
        return f"{signal.Signals(self.number).name}: {then}"

    def sleep(self, seconds: float) -> bool:
        """Wait so long or until a signal; returns whether there is one."""
        until = time.monotonic() + seconds
        while self.number is None and time.monotonic() < until:
            time.sleep(TICK)
        return self.number is not None


@dataclass(frozen=True)
class End:
    """How a start ended."""

    code: int  # of the launcher, negative: died, or was told to die, by that signal
    orphaned: bool  # the launcher ended before its ranks
    in_training: bool | None  # when it was asked to stop; None: it was not
    outlived: bool = False  # processes are left that do not even hear SIGKILL
    how: str | None = None  # for people, where "the launcher" says too little
    killed: bool = False  # it did not end in time, or the user did not wait
    unasked: bool = False  # a host's share ended badly, or was lost, and no signal had asked the job to stop

    def describe(self) -> str:
        """For a message."""
        code = f"ended with {self.code}" if self.code >= 0 else f"died by signal {-self.code}"
        return self.how or f"the launcher {code}"


class Job:
    """A launcher and all processes below it; they are this process's to signal and to end.

    Signals go to the ranks only; these end by themselves, and then their launchers do. Launchers would answer a signal
    with a mere 30 s for the ranks, and `deepspeed` by leaving them alone.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], is_rank: bool) -> None:
        """is_rank: there is no launcher, the process is the only rank."""
        processes.adopt_orphans()
        self._launcher = subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._is_rank = is_rank
        self._told: set[Identity] = set()
        self._ranks: set[Identity] = set()
        self._orphaned = False

    def wait(self, stop: StopRequest, stop_seconds: float, in_training: Asked | None, tell: Tell) -> End:
        """Until every process has gone.

        stop_seconds: how long ranks have for their last step and checkpoint after a signal. in_training: asked when
        the signal comes; None for programs that keep no run.
        """
        asked: bool | None = None
        asked_at, until, look_at = 0.0, float("inf"), 0.0
        while self._launcher.poll() is None:
            now = time.monotonic()
            if now > look_at:
                look_at = now + LOOK_EVERY
                self._find_ranks()
                processes.reap(os.getpid(), self._launcher.pid)
            self._notice_orphans()
            if stop.number is not None and asked is None:
                asked, asked_at, until = (in_training is None or in_training()), now, now + stop_seconds
                tell(stop.describe(in_training is not None))
            if asked is not None:
                assert stop.number is not None
                self._pass_on(stop.number)
            until = min(until, stop.deadline)
            if stop.at_once or now > until:
                seconds = f": not ended within {until - asked_at:.3g} s"
                tell("killing all processes" + ("" if stop.at_once else seconds))
                ended = self.kill(stop, tell)
                return End(self._code(), self._orphaned, asked, not ended, killed=True)
            time.sleep(TICK)
        self._find_ranks()
        self._notice_orphans()
        ended = self._clear(stop, stop_seconds, tell)
        return End(self._code(), self._orphaned, asked, not ended)

    def kill(self, stop: StopRequest, tell: Tell) -> bool:
        """SIGKILL for all; returns whether they have gone.

        A process that waits for a disk or a driver that hangs hears nothing. It is given up after a minute, or at the
        next signal to this process.
        """
        started, heard = time.monotonic(), stop.heard
        while living := processes.below(os.getpid()):
            for who in living:
                processes.send(who, signal.SIGKILL)
            self._launcher.poll()
            processes.reap(os.getpid(), self._launcher.pid)
            time.sleep(TICK)
            passed = time.monotonic() - started
            if passed > KILL_PATIENCE or (stop.heard > heard and passed > AT_LEAST):
                names = ", ".join(map(processes.describe, living))
                tell(f"given up after {passed:.0f} s: SIGKILL does not end {names}; a disk or a driver hangs there")
                return False
        self._launcher.poll()
        return True

    def _code(self) -> int:
        code = self._launcher.returncode
        return -signal.SIGKILL if code is None else code  # None: it does not hear it

    def _find_ranks(self) -> None:
        living = processes.below(os.getpid())
        self._ranks.update(living[:1] if self._is_rank else processes.ranks(living))

    def _notice_orphans(self) -> None:
        """A launcher collects its ranks before it ends; one that goes on without it has become a child of ours."""
        if not self._is_rank and any(processes.parent(rank) == os.getpid() for rank in self._ranks):
            self._orphaned = True

    def _pass_on(self, number: int) -> None:
        """Once to every rank; where there are none yet, the launchers are still to be stopped from starting any."""
        self._find_ranks()
        for rank in self._ranks:
            if rank not in self._told:
                self._told.add(rank)
                processes.send(rank, number)
        if not self._ranks:
            for who in processes.below(os.getpid()):
                processes.send(who, signal.SIGTERM)

    def _clear(self, stop: StopRequest, stop_seconds: float, tell: Tell) -> bool:
        """Ask what is left to end, then end it; returns whether all have gone.

        Ranks have as long as after a signal: one whose launcher was killed is perhaps writing its checkpoint.
        """
        started = time.monotonic()
        asked: set[Identity] = set()
        while living := processes.below(os.getpid()):
            for who in living:
                if who not in asked | self._told:
                    asked.add(who)
                    processes.send(who, signal.SIGTERM)
            patience = LEFTOVERS if self._ranks.isdisjoint(living) else max(LEFTOVERS, stop_seconds)
            now = time.monotonic()
            if stop.at_once or now > stop.deadline or now - started > patience:
                tell(f"{len(living)} process(es) outlived the launcher and are killed")
                return self.kill(stop, tell)
            processes.reap(os.getpid(), self._launcher.pid)
            time.sleep(TICK)
        processes.reap(os.getpid(), self._launcher.pid)
        return True
