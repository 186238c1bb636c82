"""Command lines and mistakes of launch/submit.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff.errors import UserError
from ardiff.launching.command import Launch, free_port, split
from ardiff.launching.orphans import SUPERVISOR

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def submit(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/submit.py", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "nothing to start: put the program behind --"),
        (("launch/train.py", "--run_dir", "x"), "nothing to start: put the program behind --"),
        (("--rank", "2", "--", "launch/train.py", "--run_dir", "x"), "'--rank'; did you mean '--ranks'?"),
        (("--", "launch/train.py", "--config", "tiny"), "has no --run_dir"),
        (("--", "launch/train.py", "--run_dir"), "has no --run_dir"),
        (("--", "launch/train.py"), "has no --run_dir"),
        (("--", "launch/trian.py", "--run_dir", "x"), "launch/trian.py: no such program"),
        (("--ranks", "0", "--", "launch/train.py", "--run_dir", "x"), "--ranks 0: must be at least 1"),
        (("--ranks", "two", "--", "launch/train.py", "--run_dir", "x"), "--ranks two: must be a whole number"),
        (("--launcher", "python", "--ranks", "2", "--", "launch/train.py", "--run_dir", "x"), "starts 1 rank, not 2"),
        (("--launcher", "torchrn", "--", "launch/train.py", "--run_dir", "x"), "did you mean 'torchrun'?"),
        (("--max_restarts", "-1", "--", "launch/train.py", "--run_dir", "x"), "must be at least 0"),
        (("--stop_minutes", "0", "--", "launch/train.py", "--run_dir", "x"), "must be greater than 0"),
    ],
)
def test_mistakes_are_one_line(words, complaint):
    result = submit(*words)
    assert result.returncode == 2, result
    assert complaint in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_launcher_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launcher deepspeed: not found beside"):
        Launch("deepspeed", 2, (TRAIN, "--run_dir", "x"))


def test_a_dry_run_prints_the_command_and_changes_nothing(tmp_path):
    run_dir = tmp_path / "run dir"
    result = submit("--ranks", "2", "--dry_run", "--", "launch/train.py", "--run_dir", str(run_dir), RANK="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("env -u RANK ARDIFF_SUPERVISOR=")
    assert f" -- launch/train.py --run_dir '{run_dir}'\n" in result.stdout and "--nproc_per_node 2" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_a_run_is_alive_is_refused(tmp_path):
    from ardiff.training import run_dir

    handle = run_dir.lock(tmp_path)
    result = submit("--max_restarts", "3", "--", "launch/train.py", "--run_dir", str(tmp_path))
    os.close(handle)
    assert result.returncode == 2 and "another run is writing there" in result.stderr


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("--run_dir", "a"), "a"),
        (("--run_dir=b/c",), "b/c"),
        (("--run_dir", "a", "--config", "tiny", "--run_dir=d"), "d"),
    ],
)
def test_the_run_dir_is_read_from_the_command(words, folder):
    assert Launch("python", 1, (TRAIN, *words)).run_dir == Path(folder)


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_nothing_of_an_outer_rank_gets_in(monkeypatch, launcher):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", SUPERVISOR):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    launch = Launch(launcher, 1, (TRAIN, "--run_dir", "x", "--", "y"))
    ours = launch.environment()
    assert ours["NCCL_DEBUG"] == "INFO" and not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(ours)
    assert ours[SUPERVISOR].startswith(f"{os.getpid()}:")
    assert launch.arguments()[-5:] == [TRAIN, "--run_dir", "x", "--", "y"]


def test_ports_are_free_and_words_are_split_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
    assert split(["--ranks", "2", "--", "a", "--", "b"]) == (["--ranks", "2"], ["a", "--", "b"])
    assert split(["--help"]) == (["--help"], [])
