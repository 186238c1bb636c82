"""A job's shares, as seen from where it was started."""

import os
import signal
from types import SimpleNamespace

import pytest

from ardiff.launching.carriers import Ssh
from ardiff.launching.checks import Hosts
from ardiff.launching.hostfile import Host
from ardiff.launching.job import End, StopRequest
from ardiff.launching.remote import RemoteJob


class Answering(Hosts):
    """Hosts on which nothing is left."""

    def ask(self, host, module, *words, patience=0.0):
        return SimpleNamespace(returncode=0, stdout="", stderr="")


def ended(name: str, code: int) -> SimpleNamespace:
    return SimpleNamespace(
        host=Host(name, 1), job="j", seen=False, process=SimpleNamespace(poll=lambda: code), finish=lambda until: None
    )


@pytest.mark.parametrize(
    ("code", "what", "seen_as"),
    [(255, "the connection was lost", 1), (-9, "the connection was lost", 1), (2, "ended with 2", 2)],
)
def test_a_carriers_own_code_is_not_the_jobs(code, what, seen_as):
    told: list[str] = []
    with StopRequest() as stop:
        job = RemoteJob(Answering(Ssh(), None), [ended("alpha", 0), ended("beta", code)], 1.0)
        end = job.wait(stop, 1.0, None, told.append)
    assert end == End(seen_as, False, None, how=f"beta: {what}", unasked=True) and told == [f"beta: {what}"]


def test_a_signal_to_a_program_without_a_run_promises_no_checkpoint():
    stop = StopRequest()
    with stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.describe(keeps_run=False) == "SIGUSR1: passed on to all processes"
        assert stop.describe(keeps_run=True) == "SIGUSR1: the ranks stop after this step, with a checkpoint"
        end = RemoteJob(Answering(Ssh(), None), [ended("alpha", 1)], 1.0).wait(stop, 1.0, None, lambda _: None)
    assert end.unasked is False
