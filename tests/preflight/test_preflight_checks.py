"""Checks that hang, fail or end well, and ranks compared."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ardiff.errors import UserError
from ardiff.preflight.checks import (
    Check,
    Finding,
    Report,
    TooLongError,
    limited,
    ranks_in_words,
    run_check,
)
from ardiff.preflight.comparing import slower_than_most, unlike_most


def context(limit: float = 5.0) -> SimpleNamespace:
    return SimpleNamespace(limit=limit, device=torch.device("cpu"))


def raising(error: Exception):
    def run(_):
        raise error

    return run


def test_a_check_that_hangs_is_a_failure_in_time():
    forever = threading.Event()
    begin = time.monotonic()
    found = run_check(Check("disk", "host", lambda _: forever.wait(60)), context(limit=0.3))
    assert time.monotonic() - begin < 5
    assert found.failures == [
        "disk: no answer within 0.3 s; what it asks (a disk, a driver) hangs: see dmesg and the mounts"
    ]
    forever.set()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("--run_dir x: is not a folder"), "run_dir: --run_dir x: is not a folder"),
        (PermissionError(13, "Permission denied", "/data"), "run_dir: /data: Permission denied"),
        (KeyError("size"), "run_dir: KeyError: 'size'"),
        (RuntimeError("two\nlines"), "run_dir: RuntimeError: two lines"),
    ],
)
def test_whatever_goes_wrong_in_a_check_is_one_line(error, line):
    assert run_check(Check("run_dir", "host", raising(error)), context()).failures == [line]


def test_a_check_is_given_up_with_a_reason():
    forever = threading.Event()
    with pytest.raises(TooLongError, match="another rank has"):
        limited(lambda: forever.wait(60), 30, lambda: "another rank has")
    forever.set()
    assert limited(lambda: 7, 1) == 7


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([0, 1, 2, 3], "ranks 0-3"), ([9, 0, 1, 7], "ranks 0-1, 7, 9")],
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words


def report(rank: int, host: str, **figures: object) -> Report:
    return Report(rank, 0, host, {"all": Finding(dict(figures))})


def test_a_report_survives_its_way_to_rank_0():
    original = report(1, "a", speed=1.5, device=None)
    original.findings["data"] = Finding(failures=["broken"], not_checked="why")
    assert Report.from_json(original.as_json()) == original


def test_the_few_are_unlike_the_many_and_the_tie_goes_to_rank_0():
    reports = [report(0, "a", v="1"), report(1, "b", v="2"), report(2, "c", v="2"), report(3, "d")]
    (remark,) = unlike_most(reports, "v", "the version", "mend it")
    assert remark.ranks == (0,)
    assert remark.text == "the version is 1 here, but 2 on b (rank 1) and 1 more host; mend it"
    (remark,) = unlike_most(reports[:2], "v", "the version", "mend it")
    assert remark.ranks == (1,)
    assert unlike_most(reports[1:3], "v", "the version", "mend it") == []


def test_slower_than_most():
    assert slower_than_most({0: 10.0, 1: 9.0, 2: 4.0, 3: 7.0}, 0.5, 0.8) == (9.0, [2], [3])
    assert slower_than_most({0: 10.0, 1: 4.0}, 0.5, 0.8) == (10.0, [1], [])  # of two, against the faster
    assert slower_than_most({0: 10.0}, 0.5, 0.8) == (10.0, [], [])
    assert slower_than_most({}, 0.5, 0.8) == (0.0, [], [])
