"""What the programs share: claimed folders, leftovers of killed runs, progress in a log."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff.errors import UserError
from ardiff.files import remove_leftovers
from data_tools import common, extract_latents, inspect_shards, make_demo_corpus, scan_videos, shard_videos
from data_tools.common import alone, claim_folder, plural, require
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


REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from data_tools.common import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def start_holder(folder: Path) -> subprocess.Popen:
    """Another program at work in a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_one_program_at_a_time_fills_a_folder(tmp_path, monkeypatch):
    process = start_holder(tmp_path)
    monkeypatch.setattr(common, "LOCK_PATIENCE", 0.1)
    try:
        with pytest.raises(UserError, match=r"--out .*: another program is writing there"), alone(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
        with alone(tmp_path / "other"):
            assert (tmp_path / "other" / ".lock").exists()
        assert not (tmp_path / "other" / ".lock").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert (tmp_path / ".lock").exists()  # what a killed program leaves is harmless
    with alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_a_lock_is_waited_for_a_moment(tmp_path):
    process = start_holder(tmp_path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    with alone(tmp_path):
        assert process.wait() == -signal.SIGKILL
    killer.wait()
    process.communicate()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common, "hold", refuse)
    with alone(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_every_program_that_fills_a_folder_is_alone_there(tmp_path, monkeypatch):
    from data_helpers import write_latents
    from test_extract_latents import make_arvae

    monkeypatch.setattr(common, "LOCK_PATIENCE", 0.0)
    make_demo_corpus.main(["--out", str(tmp_path / "v"), "--num_videos", "1", "--num_frames", "2", "--size", "16"])
    corpus = str(tmp_path / "c.jsonl")
    assert scan_videos.main([str(tmp_path / "v"), "--out", corpus, "--validation_fraction", "0"]) == 0
    write_latents(tmp_path / "latents")
    arvae = str(make_arvae(tmp_path / "arvae"))
    busy = str(tmp_path / "busy")
    commands = (
        (make_demo_corpus, ["--out", busy], busy),
        (scan_videos, [str(tmp_path / "v"), "--out", corpus], corpus),
        (shard_videos, ["--corpus", corpus, "--out", busy], busy),
        (extract_latents, ["--corpus", corpus, "--arvae", arvae, "--out", busy], busy),
        (inspect_shards, ["repair", str(tmp_path / "latents"), "--out", busy], busy),
    )
    with alone(tmp_path / "busy"), alone(Path(corpus), tmp_path / ".c.jsonl.lock"):
        for program, words, out in commands:
            with pytest.raises(UserError, match=f"--out {re.escape(out)}: another program is writing there"):
                program.main(words)
    assert list((tmp_path / "busy").iterdir()) == []


def test_numbers_and_what_they_count():
    assert [plural(count, "shard") for count in (0, 1, 2, 1000)] == ["0 shards", "1 shard", "2 shards", "1,000 shards"]
