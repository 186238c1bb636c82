"""The sweep with training faked: what does not fit is noted and not fatal, the best one is named."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ardiff.config import load
from ardiff.profiling import sweep
from ardiff.profiling.sweep import best, default_sizes, out_of_memory


class OneRank:
    size, local_size, is_main = 1, 1, True
    device = torch.device("cpu")

    def gather(self, value):
        return [value]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Sweep with a machine on which a clip takes 1 ms (recomputed 1.3), a micro-step 2 more, and 1 GiB of memory."""
    built = []

    @contextlib.contextmanager
    def session(job, folder, ds_settings, world):
        yield SimpleNamespace(config=job)

    def measure(trainer, warmup, steps):
        train, recompute = trainer.config.train, trainer.config.model.activation_checkpointing
        used = train.micro_batch_size * (0.01 if recompute else 0.1)
        built.append((train.micro_batch_size, recompute))
        peaks.append(used)
        if used > 1:
            raise torch.OutOfMemoryError("no room")
        micro_steps = train.global_batch_size / train.micro_batch_size
        return SimpleNamespace(median_ms=train.global_batch_size * (1.3 if recompute else 1) + 2 * micro_steps)

    peaks = []
    monkeypatch.setattr(sweep, "session", session)
    monkeypatch.setattr(sweep, "built", lambda build_job, config, world: build_job(config))
    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "peak_gb", lambda device: peaks[-1])
    monkeypatch.setattr(sweep, "room_gb", lambda device, ranks: 1.0)

    def call(sizes, checkpointing=(False, True)):
        config = load("tiny", ["train.global_batch_size=64", "train.micro_batch_size=4"])
        said = []
        found = sweep.sweep(
            lambda config: config, config, {}, OneRank(), tmp_path, sizes, checkpointing, 4, said.append
        )
        assert len(said) == len(found)
        assert config.train.micro_batch_size == 4  # the configuration itself stays
        return found, built

    return call


def test_what_does_not_fit_is_noted_and_larger_ones_left_out(run):
    found, built = run([4, 8, 16, 32, 64, 5])
    by = {(one.micro_batch_size, one.activation_checkpointing): one for one in found}
    assert by[16, False].note == "out of memory" and by[16, False].clips_per_s is None
    assert by[32, False].note.startswith("left out") and (32, False) not in built
    assert "does not divide" in by[5, True].note
    assert by[4, False].fits and by[64, True].fits


def test_the_best_is_the_fastest_that_fits(run):
    found, _ = run([4, 8])
    assert best(found).settings == "--train.micro_batch_size 8 --model.activation_checkpointing false"
    found, _ = run([1, 64])
    assert (best(found).micro_batch_size, best(found).activation_checkpointing) == (64, True)


def test_a_margin_of_memory_is_left(run, monkeypatch):
    monkeypatch.setattr(sweep, "room_gb", lambda device, ranks: 0.85)
    found, _ = run([4, 8], checkpointing=(False,))  # 0.4 and 0.8 GiB
    assert [one.fits for one in found] == [True, False]
    assert found[1].clips_per_s > found[0].clips_per_s and "leaves less than 8%" in found[1].note
    assert best(found) == found[0] and best([]) is None


def test_the_peak_on_a_gpu_is_that_of_training(run, monkeypatch):
    """The pass that is tried before holds more than training does."""
    order = []
    trains = sweep.measure
    monkeypatch.setattr(OneRank, "device", torch.device("cuda"))
    monkeypatch.setattr(sweep, "_pass_fits", lambda trainer: order.append("tried") or True)
    monkeypatch.setattr(sweep, "reset_peak", lambda device: order.append("reset"))
    monkeypatch.setattr(sweep, "measure", lambda *given: order.append("trained") or trains(*given))
    found, _ = run([4], checkpointing=(False,))
    assert order == ["tried", "reset", "trained"] and found[0].fits


def test_other_errors_end_it(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(sweep, "measure", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run([4])


def test_on_a_host_what_cannot_fit_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(sweep, "room_gb", lambda device, ranks: 0.001)
    found, built = run([4])
    assert built == [] and all("not tried" in one.note for one in found)


def test_out_of_memory_in_torchs_words():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("shapes"))


def test_default_sizes_divide_the_share_of_a_rank():
    config = load("ardiff_xl")  # 1024 in all, 16 at a time
    assert default_sizes(config, 8) == [4, 8, 16, 32, 64]
    assert default_sizes(config, 64) == [4, 8, 16]
