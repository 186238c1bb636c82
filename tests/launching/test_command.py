"""Command lines and mistakes of launch/submit.py."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching.command import Launch, option, run_dir_of, split
from ardiff.launching.orphans import SUPERVISOR
from ardiff.ports import free_port
from launch import submit as submit_program

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
        (
            ("--ranks", "2", "launch/train.py", "--run_dir", "x"),
            "as in submit.py --ranks 2 -- launch/train.py --run_dir ...",
        ),
        (("--", "--ranks", "2", "launch/train.py"), "--ranks: the first word behind -- is the program"),
        (("--ranks", "2", "--", "launch/sample.py"), "works in one process, not 2; give --launcher python --ranks 1"),
        (("--max_restarts", "1", "--", "launch/preflight.py"), "keeps no run that a restart could go on with"),
        (("--", "-m", "data_tools.extract"), "-m data_tools.extract: no such module here"),
        (("--nodes", "2", "--", "launch/train.py", "--run_dir", "x"), "every node needs --master_addr HOST"),
        (("--nodes", "2", "--node_rank", "2", "--", "launch/train.py", "--run_dir", "x"), "must be from 0 to 1"),
        (("--nodes", "3", "--ranks", "2,2", "--", "launch/train.py", "--run_dir", "x"), "2 numbers for 3 node(s)"),
        (("--master_port", "0", "--", "launch/train.py", "--run_dir", "x"), "--master_port 0: must be from 1 to 65535"),
        (("--spares", "n9", "--", "launch/train.py", "--run_dir", "x"), "--spares: needs --hostfile FILE"),
        (("--hostfile", "setup.py", "--ranks", "2", "--", "launch/train.py"), "cannot be given with --hostfile"),
        (("--hostfile", "setup.py", "--", "launch/train.py", "--run_dir", "x"), "setup.py, line 1: "),
        (("--hostfile", "/nowhere", "--", "launch/train.py", "--run_dir", "x"), "--hostfile /nowhere: No such file"),
        (("--pass_env", "NOT_SET_HERE", "--", "launch/train.py", "--run_dir", "x"), "NOT_SET_HERE: is not set here"),
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
        (("--fail_minutes", "nan", "--", "launch/train.py", "--run_dir", "x"), "must be greater than 0 and finite"),
        (("--host_minutes", "inf", "--", "launch/train.py", "--run_dir", "x"), "must be greater than 0 and finite"),
        (("--min_nodes", "0", "--", "launch/train.py", "--run_dir", "x"), "--min_nodes: needs --hostfile FILE"),
        (
            ("--hostfile", "h", "--node_rank", "0", "--", "launch/train.py", "--run_dir", "x"),
            "--node_rank: cannot be given with --hostfile",
        ),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run(submit_program.main)
    told = capsys.readouterr()
    assert caught.value.code == 2 and told.out == "", told
    assert complaint in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1


def test_a_launcher_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launcher deepspeed: not found beside"):
        Launch("deepspeed", (2,), (TRAIN, "--run_dir", "x"))


def test_a_dry_run_prints_the_command_and_changes_nothing(tmp_path):
    run_dir = tmp_path / "run dir"
    result = submit("--ranks", "2", "--dry_run", "--", "launch/train.py", "--run_dir", str(run_dir), RANK="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("env -u RANK ARDIFF_JOB=... /") and "SUPERVISOR" not in result.stdout
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
    assert Launch("python", (1,), (TRAIN, *words)).run_dir == Path(folder)


@pytest.mark.parametrize("program", ["launch/preflight.py", "launch/profile_throughput.py", "launch/sample.py"])
def test_some_programs_keep_no_run_whatever_they_read(program):
    assert run_dir_of((program, "--run_dir", "x")) is None
    assert run_dir_of(("-m", "data_tools.extract_latents", "--out", "x")) is None
    assert run_dir_of(("other.py", "--run_dir", "x")) == Path("x") and run_dir_of(("other.py",)) is None
    assert option((program, "--a", "1", "--a=2", "--b"), "--a") == "2"


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_nothing_of_an_outer_rank_gets_in(monkeypatch, launcher):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", SUPERVISOR):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    launch = Launch(launcher, (1,), (TRAIN, "--run_dir", "x", "--", "y"))
    ours = launch.environment()
    assert ours["NCCL_DEBUG"] == "INFO" and not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(ours)
    assert ours[SUPERVISOR].startswith(f"{os.getpid()}:")
    assert len(ours["ARDIFF_JOB"]) == 16
    assert launch.arguments(Path())[-5:] == [TRAIN, "--run_dir", "x", "--", "y"]


def several(launcher: str, node_rank: int) -> Launch:
    words = (TRAIN, "--run_dir", "x")
    return Launch(launcher, (2, 1), words, nodes=2, node_rank=node_rank, master_addr="n1", master_port=29501)


def test_each_node_of_several_gets_its_share():
    words = several("torchrun", 1).arguments(Path())[1:]
    assert words[:6] == ["--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "1"]
    assert words[6:] == ["--master_addr", "n1", "--master_port", "29501", "--", TRAIN, "--run_dir", "x"]
    assert several("torchrun", 0).arguments(Path())[6] == "2" and several("torchrun", 0).files() == {}

    launch = several("deepspeed", 1)
    words = launch.arguments(Path("/scratch"))[1:]
    assert words[:5] == ["--hostfile", "/scratch/hostfile", "--no_ssh", "--node_rank", "1"]
    assert words[5:] == ["--master_addr", "n1", "--master_port", "29501", TRAIN, "--run_dir", "x"]
    assert launch.files() == {"hostfile": "node0 slots=2\nnode1 slots=1\n"}
    assert launch.files()["hostfile"] in launch.describe() and launch.world_size == 3


def test_modules_are_programs_too():
    command = ("-m", "data_tools.extract_latents", "--out", "x")
    assert Launch("python", (1,), command).arguments(Path())[1:] == ["-u", *command]
    assert Launch("torchrun", (2,), command).arguments(Path())[-5:] == ["-m", "--", *command[1:]]
    assert Launch("deepspeed", (2,), command).arguments(Path())[-4:] == ["--module", *command[1:]]


def options_of(launcher: str) -> set[str]:
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        return set(get_args_parser()._option_string_actions)
    (folder,) = importlib.util.find_spec("deepspeed").submodule_search_locations  # importing it takes long
    source = (Path(folder) / "launcher" / "runner.py").read_text()
    return set(re.findall(r"[\"'](--?\w+)[\"'],", source.partition("def parse_args")[2].partition("return ")[0]))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_option_exists_in_the_launcher_that_is_installed(launcher):
    launch = several(launcher, 0)
    words = [*launch.arguments(Path()), *Launch(launcher, (1,), launch.command).arguments(Path())]
    words += Launch(launcher, (1,), ("-m", "data_tools.extract_latents")).arguments(Path())
    used = {word for word in words if word.startswith("-") and word not in ("--", "--run_dir")}
    assert len(used) > 5 and used <= options_of(launcher), used - options_of(launcher)


def test_ports_are_free_and_words_are_split_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
    assert split(["--ranks", "2", "--", "a", "--", "b"]) == (["--ranks", "2"], ["a", "--", "b"])
    assert split(["--help"]) == (["--help"], [])
