"""The shipped DeepSpeed settings and the cluster's environment: accepted, explained, and as the README says."""

import json
import mmap
import re
from pathlib import Path

import pytest
import torch

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.launching.environment import read_file
from ardiff.monitor import estimates
from ardiff.profiling.links import ASSUMED_ACROSS, ASSUMED_WITHIN
from ardiff.training.engine import read_ds_config

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
TEMPLATE = FOLDER / "a800_cluster.env"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ASSIGNMENT = re.compile(r"(# )?([A-Z][A-Z0-9_]*)=(.*)")


def leaves(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_settings_are_accepted_and_mean_what_they_say(path):
    """By our reader and by DeepSpeed, which gives every key of it the value that is written there."""
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = read_ds_config(path)
    understood = DeepSpeedConfig({**settings, "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2})
    zero = settings["zero_optimization"]
    assert {key: getattr(understood.zero_config, key) for key in zero} == zero
    in_bf16 = "bf16" in settings
    assert understood.bfloat16_config.enabled == in_bf16
    assert understood.grad_accum_dtype == ("fp32" if in_bf16 else None)
    assert understood.communication_data_type is None  # that of the weights
    assert not understood.zero_config.overlap_comm and not understood.zero_config.round_robin_gradients


def test_every_file_and_every_setting_is_explained():
    cards = {"zero2_a800_40g.json", "zero2_a800_80g.json", "zero2_h200.json"}
    assert {"zero0.json", "zero1.json", "zero2.json", "zero2_cpu.json", *cards} == set(names(FILES))
    listed = set(re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE))
    assert {*names(FILES), TEMPLATE.name} <= listed
    used = {key for path in FILES for key, _ in leaves(json.loads(path.read_text()))}
    assert used == {key for key in listed if not (FOLDER / key).exists()}


def test_the_arithmetic_of_the_readme(monkeypatch):
    """Sizes of buckets, and the memory that is estimated for each card."""
    parameters = estimates.num_parameters(load("ardiff_xl"))
    monkeypatch.setattr(estimates, "num_parameters", lambda _: parameters)  # building it takes a second
    assert f"{parameters / 1e6:.1f} M numbers, {2 * parameters / 1e9:.2f} GB in bf16" in README
    rows = re.findall(r"^\| (\d)e(\d) \| (\d+) \| (\d+) MB \| ([\d.]+) GiB \(([\d.]+)\)", README, re.MULTILINE)
    assert len(rows) == 3
    for digit, zeros, count, message, alone, overlapping in rows:
        size = int(digit) * 10 ** int(zeros)
        assert -(-parameters // size) <= int(count) <= -(-parameters // size) + 1  # parameters are not cut
        assert int(message) == 2 * size / 1e6
        found = [round(multiple * 2 * size / 2**30, 2) for multiple in (2, 3)]
        assert found == pytest.approx([float(alone), float(overlapping)], abs=0.01)
    cards = re.findall(
        r"^\| [AH]\d+ \d+ GB \| `([\w.]+)` \| (\d+) \|[^|]*\| ([\d.]+) of \d+ \| ([\d.]+) \|", README, re.MULTILINE
    )
    assert len(cards) == 3
    for file, micro_batch, without, checkpointed in cards:
        bucket = read_ds_config(FOLDER / file)["zero_optimization"]["reduce_bucket_size"]
        for checkpointing, said in ((False, without), (True, checkpointed)):
            total = estimates.memory(
                load("ardiff_xl"), 8, "bf16", 2, int(micro_batch), checkpointing, bucket=bucket, on_gpu=True
            )["total"]
            assert total == pytest.approx(float(said), abs=0.06)
    rows = re.findall(r"^\| (\d+) GPUs, ([^|]*) \| (\d+) GB/s \| (\d+) ms \|", README, re.MULTILINE)
    assert len(rows) == 3
    for ranks, where, bandwidth, milliseconds in rows:  # of an all-reduce of all gradients in bf16
        assert int(milliseconds) == round(2 * (1 - 1 / int(ranks)) * 2 * parameters / (int(bandwidth) * 1e6))
        assumed = {"NVLink": ASSUMED_WITHIN, "4 cards of 200 Gb/s a node": ASSUMED_ACROSS}
        assert int(bandwidth) == assumed.get(where, 2 * ASSUMED_ACROSS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offload_optimizer", {"device": "cpu"}),
        ("offload_param", {"device": "nvme"}),
        ("offload_optimizer", "cpu"),
        ("cpu_offload", True),  # what older versions called it
    ],
)
def test_offloading_is_refused(tmp_path, key, value):
    path = tmp_path / "offload.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, key: value}}))
    with pytest.raises(UserError, match=rf"offload.json: zero_optimization.{key} is not supported; remove it"):
        read_ds_config(path)


def test_what_offloads_nothing_is_accepted(tmp_path):
    none = {"offload_optimizer": None, "offload_param": {"device": "none"}, "cpu_offload": False}
    (tmp_path / "x.json").write_text(json.dumps({"zero_optimization": {"stage": 2, **none}}))
    assert read_ds_config(tmp_path / "x.json")["zero_optimization"].keys() > none.keys()


def paragraphs():
    """Of the template: the lines between blank ones, without the headings."""
    for paragraph in TEMPLATE.read_text(encoding="utf-8").split("\n\n")[1:]:
        lines = paragraph.strip().splitlines()
        if not lines[0].startswith("# ---"):
            yield lines


def test_every_variable_has_its_own_reason():
    found = []
    for lines in paragraphs():
        *reason, last = lines
        assignment = ASSIGNMENT.fullmatch(last)
        assert assignment is not None and assignment[3], last
        assert len(" ".join(reason)) > 60 and all(line.startswith("# ") for line in reason)
        assert not any(ASSIGNMENT.fullmatch(line) for line in reason)
        found.append(assignment[2])
    assert len(found) == len(set(found)) > 15


def test_only_what_holds_everywhere_is_set():
    values, _ = read_file(TEMPLATE)
    assert set(values) == {lines[-1].partition("=")[0] for lines in paragraphs() if not lines[-1].startswith("#")}
    site = re.compile(r"_IFNAME|_HCA|GID|_TC$|CROSS_NIC|GDR")  # names of cards, interfaces, switches
    assert not [name for name in values if site.search(name)]
    assert values["NCCL_DEBUG"] == "WARN"
    usual = load("ardiff_xl").train.hang_limit * 60
    assert int(values["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > usual  # the watchdog knows more, so it comes first


def test_a_copy_that_was_filled_in_is_read(tmp_path):
    lines = [lines[-1].removeprefix("# ") for lines in paragraphs()]
    copy = tmp_path / "site.env"
    copy.write_text("\n".join(lines) + "\n")
    values, _ = read_file(copy)
    assert len(values) == len(lines)
    assert values["NCCL_SOCKET_IFNAME"].startswith("=") and values["NCCL_IB_HCA"].count("mlx5") == 4


def test_torch_knows_its_variables():
    """Those of NCCL are not in a CPU build; torch's own are in its headers or its library."""
    root = Path(torch.__file__).parent
    headers = root / "include" / "torch" / "csrc" / "distributed" / "c10d"
    declared = "".join((headers / name).read_text() for name in ("ProcessGroupNCCL.hpp", "FlightRecorder.hpp"))
    libraries = [root / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    mapped = []
    for path in libraries:
        with path.open("rb") as file:
            mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    ours = [ASSIGNMENT.fullmatch(lines[-1])[2] for lines in paragraphs()]
    of_torch = [name for name in ours if name.startswith(("TORCH_", "PYTORCH_", "GLOO_"))]
    assert len(of_torch) >= 6
    missing = [
        n for n in of_torch if f'"{n}"' not in declared and not any(part.find(n.encode()) >= 0 for part in mapped)
    ]
    assert missing == []
