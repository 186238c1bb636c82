"""Batches that break the arithmetic: not finite once, many times in a row, and a loss that explodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.end_to_end import processes
from tests.end_to_end.faults.bench import Bench, Run, Setting, Tally, require
from tests.end_to_end.faults.comparing import tensors_that_differ

BATCH, STEPS, BAD_STEP = 8, 30, 13  # samples of a step; the position of a sample of step k is 8 (k - 1) + i
EVERY_STEP = ("--train.max_steps", str(STEPS), "--train.save_every", "1", "--train.keep_checkpoints", "99")
IN_A_ROW = 4
SPIKE_STEP, SPIKE_STEPS = 26, 40


def _not_finite(step: int) -> tuple[Any, ...]:
    """One sample of a step, read by the second of two ranks."""
    return ("scale_sample", BATCH * (step - 1) + 6, "nan")


NAN_ONCE = Setting(EVERY_STEP, faults=(_not_finite(BAD_STEP),))
NAN_IN_A_ROW = Setting(
    (*EVERY_STEP, "--train.max_skipped_steps", str(IN_A_ROW)),
    faults=tuple(_not_finite(BAD_STEP + i) for i in range(IN_A_ROW)),
)
SPIKE = Setting(
    (
        *("--train.max_steps", str(SPIKE_STEPS), "--train.save_every", "5", "--train.keep_checkpoints", "99"),
        *("--train.spike_window", "10", "--train.spike_action", "rollback"),
    ),
    faults=(("scale_sample", BATCH * (SPIKE_STEP - 1) + 6, 100.0),),
)


def _state(run: Run, step: int) -> dict[str, Any]:
    return json.loads((_checkpoint(run, step) / "state.json").read_text())


def _checkpoint(run: Run, step: int) -> Path:
    return run.checkpoints / f"step_{step:08d}"


def _check_skipped(run: Run, first: int, number: int) -> None:
    """These steps must have changed nothing: no weight, no moment, no average, no count of updates."""
    before, after = first - 1, first - 1 + number
    differing = tensors_that_differ(_checkpoint(run, before), _checkpoint(run, after), "group")
    require(not differing, f"a skipped step changed {differing[:3]}")
    one, two = _state(run, before), _state(run, after)
    for key in ("adam_steps", "ema_updates"):
        require(one[key] == two[key], f"{key} went from {one[key]} to {two[key]} in skipped steps")
    require(two["skipped_steps"] == number, f"skipped_steps is {two['skipped_steps']}, not {number}")
    require(two["samples"] == BATCH * after, f"samples is {two['samples']} after step {after}")
    counts = [line["skipped_steps"] for line in processes.metrics(run.run_dir)][:after]
    require(counts == [0] * before + list(range(1, number + 1)), f"skipped_steps in metrics.jsonl: {counts}")


def nan_once(bench: Bench, tally: Tally, rounds: int) -> None:
    """A sample that is not finite: its step is skipped on all ranks; and killed around it, the run is the same."""
    reference = bench.reference(NAN_ONCE)
    _check_skipped(reference, BAD_STEP, 1)
    applied = _state(reference, STEPS)["adam_steps"]
    require(set(applied) == {STEPS - 1}, f"Adam's steps are {applied} after {STEPS} steps with one skipped")
    plain = bench.reference(Setting(EVERY_STEP))
    same, other = (processes.exact(run.run_dir)[: BAD_STEP - 1] for run in (reference, plain))
    require(same == other, "the steps before the bad one deviate")
    rng = bench.random("nan_once")
    for number in range(rounds):
        run = bench.new_run("nan_once", f"{number:02d}", NAN_ONCE)
        run.start()
        run.wait_for_step(BAD_STEP + rng.randint(-2, 2))
        run.kill()
        run.finish()
        bench.compare(run)
        tally.rounds += 1


def nan_in_a_row(bench: Bench, tally: Tally, rounds: int) -> None:
    """So many that the run must end, with a checkpoint; the same command goes on behind them."""
    last = BAD_STEP + IN_A_ROW - 1
    for number in range(rounds):
        run = bench.new_run("nan_in_a_row", f"{number:02d}", NAN_IN_A_ROW)
        run.start()
        run.check_tells_mistake(run.wait(), "not finite", f"{IN_A_ROW} steps in a row")
        record = run.exit_record()
        require(record["code"] == 2 and "not finite" in record["reason"], f"exit.json: {record}")
        newest = run.check_checkpoints()[-1]
        require(newest.name == f"step_{last:08d}", f"the last checkpoint is {newest.name}, not that of step {last}")
        _check_skipped(run, BAD_STEP, IN_A_ROW)
        run.finish()
        steps = [line["step"] for line in processes.metrics(run.run_dir)]
        require(steps == list(range(1, STEPS + 1)), f"steps of metrics.jsonl: {steps}")
        state = _state(run, STEPS)
        require(state["skipped_steps"] == IN_A_ROW, f"skipped_steps is {state['skipped_steps']}")
        require(set(state["ema_updates"]) == {STEPS - IN_A_ROW}, f"ema_updates: {state['ema_updates']}")
        tally.rounds += 1


def spike_rollback(bench: Bench, tally: Tally, rounds: int) -> None:
    """A loss that explodes is rolled back and its samples are left out; killed at any time, the run is the same."""
    reference = bench.reference(SPIKE)
    _check_rolled_back(reference)
    rng = bench.random("spike_rollback")
    for number in range(rounds):
        run = bench.new_run("spike_rollback", f"{number:02d}", SPIKE)
        run.start()
        if number % 2:
            run.wait_until(lambda: _sees_spike(run), "the spike")  # noqa: B023 - called before the next round
        else:
            run.wait_for_step(SPIKE_STEP + rng.randint(1, 10))
        run.kill()
        run.finish()
        bench.compare(run)
        tally.rounds += 1


def _sees_spike(run: Run) -> bool:
    return "spike" in run.output.lower()


def _check_rolled_back(run: Run) -> None:
    lines = processes.metrics(run.run_dir)
    steps = [line["step"] for line in lines]
    require(steps == list(range(1, SPIKE_STEPS + 1)), f"steps of metrics.jsonl: {steps}")
    largest = max(float(line["loss"]) for line in lines)
    require(largest < 10 * float(lines[0]["loss"]), f"a loss of {largest} has remained in metrics.jsonl")
    state = _state(run, SPIKE_STEPS)
    first = BATCH * (SPIKE_STEP - 1)
    skipped = [value for key, value in state.items() if "skipped" in key and isinstance(value, list)]
    require(skipped and str(first) in json.dumps(skipped), f"state.json does not list {first} as skipped: {skipped}")
    require(_sees_spike(run) and str(first) in run.output, f"the log does not name the samples: {run.log}")
    # As if those samples had never been: the same data without the fault, but 8 samples fewer.
    require(state["samples"] >= BATCH * SPIKE_STEPS, f"samples is {state['samples']}")
