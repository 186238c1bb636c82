"""How the ranks of a preflight talk before, beside and after collectives: through the launcher's key-value store.

Nothing here waits without a limit, and every rank says what it is doing and that it is alive. So rank 0 can name who
has not come, who hangs and where, and the others need not wait for it.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ardiff.errors import UserError
from ardiff.preflight.checks import TooLongError, limited, ranks_in_words

TICK, SELDOM = 0.02, 0.25  # seconds between looks: at first, and in the end
BEAT = 1.0  # seconds between signs of life
SILENT = 15.0  # seconds without one, after which a rank is taken for dead or cut off
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Meeting:
    """The ranks that have come, and their messages.

    store: shared by all ranks. beats: a second connection to it, for signs of life while the first is busy.
    """

    def __init__(self, store: Any, rank: int, size: int, beats: Any = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._beats, self._ended = beats, threading.Event()
        self._doing = "starting"
        self._heard: dict[int, tuple[bytes, float]] = {}  # the last sign of life, and when it was new to us
        if beats is not None:
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    @property
    def is_main(self) -> bool:
        """True on the rank that collects and reports."""
        return self.rank == 0

    def enter(self, doing: str) -> None:
        """Say what this rank does now."""
        self._doing = doing
        self._set(f"doing/{self.rank}", doing)

    def arrive(self, host: str, local_rank: int, limit: float) -> list[str]:
        """Come, and wait for the others; returns the host of every rank, "" of those that have not come in time.

        Hosts of one name that are not the same machine are told apart by a number.
        """
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
        self._set(f"arrived/{self.rank}", json.dumps([host, boot, local_rank]))
        self.enter("waiting for the other ranks")
        if self.is_main:
            self.wait(lambda: not self._absent("arrived"), limit)
            self._set("hosts", json.dumps(_names([self._get(f"arrived/{rank}") for rank in range(self.size)])))
        elif not self.wait(lambda: self.has("hosts"), 2 * limit):
            raise UserError(f"rank 0 has not begun within {2 * limit:g} s: see its output, or raise --timeout")
        return json.loads(self._get("hosts") or "[]")

    def post(self, name: str, value: Any) -> None:
        """Leave something for rank 0, which is replaced by a later one."""
        self._set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str) -> dict[int, Any]:
        """What the ranks have left under that name, as far as they have."""
        found = {rank: self._get(f"{name}/{rank}") for rank in range(self.size)}
        return {rank: json.loads(value) for rank, value in found.items() if value is not None}

    def wait_for_all(self, name: str, ranks: Sequence[int], limit: float) -> list[int]:
        """Rank 0: until these ranks have left something under that name; returns those that have not in time, or that
        give no sign of life any more.
        """
        missing = list(ranks)

        def done() -> bool:
            missing[:] = [rank for rank in missing if not self.has(f"{name}/{rank}")]
            return all(rank in self._silent(ranks) for rank in missing)

        self.wait(done, limit)
        return missing

    def doing(self, rank: int) -> str:
        """What a rank did when it last said so, and whether it still gives signs of life."""
        words = self._get(f"doing/{rank}")
        text = "has not begun" if words is None else f"last seen in '{words}'"
        silent = self._silent([rank])
        return f"{text}, no sign of life for {silent[rank]:.0f} s" if rank in silent else text

    def publish(self, name: str, value: Any) -> None:
        """Leave something for all ranks."""
        self._set(name, json.dumps(value))

    def read(self, name: str, limit: float) -> Any:
        """What a rank has published under that name. Raises TooLongError where nothing is there in time."""
        if not self.wait(lambda: self.has(name), limit):
            raise TooLongError(f"nothing heard of '{name}' within {limit:g} s")
        return json.loads(self._get(name) or "null")

    def has(self, name: str) -> bool:
        """Whether anything has been left under that name."""
        return bool(self.store.check([name]))

    def gate(self, name: str, count: int, limit: float) -> bool:
        """Wait for so many ranks to come to the same point; False if they do not in time, or one is lost."""
        self.store.add(f"gate/{name}", 1)
        come = False

        def settled() -> bool:
            nonlocal come
            come = self.store.add(f"gate/{name}", 0) >= count
            return come or self.lost() is not None

        self.wait(settled, limit)
        return come

    def lost(self) -> str | None:
        """On rank 0: which ranks give no sign of life any more, in words; None on others, and where all do."""
        silent = self._silent(range(self.size)) if self.is_main else {}
        return f"{ranks_in_words(list(silent))}: no sign of life any more" if silent else None

    def wait(self, done: Callable[[], bool], limit: float) -> bool:
        """Look again and again, at most so many seconds; returns whether it was so."""
        begin = time.monotonic()
        while not done():
            passed = time.monotonic() - begin
            if passed > limit:
                return False
            time.sleep(min(SELDOM, TICK + passed / 10))  # hundreds of ranks ask one store
        return True

    def leave(self) -> None:
        """No more signs of life from here."""
        self._ended.set()

    def _absent(self, name: str) -> list[int]:
        return [rank for rank in range(self.size) if not self.has(f"{name}/{rank}")]

    def _silent(self, ranks: Sequence[int]) -> dict[int, float]:
        """Ranks that have given no sign of life for long, and for how many seconds."""
        now, found = time.monotonic(), {}
        for rank in ranks:
            beat = (self._get(f"beat/{rank}") or "").encode()
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = (beat, now)
            silence = now - self._heard[rank][1]
            if silence > SILENT:
                found[rank] = silence
        return found

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            with suppress(Exception):  # the store goes when rank 0 does
                self._beats.set(f"beat/{self.rank}", str(number))

    def _set(self, name: str, value: str) -> None:
        self.store.set(name, value)

    def _get(self, name: str) -> str | None:
        return self.store.get(name).decode() if self.store.check([name]) else None


def join(rank: int, size: int, limit: float) -> Meeting:
    """Reach the store that the launcher's variables (MASTER_ADDR, MASTER_PORT) name; rank 0 keeps it, unless torchrun
    does. Raises UserError where that does not work in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def connect(keeps: bool) -> Any:
        patience = datetime.timedelta(seconds=limit)
        store = dist.TCPStore(address, port, None, keeps, patience, wait_for_workers=False, multi_tenant=True)
        return dist.PrefixStore(f"ardiff/preflight/{start}", store)

    try:
        shared = limited(lambda: connect(keeps), limit + 5)
        beats = limited(lambda: connect(False), limit + 5)
    except (TooLongError, RuntimeError) as error:
        if keeps:
            text = "cannot listen there; free the port, or give the launcher another (--master_port)"
        else:
            text = f"rank {rank} cannot reach it within {limit:g} s: is rank 0 started there, is a firewall between?"
        raise UserError(f"MASTER_ADDR {address}, MASTER_PORT {port}: {text} ({_first_line(error)})") from error
    return Meeting(shared, rank, size, beats)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _names(arrivals: Sequence[str | None]) -> list[str]:
    """The host of each rank by name; "" for those that have not come."""
    known: dict[tuple[str, str], str] = {}
    names: list[str] = []
    for arrival in arrivals:
        if arrival is None:
            names.append("")
            continue
        host, boot, _ = json.loads(arrival)
        if (host, boot) not in known:
            same = sum(1 for other, _ in known if other == host)
            known[host, boot] = host if same == 0 else f"{host}#{same + 1}"
        names.append(known[host, boot])
    return names
