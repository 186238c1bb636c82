"""What is attached to a trainer is taken off again; what runs out of memory on a GPU is found before ranks wait."""

from types import SimpleNamespace

import pytest
import torch

from ardiff.errors import UserError
from ardiff.profiling import sweep
from ardiff.profiling.instruments import Traffic, _counted, _replaced, _timed
from ardiff.profiling.session import Measured, built
from ardiff.profiling.timeline import FORWARD, PARTS, REDUCTION, Timeline


class Thing:
    def __init__(self):
        self.own = lambda: "own"

    def method(self):
        return "method"


def test_functions_are_put_back():
    thing = Thing()
    own = thing.own
    changes = [(thing, name, lambda original: lambda: f"timed {original()}") for name in ("own", "method")]
    with pytest.raises(KeyError), _replaced(changes):
        assert (thing.own(), thing.method()) == ("timed own", "timed method")
        raise KeyError
    assert thing.own is own and thing.method() == "method" and "method" not in vars(thing)


def test_collectives_are_counted_in_steps_only():
    watch, traffic = Timeline(torch.device("cpu")), Traffic()
    gather = _counted(watch, traffic, REDUCTION, "all_gather", 0)(lambda out, part=None, group=None: len(out))
    parts = [torch.zeros(3), torch.zeros(5)]
    assert gather(parts, None) == 2 and traffic.take() == {}
    with watch.step():
        gather(parts, None)
        gather(out=parts)
    sent = traffic.take()["all_gather"]
    assert (sent.calls, sent.bytes) == (2, 2 * 4 * 8)
    assert watch.take()[0][REDUCTION] > 0


def test_timed_functions_keep_their_results():
    watch = Timeline(torch.device("cpu"))
    double = _timed(watch, FORWARD)(lambda value, times=2: value * times)
    assert double(4) == 8 and double(4, times=3) == 12


def test_measured_compares_sum_and_steps():
    parts = [dict.fromkeys(PARTS, 1.0), dict.fromkeys(PARTS, 3.0)]
    found = Measured([20.0, 16.0, 18.0], [20.0, 21.0, 19.0], parts, {}, 0.0)
    assert found.mean_parts == dict.fromkeys(PARTS, 2.0) and found.step_ms == 18.0
    assert found.sum_error == pytest.approx(0.0) and found.overhead == pytest.approx(20 / 18 - 1)
    assert found.as_json()["sum_against_step"] == pytest.approx(20 / 18 - 1)
    disturbed = Measured([18.0, 18.0, 99.0], [20.0, 20.0, 80.0], [dict.fromkeys(PARTS, 4.4)], {}, 0.0)
    assert disturbed.sum_error == pytest.approx(0.1) and disturbed.step_ms == 45.0
    assert disturbed.sum_against_step == pytest.approx(1.1 * 20 / 18 - 1)  # by medians


def test_a_job_that_one_rank_cannot_build_is_refused_on_all():
    agreed = []

    def agree(mistake):
        agreed.append(mistake)
        if mistake:
            raise mistake

    def no_shards(_config):
        raise UserError("no such folder")

    world = SimpleNamespace(size=2, agree=agree)
    with pytest.raises(UserError, match="no such folder"):
        built(no_shards, None, world)
    job = SimpleNamespace(check=lambda size: None)
    assert built(lambda _config: job, None, world) is job and agreed[-1] is None


@pytest.mark.parametrize("room", [True, False])
def test_a_pass_is_tried_before_ranks_wait_for_each_other(monkeypatch, room):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    linear = torch.nn.Linear(3, 1)

    def forward(batch):
        if not room:
            raise torch.OutOfMemoryError("no room")
        return {"loss": (linear(batch["x"]).sum(), torch.ones(()))}

    objective = SimpleNamespace(__call__=forward, parameters=linear.parameters)
    engine = SimpleNamespace(objective=type("Objective", (), {"__call__": lambda _, b: forward(b)})())
    engine.objective.parameters = objective.parameters
    batch = SimpleNamespace(micro_batches=[{"x": torch.ones(2, 3)}])
    trainer = SimpleNamespace(
        engine=engine, next_batch=lambda: batch, world=SimpleNamespace(device=torch.device("cpu"))
    )
    assert sweep._pass_fits(trainer) is room
    assert linear.weight.grad is None  # the engine's hooks have seen no gradient
