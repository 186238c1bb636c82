"""Mistakes in a command line: one clear line with the nearest option that exists, and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff import cli
from ardiff.errors import EchoedError, UserError
from data_tools import extract_latents, inspect_shards, make_demo_corpus, scan_videos, shard_videos

REPOSITORY = Path(__file__).resolve().parents[2]
GIVEN = ["--corpus", "c", "--out", "o"]


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (shard_videos, [*GIVEN, "--sise", "64"], "unknown option '--sise'; did you mean '--size'?"),
        (shard_videos, [*GIVEN, "--sise=64"], "unknown option '--sise'; did you mean '--size'?"),
        (shard_videos, [*GIVEN, "--qual", "3"], "unknown option '--qual'; did you mean '--quality'?"),
        (shard_videos, [*GIVEN, "--zzz"], "unknown option '--zzz'; see --help"),
        (shard_videos, ["--corpsu", "c", "--out", "o"], "unknown option '--corpsu'; did you mean '--corpus'?"),
        (shard_videos, [*GIVEN, "x"], "unexpected argument 'x'; see --help"),
        (shard_videos, [*GIVEN, "--fps"], "--fps: needs a value, as in '--fps X'; see --help"),
        (shard_videos, [*GIVEN, "--size", "big"], "--size big: must be a whole number"),
        (shard_videos, [*GIVEN, "--size", "two\nlines"], "--size two\\nlines: must be a whole number"),
        (shard_videos, [*GIVEN, "--shard_mb", "big"], "--shard_mb big: must be a number"),
        (shard_videos, [*GIVEN, "--size", "-5.5"], "--size -5.5: must be a whole number"),
        (
            shard_videos,
            [*GIVEN, "--format", "wepb"],
            "--format wepb: must be one of jpg, png, webp; did you mean 'webp'?",
        ),
        (shard_videos, [*GIVEN, "--fps", "8", "--stride", "2"], "--fps and --stride: only one of them can be given"),
        (
            shard_videos,
            [*GIVEN, "--format", "png", "--quality", "9"],
            "--quality 9: is for jpg and webp; png is lossless, so leave it out",
        ),
        (
            shard_videos,
            [],
            "missing --corpus FILE (made by scan_videos) and --out DIR (folder for the shards); see --help",
        ),
        (make_demo_corpus, ["--out", "o", "--num-videos", "3"], "did you mean '--num_videos'?"),
        (scan_videos, ["--out", "o"], "missing INPUT (folders, videos, frame folders, lists"),
        (scan_videos, ["a", "--out", "o", "b", "--gruop", "x"], "unknown option '--gruop'; did you mean '--group'?"),
        (inspect_shards, ["verfy", "d"], "did you mean 'verify'?"),
        (inspect_shards, [], "missing COMMAND (one of list, verify, stats, repair, sheet, compare); see --help"),
        (inspect_shards, ["verify", "d", "--fats"], "unknown option '--fats'; did you mean '--fast'?"),
        (inspect_shards, ["--fast", "verify", "d"], "'--fast' must come after 'verify'"),
        (inspect_shards, ["verify"], "missing DIR (a folder with manifest.json, or its tars as a pattern); see --help"),
        (extract_latents, ["--arvae", "a", "--out", "o"], "missing one of --corpus FILE (videos listed by"),
        (extract_latents, ["--arvae", "a", *GIVEN, "--flip=1"], "--flip: takes no value, found '1'"),
        (extract_latents, ["--arvae", "a", *GIVEN, "--local", "1"], "unknown option '--local'; see --help"),
    ],
)
def test_mistakes_are_one_clear_line(program, words, message):
    with pytest.raises(UserError) as caught:
        program._parse(words) if hasattr(program, "_parse") else program.main(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.launcher
def test_the_program_says_nothing_else():
    command = [sys.executable, "-m", "data_tools.shard_videos", "--sise", "64"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option '--sise'; did you mean '--size'?\n"


def test_inputs_need_not_be_together():
    options = scan_videos._parse(["a", "--out", "o", "b", "--min_frames", "3", "c"])
    assert (options.inputs, options.out, options.min_frames) == ([Path("a"), Path("b"), Path("c")], Path("o"), 3)


def training_parser() -> cli.Parser:
    parser = cli.parser("Trains.", "train", "tiny")
    parser.add_argument("--run_dir", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--resume", choices=("auto", "none"), default="auto")
    return parser


def test_overrides_are_no_mistyped_options(monkeypatch):
    words = ["train", "--run_dir", "r", "--train.max_steps", "7", "--data.shards=x.tar", "train.seed=3"]
    monkeypatch.setattr(sys, "argv", words)
    options, config = cli.parse_with_config(training_parser())
    assert options.run_dir == Path("r")
    assert (config.train.max_steps, config.data.shards, config.train.seed) == (7, "x.tar", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.max_steps", "7"], "missing --run_dir (where checkpoints go); see --help"),
        (["--run-dir", "r", "--train.max_steps", "7"], "unknown option '--run-dir'; did you mean '--run_dir'?"),
        (["--run_dir", "r", "--resum", "none"], "unknown option '--resum'; did you mean '--resume'?"),
        (["--run_dir", "r", "--resume", "no"], "--resume no: must be one of auto, none; did you mean 'none'?"),
        (["--run_dir", "r", "--train.max_step", "7"], "did you mean 'train.max_steps'?"),
        (["--run_dir", "r", "--train.max_steps", "7", "8"], "unexpected argument '8'; see --help"),
        (["--run_dir", "r", "data.tar", "--train.max_steps=7"], "unexpected argument 'data.tar'; see --help"),
        (["--run_dir", "r", "--train.max_steps", "--train.seed=1"], "'--train.max_steps' needs a value"),
    ],
)
def test_mistakes_beside_overrides(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(UserError) as caught:
        cli.parse_with_config(training_parser())
    assert message in str(caught.value)


def test_ranks_beside_the_first_leave_a_mistake_and_the_help_to_it(monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setattr(cli, "PATIENCE", 0)
    with pytest.raises(EchoedError):
        shard_videos._parse(["--sise", "64"])
    with pytest.raises(SystemExit):
        shard_videos._parse(["--help"])
    assert capsys.readouterr().out == ""
