"""Damage and malice for shards: an endless, reproducible supply of ways in which a data set can be wrong.

    for mutation in mutations(folder, seed=0, count=100):
        mutation.apply(copy_of_folder)
        ...

Some are accidents (flipped bits, truncation, swapped members), some are attacks (pickles, links, absurd sizes, bombs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutations import accidents, attacks, besides
from mutations.target import Files, Target

Kind = Callable[[Target], tuple[str, Files]]


@dataclass(frozen=True)
class Mutation:
    """One way in which a data set is wrong."""

    number: int
    kind: str
    detail: str
    files: Files

    def apply(self, folder: Path) -> None:
        """Change the files in `folder`, which holds what `mutations` was given."""
        for name, content in self.files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(content)

    def __str__(self) -> str:
        return f"mutation {self.number} ({self.kind}: {self.detail})"


KINDS: tuple[Kind, ...] = (
    accidents.flipped_bit,
    accidents.flipped_bits,
    accidents.damaged_header,
    accidents.overwritten,
    accidents.truncated,
    accidents.extended,
    accidents.cut_out,
    accidents.swapped_members,
    accidents.duplicated_member,
    accidents.removed_member,
    accidents.no_members,
    accidents.renamed_member,
    accidents.other_numbers,
    attacks.path_trick,
    attacks.special_member,
    attacks.extended_header,
    attacks.odd_size,
    attacks.pickled,
    attacks.object_array,
    attacks.absurd_array,
    attacks.odd_description,
    attacks.picture_bomb,
    attacks.truncated_member,
    besides.damaged_index,
    besides.hostile_index,
    besides.damaged_marker,
    besides.damaged_manifest,
    besides.odd_manifest,
    besides.missing_file,
    besides.leftover_file,
    besides.several,
)


def mutations(folder: Path, seed: int, count: int, trap: Path | None = None) -> Iterator[Mutation]:
    """`count` mutations of a folder of shards, of all kinds in turn; equal arguments give equal mutations.

    `trap` is the file that a hostile pickle would create.
    """
    manifest = (folder / "manifest.json").read_bytes()
    shards = [Path(entry["file"]).stem for entry in json.loads(manifest)["shards"]]
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name = shards[int(rng.integers(len(shards)))]
        content = [(folder / f"{name}.{suffix}").read_bytes() for suffix in ("tar", "index.npy", "done.json")]
        target = Target(rng, name, *content, manifest, trap or folder / "trap")
        kind = KINDS[number % len(KINDS)]
        detail, files = kind(target)
        if all((folder / file).exists() and (folder / file).read_bytes() == data for file, data in files.items()):
            detail, files = accidents.flipped_bit(target)  # nothing had changed
        yield Mutation(number, kind.__name__, detail, files)
