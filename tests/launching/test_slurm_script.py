"""The batch script of launch/submit.py --slurm as text, and handing it to SLURM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launch.submit
from ardiff.errors import UserError
from ardiff.launching import sbatch, slurm
from ardiff.launching.allocation import Srun
from ardiff.training.run_dir import is_ours

ROOT = Path(__file__).resolve().parents[2]
BASIC = ("--slurm", "--nodes", "2", "--ranks", "8", "--time_limit", "24:00:00")
JOB = ("--", "launch/train.py", "--run_dir")
# Answers as sbatch does, and notes its words and variables beside itself.
FAKE = """#!/bin/sh
cd "$(dirname "$0")"
printf '%s\\n' "$@" > words
env > variables
test -f refuse && { echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1; }
echo "Welcome to the cluster"
echo "4711;gpu"
"""


def submit(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/submit.py", *words]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_"))}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**variables, **(env or {})}
    )


def options_of(text: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if "#SBATCH --" in line]
    return {name: value for name, _, value in found}


def request(**more) -> sbatch.Request:
    return sbatch.Request(**{"nodes": 2, "time_limit": "24:00:00", "gpus_per_node": 8, **more})


def script(wanted: sbatch.Request, words=("python", "x.py"), log="/runs/sky/logs/slurm-%j.log", **exports) -> str:
    return sbatch.script(wanted, "sky", Path(log), Path("/project"), exports, words)


@pytest.fixture
def fake(tmp_path) -> Path:
    folder = tmp_path / "bin of slurm"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(FAKE)
    program.chmod(0o755)
    return folder


def test_a_dry_run_shows_the_script_and_changes_nothing(tmp_path):
    run_dir = tmp_path / "my sky"
    result = submit(
        *BASIC, "--max_restarts", "3", "--max_requeues", "9", "--dry_run", *JOB, str(run_dir), "--a.b", "$x"
    )
    assert result.returncode == 0, result.stderr
    assert options_of(result.stdout) == {
        **{"job-name": "my_sky", "nodes": "2", "ntasks-per-node": "1", "time": "24:00:00", "exclusive": "", "mem": "0"},
        **{"gpus-per-node": "8", "signal": "B:USR1@600", "requeue": "", "open-mode": "append", "export": "NONE"},
        **{"propagate": "NONE", "output": f'"{run_dir}/logs/slurm-%j.log"'},
    }
    (last,) = [line for line in result.stdout.splitlines() if line.startswith("exec ")]
    assert f"-u {ROOT}/launch/submit.py --carrier srun --launcher torchrun --ranks 8 --max_restarts 3" in last
    assert "--max_requeues 9" in last and "--stop_minutes 9.5 --" in last
    assert last.endswith(f"-- launch/train.py --run_dir '{run_dir}' --a.b '$x'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "has", "lacks"),
    [
        ({"cpus_per_node": 16}, ["--cpus-per-task=16"], ["--exclusive", "--mem=0"]),
        ({"gpus_per_node": 0}, ["--exclusive"], ["--gpus-per-node"]),
        ({"extra": ("--gres=gpu:a800:8",)}, ["--gres=gpu:a800:8"], ["--gpus-per-node"]),
        ({"extra": ("-J", "my job", "--mem=200G")}, ['-J "my job" --mem=200G'], ["--job-name", "--mem=0"]),
        ({"partition": "a,b", "account": "lab", "qos": "high"}, ["--partition=a,b", "--account=lab", "--qos=high"], []),
        ({"time_limit": "00:20:00"}, ["--signal=B:USR1@300", "--time=00:20:00"], []),
        ({"time_limit": "2-00:00:00", "signal_minutes": 30}, ["--signal=B:USR1@1800", "--time=2-00:00:00"], []),
    ],
)
def test_settings_become_options(more, has, lacks):
    text = script(request(**more))
    lines = "\n".join(line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH "))
    assert all(option in lines for option in has), text
    assert not [option for option in lacks if option in lines], text


@pytest.mark.parametrize(("signal_minutes", "stop"), [(None, 570.0), (1.0, 30.0), (0.5, 15.0), (30.0, 1770.0)])
def test_ranks_end_before_the_time_limit(signal_minutes, stop):
    assert request(signal_minutes=signal_minutes).stop_seconds == stop


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="SLURM is not installed (package slurm-wlm)")
def test_every_option_is_one_of_the_installed_slurm(tmp_path):
    """With --version behind them options are only read; --help names too few of them."""
    settings = tmp_path / "slurm.conf"  # nothing is done without one
    nodes = "NodeName=localhost CPUs=1\nPartitionName=all Nodes=ALL Default=YES\n"
    settings.write_text(f"ClusterName=x\nSlurmctldHost=localhost\n{nodes}")
    texts = script(request(cpus_per_node=4, partition="a", account="b", qos="c")), script(request())
    lines = [line.removeprefix("#SBATCH ") for text in texts for line in text.splitlines() if "#SBATCH --" in line]
    srun = Srun("8", True).command("node1", "x")
    commands = [
        ["sbatch", "--parsable", *lines],
        srun[: srun.index("sh")],
        ["scancel", "--signal=TERM", "--batch"],
        ["squeue", "--jobs=1"],
    ]
    for words, code in [*((words, 0) for words in commands), (["sbatch", "--no-such-option"], 255)]:
        variables = {**os.environ, "SLURM_CONF": str(settings)}
        done = subprocess.run([*words, "--version"], env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == code, done


def test_paths_and_words_are_kept_whatever_is_in_them(tmp_path, fake):
    """The body of the script runs as bash would run it, with a program that prints where it is and what it got."""
    hostile = tmp_path / "we ird \"q\" 'a' $HOME `id` #x ünï&;*"
    hostile.mkdir()
    words = [sys.executable, "-c", "import os, sys; print([os.getcwd(), os.environ['A B' [::2]], *sys.argv[1:]])"]
    argument = "a\n'b' \"c\" $(id) \\ *"
    text = sbatch.script(request(), "x", hostile / "slurm-%j.log", hostile, {"AB": "1 '2' $3"}, [*words, argument])
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[str(hostile), '1 ' + repr('2') + ' $3', argument]}\n"
    (output,) = [line for line in text.splitlines() if "--output" in line]
    assert output.endswith('we ird \\"q\\" \'a\' $HOME `id` #x ünï&;*/slurm-%j.log"')


@pytest.mark.parametrize(
    ("log", "words", "complaint"),
    [
        ("/runs/50%/slurm-%j.log", ("x",), "SLURM replaces % and"),
        ("/runs/a\\b/slurm-%j.log", ("x",), "SLURM replaces % and"),
        ("/runs/a\nb/slurm-%j.log", ("x",), "a line break"),
        ("/runs/sky/slurm-%j.log", ("x", "a\r\n"), "cannot hold this character"),
    ],
)
def test_what_a_script_cannot_hold_is_refused(log, words, complaint):
    with pytest.raises(UserError, match=complaint):
        script(request(), words, log)


def test_a_job_is_submitted_with_nothing_of_the_shell(tmp_path, fake):
    run_dir = tmp_path / "sky"
    secrets = tmp_path / "secrets"
    secrets.write_text("WANDB_API_KEY=hidden\n")
    secrets.chmod(0o600)
    variables = {
        **{"PATH": f"{fake}{os.pathsep}{os.environ['PATH']}", "NCCL_DEBUG": "a 'b'", "OTHER": "1", "SLURM_CONF": "c"},
        **{"SBATCH_PARTITION": "mine", "SBATCH_EXPORT": "ALL", "SBATCH_NO_REQUEUE": "1", "SLURM_JOB_ID": "7"},
    }
    result = submit(*BASIC, "--env_file", str(secrets), *JOB, str(run_dir), env=variables)
    assert result.returncode == 0, result.stderr
    path = run_dir / "logs" / "slurm.sh"
    assert (fake / "words").read_text().split() == ["--parsable", str(path)]
    assert path.stat().st_mode & 0o777 == 0o700
    text = path.read_text()
    assert "export NCCL_DEBUG='a '\"'\"'b'\"'\"''\n" in text and f"--env_file {secrets}" in text
    assert f"export PATH=\"$PATH\":'{fake}'" in text
    assert "OTHER" not in text and "hidden" not in text + result.stdout
    passed = (fake / "variables").read_text().splitlines()
    assert {"SBATCH_PARTITION=mine", "SLURM_CONF=c"} <= set(passed)
    assert not [line for line in passed if line.startswith(("SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SLURM_JOB_ID"))]
    for expected in (
        "job 4711 ",
        f"tail -F {run_dir}/logs/slurm-4711.log",
        "scancel --signal=TERM --batch 4711",
        "squeue --jobs=4711",
    ):
        assert expected in result.stdout
    assert is_ours(run_dir)  # the training finds it as good as empty


def test_where_the_script_is_kept_can_be_chosen_and_a_refusal_is_one_line(tmp_path, fake):
    (fake / "refuse").touch()
    path = tmp_path / "job.sh"
    variables = {"PATH": f"{fake}{os.pathsep}{os.environ['PATH']}"}
    result = submit(*BASIC, "--script", str(path), *JOB, str(tmp_path / "run"), env=variables)
    assert result.returncode == 2 and path.is_file()
    assert result.stderr == (
        f"error: sbatch refused {path}: sbatch: error: Batch job submission failed: Invalid account\n"
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--slurm", "--ranks", "8", "--time_limit", "24:00:00"), "--slurm: needs --nodes too"),
        (("--slurm", "--nodes", "2", "--time_limit", "24:00:00"), "--slurm: needs --ranks too"),
        (("--slurm", "--nodes", "2", "--ranks", "8"), "--slurm: needs --time_limit too"),
        (("--time_limit", "24:00:00"), "--time_limit: needs --slurm"),
        (("--script", "x"), "--script: needs --slurm"),
        (("--max_requeues", "2"), "--max_requeues: needs --slurm"),
        ((*BASIC, "--hostfile", "hosts"), "--hostfile: cannot be given with --slurm"),
        ((*BASIC, "--spares", "n3"), "--spares: cannot be given with --slurm"),
        ((*BASIC, "--node_rank", "0"), "--node_rank: cannot be given with --slurm"),
        ((*BASIC, "--time_limit", "90"), "--time_limit 90: must be HH:MM:SS or D-HH:MM:SS, as in 24:00:00"),
        ((*BASIC, "--time_limit", "1:30"), "--time_limit 1:30: must be HH:MM:SS"),
        ((*BASIC, "--time_limit", "00:00:00"), "--time_limit 00:00:00: must be HH:MM:SS"),
        ((*BASIC, "--time_limit", "01:60:00"), "--time_limit 01:60:00: must be HH:MM:SS"),
        ((*BASIC, "--ranks", "8,4"), "--ranks 8,4: must be a whole number with --slurm"),
        ((*BASIC, "--nodes", "0"), "--nodes 0: must be at least 1"),
        ((*BASIC, "--gpus_per_node", "-1"), "--gpus_per_node -1: must be at least 0"),
        ((*BASIC, "--cpus_per_node", "0"), "--cpus_per_node 0: must be at least 1"),
        ((*BASIC, "--max_requeues", "-1"), "--max_requeues -1: must be at least 0"),
        ((*BASIC, "--signal_minutes", "1440"), "--signal_minutes 1440: must be less than the --time_limit"),
        ((*BASIC, "--signal_minutes", "0"), "--signal_minutes 0: must be less than the --time_limit, and more than 0"),
        ((*BASIC, "--time_limit", "9-00:00:00", "--signal_minutes", "2000"), "SLURM takes at most 1092"),
        ((*BASIC, "--stop_minutes", "20"), "--stop_minutes 20: the time limit comes 10 min after the signal"),
        ((*BASIC, "--partition", "a b"), "--partition 'a b': is no name of SLURM's"),
        ((*BASIC, "--slurm_args", "--nodes=4"), "--slurm_args --nodes: give --nodes instead"),
        ((*BASIC, "--slurm_args", "-p debug"), "--slurm_args --partition: give --partition instead"),
        ((*BASIC, "--slurm_args", "--export=ALL"), "--slurm_args --export: is set by this program"),
        ((*BASIC, "--slurm_args", "-n16"), "--slurm_args --ntasks: is set by this program"),
        ((*BASIC, "--slurm_args", "--comment='a"), "--slurm_args --comment='a: No closing quotation"),
        ((*BASIC, "--env_file", "no-such-file"), "--env_file no-such-file: No such file"),
        ((*BASIC, "--pass_env", "NOT_SET_HERE"), "--pass_env NOT_SET_HERE: is not set here"),
        ((*BASIC, "--pass_env", "WANDB_API_KEY"), "WANDB_API_KEY: looks like a secret, and SLURM keeps batch scripts"),
        ((*BASIC, "--signal_minutes", "nan"), "--signal_minutes nan: must be a number"),
        ((*BASIC, "--signal_minutes", "inf"), "--signal_minutes inf: must be a number"),
        ((*BASIC, "--launcher", "python"), "--launcher python: starts one process"),
        ((*BASIC, "--min_nodes", "9"), "--min_nodes 9: must be from 1 to 2, the number of hosts"),
        ((*BASIC, "--min_nodes", "0"), "--min_nodes 0: must be from 1 to 2"),
        ((*BASIC, "--host_minutes", "2"), "--host_minutes: cannot be given with --slurm"),
        (("--carrier", "srun", "--host_minutes", "2"), "--host_minutes: cannot be given with --carrier srun"),
        (BASIC, "--slurm: sbatch is not in PATH"),
        (("--carrier", "srun", "--ranks", "8"), "--carrier srun: this is not inside a SLURM job; --slurm submits one"),
        (("--carrier", "srun", "--spares", "n3"), "--spares: cannot be given with --carrier srun"),
        (("--carrier", "srun", "--hostfile", "hosts"), "--hostfile: cannot be given with --carrier srun"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *words, *JOB, str(tmp_path / "run")])
    with pytest.raises(UserError) as raised:
        launch.submit.main()
    message = str(raised.value)
    assert complaint in message and "\n" not in message and "hidden" not in message


PUBLIC = (
    "/data/latents-{000000..000127}.tar",
    "https://host/latents",
    "s3://bucket/latents",
    "abfs://container@account/path",
    "[{shards: sky, weight: 3}, {shards: s3://bucket/pets}]",
    "--data.shards=https://host:8080/a,b",
)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--data.shards", "https://user:hidden@host/x"), "https://host/x"),
        (("--data.shards=https://hidden@host/x",), "https://host/x"),
        (("--data.validation", "https://host/x?sig=hidden"), "https://host/x"),
        (("--data.mixture", "[{shards: sky}, {shards: 's3://key:hid,den@bucket/x'}]"), "s3://bucket/x"),
        (("--data.mixture", "[{shards: https://a/b},{shards: https://u:hidden@host/x}]"), "https://host/x"),
    ],
)
def test_passwords_of_urls_are_not_stored(tmp_path, monkeypatch, words, shown):
    """SLURM keeps the script for everybody who may see the job, and the run for everybody who may read it."""
    monkeypatch.chdir(ROOT)
    options = slurm_options("--dry_run")
    run = ("launch/train.py", "--run_dir", str(tmp_path / "run"))
    assert "s3://bucket/pets" in slurm.prepare(options, [*run, *PUBLIC], ROOT).text
    with pytest.raises(UserError) as raised:
        slurm.run(options, [*run, *words], print)
    message = str(raised.value)
    assert f"the command: {shown}" in message and "hidden" not in message and "--env_file" in message
    monkeypatch.setenv("A_PROXY", "http://user:hidden@proxy")
    with pytest.raises(UserError, match="A_PROXY: http://proxy comes with a password"):
        slurm.prepare(slurm_options("--pass_env", "A_PROXY"), run, ROOT)
    assert list(tmp_path.iterdir()) == []


def slurm_options(*words: str):
    return launch.submit._parser().parse_args([*BASIC, *words])


def test_what_has_no_preflight_is_not_submitted_with_one():
    with pytest.raises(UserError, match=r"--preflight: checks what launch/train.py and train_vae.py need"):
        slurm.prepare(slurm_options("--preflight"), ["launch/profile_throughput.py"], ROOT)
    assert (
        "--preflight" in slurm.prepare(slurm_options("--preflight"), ["launch/train.py", "--run_dir", "x"], ROOT).text
    )
