"""What the programs share: claimed folders, leftovers of killed runs, progress in a log."""

import os
import platform
import re

import pytest

from ardiff.errors import UserError
from ardiff.files import remove_leftovers
from data_tools.common import claim_folder, require
from data_tools.sharding import progress
from data_tools.sharding.progress import Progress


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, but its parent has not taken note
    names = {
        f".a.tar.tmp.{platform.node()}.{child}": False,
        f".a.tar.tmp.{platform.node()}.999999999": False,
        f".a.tar.tmp.{platform.node()}.{os.getpid()}": False,  # of an earlier process with this id: we write nothing
        f".a.tar.tmp.{platform.node()}.{os.getppid()}": True,
        f".a.tar.tmp.{platform.node()}x.999999999": True,  # another machine
        "a.tar": True,
    }
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, own=True)
    os.waitpid(child, 0)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


def test_a_folder_is_claimed_once(tmp_path):
    calls = []

    def derive() -> dict[str, int]:
        calls.append(1)
        return {"bytes": len(calls)}

    assert claim_folder(tmp_path, {"size": 1}, "*.tar", derive) == {"bytes": 1}
    assert claim_folder(tmp_path, {"size": 2}, "*.tar", derive) == {"bytes": 2}  # nothing was made with the first
    (tmp_path / "a.tar").touch()
    assert claim_folder(tmp_path, {"size": 2}, "*.tar", derive) == {"bytes": 2}
    assert len(calls) == 2
    with pytest.raises(UserError, match=r"results of other settings \(size 2 -> 1\); choose another --out"):
        claim_folder(tmp_path, {"size": 1}, "*.tar", derive)
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(UserError, match=r"settings\.json: cannot be read"):
        claim_folder(tmp_path, {"size": 2}, "*.tar", derive)


@pytest.mark.parametrize("value", [0, 11, float("nan")])
def test_limits(value):
    with pytest.raises(UserError, match=r"--x .*: must be between 1 and 10"):
        require("--x", value, 1, 10)


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    counted = Progress(total=1000, done=200)
    for _ in range(100):
        clock[0] += 1
        counted.add(4)
    counted.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"324 of 1000 frames, 4.0 frames/s, 02:49 left", lines[0])
    Progress(total=5, shown=False).add(5)
    assert capsys.readouterr().err == ""


def test_a_folder_of_another_program_is_left_alone(tmp_path):
    claim_folder(tmp_path, {"size": 1, "seed": 2}, results="*.mp4")
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(UserError, match="was set up by another program"):
        claim_folder(tmp_path, {"size": 1, "stride": 2}, results="*.tar")
    assert (tmp_path / "settings.json").read_bytes() == before
    claim_folder(tmp_path, {"size": 3, "seed": 2}, results="*.mp4")  # nothing was made with the first ones
