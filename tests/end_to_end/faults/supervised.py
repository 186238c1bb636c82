"""launch/submit.py: one command that survives faults by itself, and passes signals on."""

from __future__ import annotations

import json
import os
import signal
import time

from tests.end_to_end.faults.bench import Bench, Setting, Tally, require
from tests.end_to_end.faults.hangs import HANGING_STEP, PATIENCE, WATCHED
from tests.end_to_end.faults.kills import expect_no_processes

RESTARTED = Setting(WATCHED, kind="submit", faults=(("hang", 1, HANGING_STEP, "FOLDER/has_hung"),))
SUPERVISED = Setting(WATCHED, kind="submit")
STOP_SECONDS = 20.0


def restarts(bench: Bench, tally: Tally, rounds: int) -> None:
    """A rank that hangs, then one that is killed: the command goes on by itself and ends with 0."""
    bench.reference_with_file(RESTARTED, "has_hung")
    for number in range(rounds):
        run = bench.new_run("restarts", f"{number:02d}", RESTARTED)
        run.start()
        run.wait_until((run.folder / "has_hung").exists, "the hang")
        run.wait_for_step(HANGING_STEP + 5)
        victim = run.rank_process(number % 2)
        require(victim is not None, f"rank {number % 2} is not there")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        require(run.wait() == 0, f"submit.py did not end with 0: {run.log}")
        require(run.exit_record()["reason"] == "finished", f"exit.json: {run.exit_record()}")
        noted = [json.loads(line) for line in (run.run_dir / "restarts.jsonl").read_text().splitlines()]
        require([entry["code"] for entry in noted] == [3, 1], f"restarts.jsonl: {noted}")
        bench.compare(run)
        tally.rounds += 2


def stopped(bench: Bench, tally: Tally, rounds: int) -> None:
    """SIGTERM to submit.py is a planned stop, and its death takes the ranks along; the same command goes on."""
    bench.reference(SUPERVISED)
    for number in range(rounds):
        run = bench.new_run("submit_stopped", f"{number:02d}", SUPERVISED)
        run.start()
        run.wait_for_step(8)
        assert run.process is not None
        begin = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        code = run.wait()
        seconds = time.monotonic() - begin
        require(code == 0 and seconds < STOP_SECONDS, f"exit code {code} after {seconds:.1f} s: {run.log}")
        record = run.exit_record()
        require(record["reason"] == "SIGTERM" and record["code"] == 0, f"exit.json: {record}")
        expect_no_processes(run, 1)
        run.start()
        run.wait_for_step(record["step"] + 5)
        run.process.kill()
        run.process.wait(10)
        gone = expect_no_processes(run, PATIENCE)
        run.check_checkpoints()
        run.finish()
        bench.compare(run)
        tally.rounds += 2
        tally.notes.append(f"stopped after {seconds:.1f} s, ranks gone {gone:.1f} s after its death")
