"""The scaling model against reality: profiles of the same training on several numbers of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ardiff.errors import UserError
from ardiff.profiling.links import Links
from ardiff.profiling.program import VERSION
from ardiff.profiling.scaling import Compute, predict
from ardiff.profiling.timeline import GATHER, REDUCTION

PROFILE = "profile.json"
SAME = ("model", "precision", "zero_stage", "overlap_comm", "activation_checkpointing")  # settings; batches may differ


@dataclass(frozen=True)
class Check:
    """A step that was measured on `ranks` ranks, and what a profile on `source` ranks says of it.

    links_from: the number of ranks on which collectives were measured for it.
    """

    source: int
    links_from: int
    ranks: int
    predicted_ms: float
    measured_ms: float
    compute_ms: float
    communication_ms: float
    measured_communication_ms: float

    @property
    def error(self) -> float:
        """As a share of the measured step."""
        return self.predicted_ms / self.measured_ms - 1

    def as_json(self) -> dict[str, Any]:
        """With the error."""
        return {**vars(self), "error": self.error}


def read(folder: Path) -> dict[str, Any]:
    """The profile in a folder. Raises UserError where there is none of this version."""
    path = folder / PROFILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--compare {folder}: holds no {PROFILE}; give folders that --out named") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise UserError(f"{path}: not a profile of version {VERSION}; profile again")
    try:
        Compute(**found["compute"])
        Links.from_json(found["links"])
        parts, setting = found["step"]["parts_ms"], found["setting"]
        _ = (found["machine"]["ranks"], found["step"]["step_ms"], parts[REDUCTION], parts[GATHER])
        _ = [setting[name] for name in SAME]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole profile ({error!r}); profile again") from error
    return found


def compare(profiles: Sequence[dict[str, Any]]) -> list[Check]:
    """Every profile predicts those on more ranks: by the collectives measured there, and by its own, extrapolated.

    Raises UserError where they are of different trainings.
    """
    for other in profiles[1:]:
        for name in SAME:
            one, two = profiles[0]["setting"][name], other["setting"][name]
            if one != two:
                raise UserError(
                    f"--compare: profiles of different trainings: {name} is {one} in one and {two} in another"
                )
    by_ranks = sorted(profiles, key=lambda profile: profile["machine"]["ranks"])
    checks = []
    for number, source in enumerate(by_ranks):
        compute = Compute(**source["compute"])
        for target in by_ranks[number + 1 :]:
            there = Compute(**target["compute"])
            if there.ranks == compute.ranks:
                continue
            parts = target["step"]["parts_ms"]
            for links_of in [target] if compute.ranks == 1 else [target, source]:
                found = predict(
                    compute,
                    replace(Links.from_json(links_of["links"]), ranks_per_node=target["links"]["ranks_per_node"]),
                    there.ranks,
                    there.global_batch_size,
                    there.micro_batch_size,
                    there.speed,
                )
                checks.append(
                    Check(
                        compute.ranks,
                        links_of["machine"]["ranks"],
                        there.ranks,
                        found.step_ms,
                        target["step"]["step_ms"],
                        found.compute_ms,
                        found.reduction_ms + found.gather_ms + found.waiting_ms,
                        parts[REDUCTION] + parts[GATHER],
                    )
                )
    return checks
