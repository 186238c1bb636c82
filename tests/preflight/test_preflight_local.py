"""Checks of one rank by itself: run_dir, shards, host, matrix products, git state."""

import errno
from argparse import Namespace
from contextlib import ExitStack
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data_helpers import write_frames, write_latents

from ardiff import cli
from ardiff.config import Config, load, to_yaml
from ardiff.data.mixture import open_data
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from ardiff.preflight import compute, host, shards, software, storage
from ardiff.preflight.checks import Context
from ardiff.preflight.meeting import Meeting
from ardiff.preflight.result import Result
from launch import preflight, train

SMALL = [
    *("--model.hidden_size", "32", "--model.num_heads", "2", "--model.depth", "1"),
    *("--model.tokens_per_frame", "2", "--model.num_frames", "4"),
]


def context(tmp_path: Path, *overrides: str, run_dir: Path | None = None) -> Context:
    meeting = Meeting(dist.HashStore(), 0, 1)
    options = Namespace(config="tiny", ds_config=None, run_dir=run_dir, quick=True, world_size=None)
    cpu = torch.device("cpu")
    program = (train.build_job, train.NAME, train.FIXED)
    made = Context(options, [*SMALL, *overrides], *program, meeting, ["here"], 0, cpu, 20.0)
    made.config = load("tiny", made.overrides)
    return made


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("existing", ["", "run", "run/logs", "run/checkpoints"])
def test_run_dir_is_measured_and_nothing_is_left(tmp_path, existing):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    if existing == "run/checkpoints":
        (tmp_path / "run" / "config.yaml").write_text("{}\n")
    before = everything(tmp_path)
    made = context(tmp_path, run_dir=tmp_path / "run")
    made.config = None
    with made.clean_up:
        found = storage.check_run_dir(made)
        assert not found.failures
        assert found.figures["run_dir_shared"] and found.figures["write_mb_per_s"] > 0
        assert found.figures["disk_free_gb"] > 0
        held = [path for path in everything(tmp_path) - before if path.is_file()]
        assert [path.name.startswith(".preflight.tmp.") for path in held] == [True]
    assert everything(tmp_path) == before


def test_a_run_dir_that_is_none_is_refused_and_the_others_hear_of_it(tmp_path):
    (tmp_path / "run").write_text("")
    made = context(tmp_path, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="is not a folder"):
        storage.check_run_dir(made)
    assert made.meeting.read("token", 1) is None


@pytest.mark.parametrize(
    ("setting", "value", "refused"),
    [("model.depth", "2", True), ("data.stride", "2", True), ("train.max_steps", "77", False)],
)
def test_a_run_of_another_model_is_refused_as_train_does(tmp_path, setting, value, refused):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(context(tmp_path).config))
    made = context(tmp_path, f"--{setting}", value, run_dir=run)
    with made.clean_up:
        if not refused:
            assert not storage.check_run_dir(made).failures
            return
        with pytest.raises(UserError, match=f"holds a run of another model .*{setting}"):
            storage.check_run_dir(made)


@pytest.mark.parametrize("program", preflight.PROGRAMS)
def test_what_a_program_fixes_are_settings(program):
    fixed = preflight.PROGRAMS[program].FIXED
    assert len(fixed) > 3 and "data.stride" in fixed
    for name in fixed:
        reduce(getattr, name.rstrip(".").split("."), Config())


def test_a_report_that_cannot_be_written_is_refused_before_the_checks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["preflight.py", "--config", "tiny", "--json", str(tmp_path / "file" / "x.json")])
    monkeypatch.setattr(preflight.program, "run", None)
    with pytest.raises(UserError, match="is not a folder that can be written to"):
        preflight.main()


@pytest.mark.parametrize(("ok", "code"), [(True, cli.EXIT_USER_ERROR), (False, cli.EXIT_FAILURE)])
def test_a_report_that_cannot_be_written_after_all_is_on_the_screen(tmp_path, monkeypatch, capsys, ok, code):
    """A disk that has become full while the checks ran."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x.json")

    monkeypatch.setattr(preflight, "write_json", full)
    failures = [] if ok else ["something is wrong"]
    assert preflight.tell(Result(failures=failures), tmp_path / "x.json") == code
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].startswith(f"preflight: {'OK' if ok else 'FAILED'}")
    assert told.err.startswith("error: ") and "No space left on device" in told.err


def test_what_a_kill_leaves_is_in_no_runs_way(tmp_path):
    """The file of a preflight that was killed: training begins there, and the next preflight removes it."""
    from ardiff.training.run_dir import check

    run = tmp_path / "run"
    storage._offer_token(context(tmp_path, run_dir=run), run, storage.Finding())  # and never cleaned up
    left = list((run / "logs").iterdir())
    assert len(left) == 1
    check(run, load("tiny"), "DiT", (), "none")
    with ExitStack() as stack:
        again = context(tmp_path, run_dir=run)
        stack.enter_context(again.clean_up)
        assert not storage.check_run_dir(again).failures
    assert list((run / "logs").iterdir()) == []


def test_room_for_checkpoints():
    folder, gib = Path("runs/x"), float(2**30)
    assert storage.require_room(gib, 3, 0, 100.0, folder) == ("", "")
    failure, _ = storage.require_room(2 * gib, 3, 0, 1.5, folder)
    assert failure == "runs/x: a checkpoint needs 2 GiB, but 1.5 GiB are free; make room"
    _, warning = storage.require_room(2 * gib, 3, 1, 5.0, folder)
    assert warning.startswith("runs/x: 3 checkpoints and the one being written need 6 GiB more, but 5 GiB are free;")
    assert storage.require_room(2 * gib, 3, 3, 5.0, folder) == ("", "")


def test_shards_are_read_and_clips_counted(tmp_path):
    write_latents(tmp_path / "latents")
    made = context(tmp_path, "--data.shards", str(tmp_path / "latents"))
    found = shards.check_shards(made)
    assert not found.failures and made.job is not None
    assert found.figures["shards"] == found.figures["shards_read"] == 3
    assert found.figures["clips_per_s"] > 0 and found.figures["data"] == made.job.data.identity[:16]


def test_a_damaged_shard_is_named(tmp_path):
    write_latents(tmp_path / "latents")
    path = tmp_path / "latents" / "latents-000001.tar"
    content = bytearray(path.read_bytes())
    made = context(tmp_path, "--data.shards", str(tmp_path / "latents"))
    data = open_data(made.config, "latents", 4)
    for video in np.flatnonzero(data.sets[0].shard_of_video == 1):  # a bit of every video, as some are read
        content[data.sets[0].place_of(int(video))[1] + 3] ^= 1
    path.write_bytes(content)
    (line,) = shards.check_shards(made).failures
    assert line.startswith("1 shard(s) cannot be read: ") and "latents-000001.tar" in line and "checksum" in line


def test_pictures_are_read_too(tmp_path):
    write_frames(tmp_path / "frames")
    config = load("arvae_tiny", ["--data.shards", str(tmp_path / "frames")])
    tried, broken = shards.read_samples(open_data(config, "frames", 1), 0, 20.0)
    assert tried == 2 and broken == []


def test_a_reader_that_fails_is_reported_by_shard(tmp_path, monkeypatch):
    write_latents(tmp_path / "latents")
    data = open_data(load("tiny", ["--data.shards", str(tmp_path / "latents")]), "latents", 4)

    def fail(*_):
        raise ShardError("shard", 7, "cannot be read")

    monkeypatch.setattr(data.sets[0], "_read", fail)
    tried, broken = shards.read_samples(data, 0, 20.0)
    assert tried == 3 and len(broken) == 3 and "byte 7" in broken[0]


def test_without_shards_or_run_dir_it_is_said(tmp_path):
    made = context(tmp_path)
    assert shards.check_shards(made).not_checked == "no --data.shards"
    assert storage.check_run_dir(made).not_checked == "no --run_dir"


def test_the_host_tells_what_it_has(tmp_path, monkeypatch):
    made = context(tmp_path)
    figures = host.check_host(made).figures
    assert figures["cores"] >= 1 and figures["open_files"] != 0 and figures["host_memory_gb"] > 0
    made.meeting.size, made.hosts = 10_000, ["here"] * 10_000
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (1024, 4096))
    found = host.check_host(made)
    assert "1024 open files are allowed, 40000 are needed; ulimit -n 40000" in found.failures
    assert any("core(s) for 10000 ranks" in line for line in found.warnings)
    assert any(line.startswith("/dev/shm: ") for line in found.warnings)


@pytest.mark.parametrize(("addresses", "fails"), [(["127.0.1.1"], True), (["10.0.0.7"], False)])
def test_a_name_that_leads_nowhere_is_a_failure_on_a_cluster(tmp_path, monkeypatch, addresses, fails):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(host, "resolve", lambda _: addresses)
    made = context(tmp_path)
    made.meeting.size, made.hosts = 2, ["here", "there"]
    lines = host.check_host(made).failures
    assert any("resolves to 127.0.1.1 here, where other hosts cannot reach it" in line for line in lines) == fails


def test_matrix_products_have_a_rate_and_the_same_bits():
    rate, same, digest = compute.matmul_rate(torch.device("cpu"), 64, 0.05)
    assert rate > 0 and same
    assert compute.matmul_rate(torch.device("cpu"), 64, 0.0)[2] == digest
    result = torch.arange(6.0).reshape(2, 3)
    changed = result.clone()
    changed[1, 2] += 1e-6
    assert compute._digest(result) != compute._digest(changed)
    assert compute._digest(result) != compute._digest(result.flip(0))
    assert compute._digest(result.bfloat16()) != compute._digest(result)


def test_a_configuration_is_checked_against_ranks_and_deepspeed(tmp_path):
    made = context(tmp_path)
    found = software.check_configuration(made)
    assert found.figures["accumulation"] == 2 and made.ds_settings is not None
    made.options.world_size = 3
    with pytest.raises(UserError, match=r"no multiple of train.micro_batch_size x ranks = 4 x 3"):
        software.check_configuration(made)
    made.options.world_size, made.options.ds_config = None, tmp_path / "ds.json"
    made.options.ds_config.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}')
    with pytest.raises(UserError, match="--ds_config: DeepSpeed refuses it"):
        software.check_configuration(made)


@pytest.mark.parametrize("kind", ["UNIX x86_64 Kernel Module", "UNIX Open Kernel Module for x86_64"])
def test_the_version_of_the_driver(kind):
    text = f"NVRM version: NVIDIA {kind}  570.86.15  Release Build  (dvs-builder)\nGCC version:  gcc version 12.2.0\n"
    assert software.driver_version(text) == "570.86.15"


def test_git_state_of_what_is_no_clone(tmp_path):
    assert software.git_state(tmp_path) == {}
