"""A handful of the scenarios of `python -m tests.end_to_end.faults` (make faults), and the program itself."""

import json
import re

import pytest

from tests.end_to_end.faults.__main__ import main
from tests.end_to_end.faults.bench import Bench, DeviationError, NotPossibleError, Setting, Tally
from tests.end_to_end.faults.comparing import differences
from tests.end_to_end.faults.scenarios import SCENARIOS

HANDFUL = {"kill_all": 1, "disk_full_while_writing": 1}  # others: test_training, _supervisor


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.launcher
@pytest.mark.parametrize("name", HANDFUL)
def test_disturbed_run_equals_the_undisturbed_one(bench, name):
    function, _ = SCENARIOS[name]
    tally = Tally()
    try:
        function(bench, tally, HANDFUL[name])
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    assert tally.rounds == HANDFUL[name]


@pytest.mark.launcher
def test_a_run_that_deviates_is_noticed(bench):
    """In one number of metrics.jsonl, in one bit of a weight, in one count."""
    import torch
    from safetensors.torch import load_file, save_file

    setting = Setting(("--train.max_steps", "3"), ranks=1, kind="python")
    reference = bench.reference(setting)
    run = bench.new_run("noticed", "run", setting)
    run.finish()
    bench.compare(run)

    lines = (run.run_dir / "metrics.jsonl").read_text()
    changed = re.sub(r'("loss": [0-9.]+?)(\d)([,}])', lambda m: m[1] + str(9 - int(m[2])) + m[3], lines, count=1)
    (run.run_dir / "metrics.jsonl").write_text(changed)
    newest = sorted(run.checkpoints.glob("step_*"))[-1]
    tensors = load_file(newest / "state_rank0.safetensors")
    master = next(name for name in tensors if name.endswith("master"))
    tensors[master].view(torch.int32)[5] ^= 1
    save_file(tensors, newest / "state_rank0.safetensors")
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "samples": state["samples"] + 8}))

    found = differences(run.run_dir, reference.run_dir)
    assert len(found) == 3, found
    assert "loss" in found[0] and "samples" in found[1] and master in found[2]
    with pytest.raises(DeviationError, match="has its final name, but"):  # its manifest tells as well
        bench.compare(run)


def test_the_program_lists_its_scenarios(capsys):
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(SCENARIOS)
