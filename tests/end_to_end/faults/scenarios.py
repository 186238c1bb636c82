"""All scenarios by name, with their usual number of rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.end_to_end.faults import arithmetic, damage, disk, hangs, kills, stops, supervised
from tests.end_to_end.faults.bench import Bench, Tally

Scenario = tuple[Callable[[Bench, Tally, int], None], int]  # and rounds

SCENARIOS: dict[str, Scenario] = {
    "kill_all": (partial(kills.kill, victim=None), 10),
    "kill_rank0": (partial(kills.kill, victim=0), 10),
    "kill_rank1": (partial(kills.kill, victim=1), 10),
    "launcher_killed": (kills.launcher_killed, 1),
    **{
        name: (partial(damage.damage, name=name), rounds)
        for name, rounds in (
            ("truncated", 2),
            ("bit_flipped", 3),
            ("manifest_missing", 1),
            ("latest_nowhere", 1),
            ("left_over_tmp", 1),
        )
    },
    "disk_full_at_once": (disk.full_at_once, 1),
    "disk_full_while_writing": (disk.full_while_writing, 2),
    "disk_full_for_metrics": (disk.full_for_metrics, 1),
    "nan_once": (arithmetic.nan_once, 1),
    "nan_in_a_row": (arithmetic.nan_in_a_row, 1),
    "spike_rollback": (arithmetic.spike_rollback, 2),
    "hang": (hangs.hang, 1),
    "stopped_rank": (hangs.stopped_rank, 2),
    "restarts": (supervised.restarts, 1),
    "submit_stopped": (supervised.stopped, 1),
    "stop_in_evaluation": (stops.stop_in_evaluation, 3),
    "stop_in_preview": (stops.stop_in_preview, 3),
    "stop_of_one_rank": (stops.stop_of_one_rank, 1),
    "stop_in_checkpoint": (stops.stop_in_checkpoint, 3),
    "time_limit": (hangs.time_limit, 1),
}
