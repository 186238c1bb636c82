"""Signals are heard while they are listened to, and then are whose they were."""

import os
import signal
import subprocess
import sys

from ardiff.launching.job import StopRequest
from ardiff.signals import SIGNALS, Catcher
from ardiff.training.stop import StopSignal


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_signals_are_caught_and_given_back():
    before, heard = handlers(), []
    catcher = Catcher(heard.append)
    catcher.listen()
    catcher.listen()  # changes nothing: release still gives back what was there first
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert heard == list(SIGNALS)
    catcher.release()
    assert handlers() == before
    catcher.release()
    assert handlers() == before


def test_a_rank_and_a_supervisor_listen_alike():
    before, stop = handlers(), StopSignal()
    assert stop.reason is None
    stop.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    stop.release()
    assert stop.reason == "SIGUSR1" and handlers() == before
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.number, request.at_once, request.heard) == (signal.SIGINT, False, 1)
        os.kill(os.getpid(), signal.SIGINT)
        assert (request.at_once, request.heard) == (True, 2)
    assert handlers() == before


def test_ctrl_c_twice_is_at_once_whatever_came_before():
    with StopRequest() as request:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert not request.at_once
        os.kill(os.getpid(), signal.SIGINT)
        assert request.at_once and request.number == signal.SIGTERM and request.numbers == set(SIGNALS)


def test_whoever_asked_first_still_hears_when_another_has_left():
    before = handlers()
    with StopRequest() as request:
        with request:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.numbers == {signal.SIGUSR1, signal.SIGTERM}
    assert handlers() == before


def test_a_supervisor_does_not_wait_for_torch():
    program = "import sys, ardiff.launching.supervisor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
