"""Ranks that come, do not come, and fall silent: with a store in memory, one thread for each rank."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ardiff.errors import UserError
from ardiff.preflight import meeting as meetings
from ardiff.preflight.checks import TooLongError
from ardiff.preflight.meeting import Meeting, join


def test_all_come_and_their_reports_are_collected():
    store = dist.HashStore()

    def rank(number: int) -> object:
        meeting = Meeting(store, number, 3)
        hosts = meeting.arrive(f"node{number // 2}", number % 2, 20)
        assert hosts == ["node0", "node0", "node1"]
        assert meeting.gate("begin", 3, 20)
        meeting.post("report", {"rank": number})
        if number:
            return meeting.read("verdict", 20)
        assert meeting.wait_for_all("report", [0, 1, 2], 20) == []
        meeting.publish("verdict", 1)
        return meeting.collect("report")

    with ThreadPoolExecutor(3) as pool:
        reports, *verdicts = pool.map(rank, range(3))
    assert reports == {0: {"rank": 0}, 1: {"rank": 1}, 2: {"rank": 2}}
    assert verdicts == [1, 1]


def test_who_has_not_come_is_known_in_time():
    meeting = Meeting(dist.HashStore(), 0, 2)
    begin = time.monotonic()
    assert meeting.arrive("a", 0, 0.3) == ["a", ""]
    assert not meeting.gate("begin", 2, 0.3)
    assert meeting.wait_for_all("report", [1], 0.3) == [1]
    assert meeting.doing(1) == "has not begun"
    with pytest.raises(TooLongError, match="nothing heard of 'verdict'"):
        meeting.read("verdict", 0.3)
    assert time.monotonic() - begin < 10


def test_a_rank_without_signs_of_life_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(meetings, "SILENT", 0.5)
    monkeypatch.setattr(meetings, "BEAT", 0.05)
    store = dist.HashStore()
    main, other = Meeting(store, 0, 2, store), Meeting(store, 1, 2, store)
    other.enter("shards")
    time.sleep(0.8)
    assert main.doing(1) == "last seen in 'shards'" and main.lost() is None
    other.leave()
    begin = time.monotonic()
    assert main.wait_for_all("done", [1], 30) == [1]
    assert time.monotonic() - begin < 10
    assert main.doing(1).startswith("last seen in 'shards', no sign of life for")
    assert main.lost() == "rank 1: no sign of life any more"
    assert other.lost() is None  # only rank 0 judges
    assert not main.gate("links", 2, 30)
    main.leave()


def test_machines_of_one_name_are_told_apart():
    arrivals = [["localhost", "boot1", 0], ["localhost", "boot2", 0], ["localhost", "boot1", 1]]
    names = meetings._names([json.dumps(arrival) for arrival in arrivals] + [None])
    assert names == ["localhost", "localhost#2", "localhost", ""]


def test_a_rank_0_that_is_not_there_is_named(monkeypatch):
    from ardiff.ports import free_port

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match=r"MASTER_ADDR 127.0.0.1, MASTER_PORT \d+: rank 1 cannot reach it within 1 s"):
        join(1, 2, 1.0)
