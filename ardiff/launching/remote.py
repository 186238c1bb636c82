"""A job on many hosts, run from one: a carrier process here for each of them, watched and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO

from ardiff import cli
from ardiff.launching import processes
from ardiff.launching.checks import Hosts
from ardiff.launching.hostfile import Host
from ardiff.launching.job import TICK, End, StopRequest, Tell
from ardiff.launching.node import BEAT_EVERY, SILENCE
from ardiff.launching.records import Asked

GRACE = 15.0  # seconds beyond the patience of the hosts themselves, until they are ended from here
LINGER = 10.0  # seconds for the last words of a carrier whose host has been told to end everything
_WRITING = threading.Lock()


class Share:
    """One host's share of a job, as seen from here."""

    def __init__(self, host: Host, job: str, command: list[str], variables: dict[str, str], first: bytes) -> None:
        """job: the mark of its processes. first: what they read before anything else, empty where they read nothing."""
        self.host = host
        self.job = job
        self.process = subprocess.Popen(
            command if first else processes.with_parent(command),  # else the end of standard input tells it
            env={**os.environ, **variables},
            stdin=subprocess.PIPE if first else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us to pass on
        )
        self.seen = False  # its end
        self._relays = [
            threading.Thread(target=_relay, args=(stream, number, f"{host.name}: ".encode()), daemon=True)
            for stream, number in ((self.process.stdout, 1), (self.process.stderr, 2))
        ]
        for relay in self._relays:
            relay.start()
        self.send(first)

    def send(self, data: bytes) -> None:
        """To standard input, if anybody is there to read."""
        if self.process.stdin is not None:
            with suppress(OSError, ValueError):
                self.process.stdin.write(data)
                self.process.stdin.flush()

    def finish(self, until: float) -> None:
        """Let the last lines through, until that time; then no process is left here."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.monotonic()))
        self.process.kill()
        self.process.wait()
        for relay in self._relays:
            relay.join(max(0.5, until - time.monotonic()))


class RemoteJob:
    """All shares of a job."""

    def __init__(self, hosts: Hosts, shares: Sequence[Share], fail_seconds: float) -> None:
        """fail_seconds: how long the others have to end by themselves, once one host's share has failed."""
        self._hosts = hosts
        self._shares = list(shares)
        self._fail_seconds = fail_seconds
        self.left: list[Share] = []  # what nobody could be asked to end
        self._failed: tuple[str, int, float] | None = None  # the first: what, exit code, when
        self._beaten = 0.0

    def wait(self, stop: StopRequest, stop_seconds: float, in_training: Asked | None, tell: Tell) -> End:
        """Until every host's share has ended, and nothing is left of it as far as can be seen."""
        asked: bool | None = None
        until = float("inf")
        while self._running():
            now = time.monotonic()
            self._beat(now)
            self._notice(tell)
            if stop.number is not None and asked is None:
                asked, until = (in_training is None or in_training()), now + stop_seconds + GRACE
                tell(stop.describe(in_training is not None))
                self._pass_on(stop.number)
            late = self._failed is not None and now > self._failed[2] + self._fail_seconds
            if stop.at_once or late or now > until:
                seconds = self._fail_seconds if late else stop_seconds
                why = "" if stop.at_once else f": not ended within {seconds:g} s"
                tell(f"killing all processes on {', '.join(share.host.name for share in self._running())}{why}")
                return self._end(stop, asked, self.kill(stop, tell), killed=True)
            time.sleep(TICK)
        self._finish()
        self._notice(tell)
        lost = [share for share in self._shares if self._is_lost(share)]
        return self._end(stop, asked, self._clear(lost, tell), killed=False)

    def kill(self, stop: StopRequest, tell: Tell) -> bool:
        """SIGKILL for everything on all hosts; False where processes do not hear it."""
        cleared = self._clear([share for share in self._shares if share.process.poll() != 0], tell)
        self._finish()
        return cleared

    def _finish(self) -> None:
        until = time.monotonic() + LINGER
        for share in self._shares:
            share.finish(until)

    def _running(self) -> list[Share]:
        return [share for share in self._shares if share.process.poll() is None]

    def _is_lost(self, share: Share) -> bool:
        code = share.process.poll()
        return code is not None and (code < 0 or self._hosts.carrier.lost(code))

    def _beat(self, now: float) -> None:
        if now > self._beaten + BEAT_EVERY:
            self._beaten = now
            for share in self._running():
                share.send(b"\n")

    def _notice(self, tell: Tell) -> None:
        """Tell what has ended badly; the first is the reason for the rest."""
        for share in self._shares:
            code = share.process.poll()
            if code is None or share.seen:
                continue
            share.seen = True
            if code != 0:
                lost = self._is_lost(share)
                what = "the connection was lost" if lost else f"ended with {code}"
                code = cli.EXIT_FAILURE if lost else code  # that of the carrier means nothing to others
                if self._failed is None:
                    self._failed = (f"{share.host.name}: {what}", code, time.monotonic())
                    others = [other.host.name for other in self._running()]
                    has = f"; the others have {self._fail_seconds:g} s to end" if others else ""
                    tell(f"{share.host.name}: {what}{has}")
                else:
                    tell(f"{share.host.name}: {what}")

    def _end(self, stop: StopRequest, asked: bool | None, cleared: bool, killed: bool) -> End:
        how, code = (self._failed[0], self._failed[1]) if self._failed else (None, 0)
        unasked = self._failed is not None and stop.number is None
        return End(code, False, asked, not cleared, how, killed, unasked)

    def _pass_on(self, number: int) -> None:
        """From threads: a host may take long to be reached, and others must not wait for it."""
        for share in self._running():
            threading.Thread(target=self._signal, args=(share, number), daemon=True).start()

    def _signal(self, share: Share, number: int) -> None:
        """Until there is somebody there to hear it: the share may only be about to start."""
        while share.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                if self._hosts.ask(share.host, "reach", share.job, str(int(number))).returncode == 0:
                    return
            time.sleep(1.0)

    def _clear(self, shares: Sequence[Share], tell: Tell) -> bool:
        """End all that is left on these hosts, and name what cannot be ended or reached."""
        if not shares:
            return True
        with ThreadPoolExecutor(len(shares)) as pool:
            return all(list(pool.map(lambda share: self._clear_one(share, tell), shares)))

    def _clear_one(self, share: Share, tell: Tell) -> bool:
        name = share.host.name
        alive = end_on(self._hosts, share.host, share.job)
        if alive is None:
            self.left.append(share)
            tell(
                f"{name}: cannot be reached to end what is left there; its ranks stop by themselves "
                f"when they miss the other hosts, or {SILENCE:g} s after the connection was lost"
            )
        elif alive:
            tell(f"{name}: SIGKILL does not end {alive}; a disk or a driver hangs there")
        return not alive


def end_on(hosts: Hosts, host: Host, job: str) -> str | None:
    """SIGKILL for a job's processes on a host: "", the names of those that do not end, or None: it is out of reach."""
    try:
        result = hosts.ask(host, "reach", job, str(int(signal.SIGKILL)), patience=60.0)
    except subprocess.TimeoutExpired:
        return None
    if hosts.carrier.lost(result.returncode):
        return None
    if result.returncode == 0:
        return ""
    return "".join((result.stdout.strip() or result.stderr.strip()).splitlines()[-1:]) or "a process"


def _relay(stream: IO[bytes] | None, number: int, prefix: bytes) -> None:
    """Pass lines on to a stream of this process, whole and with the host's name, to the last byte."""
    assert stream is not None
    heard = True
    for line in stream:
        if heard:
            whole = prefix + line if line.endswith(b"\n") else prefix + line + b"\n"
            with _WRITING:
                heard = _write(number, whole)  # nobody reads us: the job goes on, and its pipe must not fill up


def _write(number: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(number, data) :]
    except OSError:
        return False
    return True
