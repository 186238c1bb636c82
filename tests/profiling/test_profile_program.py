"""What is around the measurements: nodes with disks of their own are left clean, text counts in the rates."""

from types import SimpleNamespace

import pytest
import torch

from ardiff.config import load
from ardiff.monitor.throughput import dit_flops
from ardiff.profiling import program
from ardiff.profiling.program import Plan


@pytest.mark.parametrize(("rank", "local_rank", "there"), [(0, 0, False), (4, 0, False), (5, 1, True)])
def test_the_first_rank_of_every_node_cleans_up(tmp_path, rank, local_rank, there):
    work = tmp_path / "work"
    (work / "latents-a").mkdir(parents=True)
    program._remove(work, SimpleNamespace(rank=rank, local_rank=local_rank))
    assert work.exists() == there


def test_what_an_ended_profile_left_is_removed_before_and_after(tmp_path, monkeypatch):
    left = tmp_path / "work" / "old"
    left.mkdir(parents=True)
    world = SimpleNamespace(is_main=True, local_rank=0, barrier=lambda: None)

    def profile(*_):
        assert not left.exists() and left.parent.is_dir()
        raise KeyError

    monkeypatch.setattr(program, "_profile", profile)
    config = load("tiny", ["data.shards=somewhere"])
    with pytest.raises(KeyError):
        program.run(lambda config: None, config, {}, world, tmp_path, Plan(), lambda line: None)
    assert not left.parent.exists()


def test_text_counts_in_the_rates():
    config, world = load("tiny", ["model.context_dim=8"]), SimpleNamespace(size=2, device=torch.device("cpu"))
    measured = SimpleNamespace(step_ms=1000.0)
    found = program._rates(config, measured, world, Plan(peak_tflops=1.0), 1e12, 20)
    flops = 3 * dit_flops(config.model, num_context=20)
    assert found["training_gflops_per_clip"] == pytest.approx(flops / 1e9)
    assert found["mfu"] == pytest.approx(config.train.global_batch_size / 2 * flops / 1e12)
