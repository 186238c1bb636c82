"""Some videos of a data set as pictures: read from frame shards, or decoded from latents by their AR-VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.data.shards import LATENTS_MEMBER, ShardEntry
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from ardiff.video import contact_sheet
from data_tools.inspection.sample_checks import Checked, check_sample, decode_picture
from data_tools.inspection.shard_checks import group_fault, problems_of, read_group, read_groups
from data_tools.inspection.shard_folders import Part, Problem, Rules, ShardJob
from data_tools.inspection.shard_listing import Described, sample_row

COLUMNS = 16  # frames shown of a video, the first and the last among them

Decode = Callable[[np.ndarray, np.ndarray], np.ndarray]  # latents of a video, places -> its frames there


@dataclass
class Sheet:
    """The rows of a contact sheet: what each shows, and the samples that could not be shown."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # see sample_row
    problems: list[Problem] = field(default_factory=list)


def choose_shards(part: Part, shard: str | None) -> list[ShardEntry]:
    """The shards of `part`, or the one called `shard` (with or without .tar). Raises UserError if there is none."""
    if shard is None:
        return list(part.chosen)
    found = [entry for entry in part.chosen if entry.file in (shard, f"{shard}.tar")]
    if not found:
        names = [entry.file for entry in part.chosen]
        raise UserError(f"--shard {shard}: {part.file} lists {names[0]} to {names[-1]}, but not this")
    return found


def write_sheet(path: Path, part: Part, shards: list[ShardEntry], num_videos: int, arvae: Path | None) -> Sheet:
    """Write a PNG with a row for each of `num_videos` videos, spread evenly over the shards.

    Latents are decoded by `arvae`, by default by the AR-VAE that the manifest names. Raises UserError when that cannot
    be loaded or is another one, or when no video can be shown.
    """
    decode = _decoder(part, arvae) if part.manifest.kind == "latents" else None
    sheet, videos = Sheet(), []
    rules = Rules.of(part.manifest)
    for entry, numbers in spread(shards, num_videos):
        for found in _read(ShardJob(part.folder, entry, rules), numbers):
            if isinstance(found, list):
                sheet.problems += found
                continue
            key, checked, members = found
            try:
                videos.append(_frames(checked, members, rules, decode))
            except ValueError as error:
                sheet.problems.append(Problem(str(part.folder / entry.file), f"a picture {error}", key=key))
                continue
            sheet.rows.append(sample_row(Described(key, checked.info, {}), rules.classes))
    if not videos:
        reason = sheet.problems[0] if sheet.problems else "they hold no samples"
        raise UserError(f"{part.folder}: none of the chosen videos can be shown ({reason})")
    contact_sheet(path, videos, max_columns=COLUMNS)
    return sheet


def spread(shards: list[ShardEntry], num_videos: int) -> Iterator[tuple[ShardEntry, set[int]]]:
    """Which samples of which shards, so that `num_videos` of them are as far apart as can be."""
    total = sum(entry.samples for entry in shards)
    chosen = {round(place) for place in np.linspace(0, total - 1, min(num_videos, total))}
    first = 0
    for entry in shards:
        own = {number - first for number in chosen if first <= number < first + entry.samples}
        if own:
            yield entry, own
        first += entry.samples


def _read(job: ShardJob, numbers: set[int]) -> Iterator[tuple[str, Checked, dict[str, bytes]] | list[Problem]]:
    """Key, content and members of some samples of a shard, or what is wrong with them."""
    try:
        with job.tar.open("rb") as stream:
            for number, group in enumerate(read_groups(stream, job.tar)):
                if number not in numbers:
                    continue
                fault = group_fault(group, set())
                members = {} if fault else read_group(stream, group, job.tar)
                checked = check_sample(group[0].key, members, job.rules, decode=False)
                faults = [fault] if fault else checked.faults
                yield problems_of(job.tar, group, faults) if faults else (group[0].key, checked, members)
                if number == max(numbers):
                    return
    except ShardError as error:
        yield [Problem.of(error)]
    except OSError as error:
        yield [Problem(str(job.tar), f"cannot be read ({error.strerror})")]


def _frames(checked: Checked, members: dict[str, bytes], rules: Rules, decode: Decode | None) -> np.ndarray:
    """Up to COLUMNS frames of a video, evenly spread: uint8 [F, H, W, 3]."""
    places = np.linspace(0, checked.frames - 1, min(checked.frames, COLUMNS)).round().astype(int)
    if decode is not None:
        return decode(checked.arrays[LATENTS_MEMBER], places)
    return np.stack([decode_picture(members[checked.pictures[place]], rules.size) for place in places])


def _decoder(part: Part, arvae: Path | None) -> Decode:
    # imported only where latents are decoded: torch takes seconds
    import torch

    from ardiff.data.latent_space import LatentSpace
    from ardiff.sampling.decoder import Decoder

    decoder = Decoder(LatentSpace.of(part.manifest, "none"), arvae)
    return lambda latents, places: decoder.pick(torch.from_numpy(latents.astype(np.float32)), places.tolist())
