"""SIGKILL at random moments, and of the launcher."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

from tests.end_to_end import processes
from tests.end_to_end.faults.bench import Bench, Run, Setting, Tally, require

STEPS, SAVE_EVERY = 96, 4
# 10 MB of state: writing takes about as long as the steps between.
KILLED = Setting(
    (
        *("--model.hidden_size", "128", "--train.max_steps", str(STEPS), "--train.save_every", str(SAVE_EVERY)),
        *("--train.keep_checkpoints", "3"),
    )
)
CHAIN = 5  # kills of one run before it may finish
MOMENTS = ("write", "time", "write", "step")
START_UP = 0.6  # share of the undisturbed run's time, about, before its first step
ENOUGH = 6  # kills of which a third must come in the middle of a write
PATIENCE = 60.0  # seconds after the death of a rank or of the launcher until everything has ended


def kill(bench: Bench, tally: Tally, rounds: int, victim: int | None) -> None:
    """SIGKILL of one rank, or of everything at once (None), `rounds` times; a run is killed CHAIN times on its way."""
    name = "kill_all" if victim is None else f"kill_rank{victim}"
    rng = bench.random(name)
    tally.hits = 0
    late = chain = 0
    bench.reference(KILLED)
    while tally.rounds < rounds:
        run = bench.new_run(name, f"{chain:02d}", KILLED)
        chain += 1
        in_chain = min(CHAIN, rounds - tally.rounds)
        for number in range(in_chain):
            run.start()
            moment = MOMENTS[tally.rounds % len(MOMENTS)]
            hit = _kill_at(run, moment, rng, victim, bench.seconds(KILLED), in_chain - number)
            if hit is None:
                late += 1
                break
            tally.rounds += 1
            tally.hits = (tally.hits or 0) + hit
            run.check_checkpoints()
        require(late <= rounds, f"{late} kills came after the end of the run")
        run.finish()
        bench.compare(run)
    few = rounds >= ENOUGH and 3 * tally.hits < rounds
    require(not few, f"only {tally.hits} of {rounds} kills hit a write in progress: this run says little")
    tally.notes += [f"{late} came after the end"] if late else []


def _kill_at(
    run: Run, moment: str, rng: random.Random, victim: int | None, seconds: float, kills_left: int
) -> bool | None:
    """Wait for a random moment and kill; whether a checkpoint was being written. None: the run had finished before."""
    begin, step = time.monotonic(), run.last_step()
    ahead = rng.random() / kills_left  # share of what is to come, so that later kills find a run as well
    if moment == "time":
        moment_of_death = begin + seconds * (START_UP + (1 - START_UP) * ahead) * rng.random()
        while time.monotonic() < moment_of_death and not run.ended():
            time.sleep(0.01)
    elif moment == "step":
        goal = step + 1 + int(ahead * (STEPS - step))
        while not run.ended() and run.last_step() < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    else:
        _wait_for_write(run, 1 + int(ahead * (STEPS - step) / SAVE_EVERY), rng.uniform(0, 0.1))
    while victim is not None and run.rank_process(victim) is None and not run.ended():
        time.sleep(0.01)
    if run.ended():
        require(run.process is not None and run.process.returncode == 0, f"it failed by itself: {run.log}")
        return None
    return _kill_all(run) if victim is None else _kill_rank(run, victim)


def _wait_for_write(run: Run, number: int, delay: float) -> None:
    """Until the so-manieth checkpoint since the start has been in the making for some time."""
    seen: set[str] = set()
    while not run.ended():
        writing = run.being_written()
        if writing is not None:
            seen.add(writing.name)
            if len(seen) >= number:
                time.sleep(delay)
                if run.being_written() is not None:
                    return
        time.sleep(0.001)


def _kill_all(run: Run) -> bool:
    run.kill()
    return run.being_written() is not None  # nobody is left who could have removed or completed it


def _kill_rank(run: Run, victim: int) -> bool:
    pid, writing = run.rank_process(victim), run.being_written()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    hit = writing is not None and writing.exists()
    require(run.wait(PATIENCE) != 0, f"the launcher ended with 0 although rank {victim} was killed: {run.log}")
    expect_no_processes(run, 10)
    return hit


def expect_no_processes(run: Run, limit: float) -> float:
    """All ranks must end by themselves; how many seconds that took."""
    begin = time.monotonic()
    while left := processes.processes_of(run.run_dir):
        if time.monotonic() > begin + limit:
            run.kill()
            require(False, f"after {limit:g} s ranks {sorted(map(str, left.values()))} still run: {run.log}")
        time.sleep(0.05)
    return time.monotonic() - begin


def launcher_killed(bench: Bench, tally: Tally, rounds: int) -> None:
    """SIGKILL of torchrun alone: its ranks must not train on unseen."""
    rng, waits = bench.random("launcher_killed"), []
    bench.reference(KILLED)
    for number in range(rounds):
        run = bench.new_run("launcher_killed", f"{number:02d}", KILLED)
        run.start()
        run.wait_for_step(rng.randint(1, STEPS // 2))
        assert run.process is not None
        run.process.kill()
        run.process.wait(10)
        waits.append(expect_no_processes(run, PATIENCE))
        require(run.last_step() < STEPS, "the ranks went on to the end without their launcher")
        run.check_checkpoints()
        run.finish()
        bench.compare(run)
        tally.rounds += 1
    tally.notes.append(f"ranks gone after {max(waits):.1f} s at most")
