"""The benchmarks run, at a size that measures nothing but the order of the data, and print their tables."""

import re

import pytest

from tests.benchmarks import autoencoder, checkpointing, data_loader, data_preparation, sampling, start_and_resume


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells of every table, by its title."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        found[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return found


def test_loader(capsys):
    assert data_loader.main(["--quick"]) == 0  # otherwise a check of the order fails
    found = tables(capsys.readouterr().out)
    assert [row[1] for row in found["Order"]] == ["holds"] * 9
    ratios = {row[0]: float(row[4]) for row in found["Readers, latents only"]}
    assert ratios["ardiff"] == 1 and len(ratios) >= 8
    plain = [ratio for name, ratio in ratios.items() if name.startswith("webdataset") and "12 clips" not in name]
    assert min(plain) > 1  # ours is faster than plain webdataset
    assert found["Aims"] and found["Our loader"] and found["Parts of a training batch, one thread"]


def test_start_and_resume(capsys):
    assert start_and_resume.main(["--quick"]) == 0  # otherwise a resume takes a second more than a cold start
    found = tables(capsys.readouterr().out)
    assert len(found.pop("Start: open_data")) == 4
    assert [len(rows) for rows in found.values()] == [6, 6]


@pytest.mark.launcher
def test_sampling(capsys):
    assert sampling.main(["--quick", "--cached_rows", "4"]) == 0
    counts = [row[:4] for row in tables(capsys.readouterr().out)["Sampling"]]
    # F, s, S F + (F - 1) frame-forwards with the cache (S F at s = 0), (S + s (F - 1)) F without
    assert counts == [
        ["4", "0", "200", "200"],
        ["4", "50", "203", "800"],
    ]


@pytest.mark.slow
@pytest.mark.launcher
def test_preparation(capsys):
    assert data_preparation.main(["--quick"]) == 0
    found = tables(capsys.readouterr().out)
    assert len(found["Decoding, one process"]) == 4
    rates = {row[0]: row[1] for row in found["Programs, start included"]}
    assert len(rates) == 3 and all(rate != "0" for rate in rates.values())


@pytest.mark.launcher
def test_autoencoder(capsys):
    assert autoencoder.main(["--quick", "--frames", "4"]) == 0
    (row,) = tables(capsys.readouterr().out)["Auto-encoders: frames per second, clips of 4 frames"]
    assert row[:3] == ["arvae_tiny_stages", "0.3 M", "0.1 M"] and all(float(rate) > 0 for rate in row[6:])


@pytest.mark.launcher
def test_checkpointing(capsys):
    assert checkpointing.main(["--quick"]) == 0
    found = tables(capsys.readouterr().out)
    steps = sum(int(row[1]) for row in found["Steps of tiny, global batch 1"])
    assert steps == 7  # 12, but for 4 that warm up and the last, whose end is not seen
    lost = found["Time lost to a checkpoint every 4 steps"]
    assert all(row[1].endswith(" %") for row in lost) and len(lost) == 2
