"""Two thousand ways in which a data set can be wrong: each is reported, and none does harm."""

import json
import multiprocessing
import pickle
import shutil
from collections import Counter

import pytest
from mutations import KINDS, mutations
from mutations.sets import check_valid, samples_of, write_frame_set, write_latent_set
from mutations.target import Trap
from mutations.trial import try_mutations

from data_tools.inspection.verification import verify

EACH = 1000
QUICKLY = 250  # in make test


@pytest.mark.parametrize(
    ("kind", "each"),
    [("latents", QUICKLY), *(pytest.param(kind, EACH, marks=pytest.mark.slow) for kind in ("latents", "frames"))],
)
def test_every_mutation_is_reported_and_none_does_harm(tmp_path, kind, each):
    # in a process with limited memory, an alarm clock and a ban on running code or writing files elsewhere
    result = tmp_path / "result.json"
    process = multiprocessing.get_context("spawn").Process(
        target=try_mutations, args=(kind, tmp_path / "work", 0, each, result)
    )
    process.start()
    process.join(timeout=500)
    process.kill()
    process.join()
    assert process.exitcode == 0, "crashed or hung"
    found = json.loads(result.read_text())
    assert not found["failures"], f"{len(found['failures'])} failures, the first:\n{found['failures'][0]}"
    counts = Counter(found["counts"])
    assert counts["tried"] == each
    # a manifest has no checksum of its own: what says nothing about the shards can be changed unseen
    assert counts["reported"] + counts["without consequence"] == each
    assert counts["without consequence"] < 0.01 * each
    # where the checksums were made to fit, structure and content speak for themselves
    assert counts["sealed and reported"] + counts["sealed and valid"] == counts["sealed"] > 0.8 * each
    assert counts["sealed and valid"] < 0.12 * each
    assert counts["samples kept"] > 0.7 * counts["samples"]  # what is good comes through the repair
    assert counts["training refused"] > 0.5 * each and counts["training samples replaced"] > 0.05 * each
    assert not found["trap"]
    assert found["grown_mib"] < 200
    assert found["slowest"] < 10


def test_mutations_are_reproducible_and_of_all_kinds(tmp_path):
    write_latent_set(tmp_path / "one")
    count = 3 * len(KINDS)
    first, again = (list(mutations(tmp_path / "one", 5, count, tmp_path / "trap")) for _ in range(2))
    assert first == again
    assert first != list(mutations(tmp_path / "one", 6, count, tmp_path / "trap"))
    assert Counter(mutation.kind for mutation in first) == {kind.__name__: 3 for kind in KINDS}
    for mutation in first:
        copy = tmp_path / f"copy{mutation.number}"
        shutil.copytree(tmp_path / "one", copy)
        mutation.apply(copy)
        contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "one", copy)]
        assert contents[0] != contents[1], mutation


def test_the_measuring_device(tmp_path):
    # whole sets are found whole, by both judges; the trap snaps
    for kind, write in (("latents", write_latent_set), ("frames", write_frame_set)):
        write(tmp_path / kind)
        assert verify(str(tmp_path / kind)).problems == []
        check_valid(tmp_path / kind, kind)
        assert len(samples_of(tmp_path / kind)) == 3
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()
