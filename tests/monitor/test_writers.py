"""metrics.jsonl and TensorBoard files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ardiff.errors import UserError
from ardiff.monitor.writers import MetricsWriter, lines_before


def report(step: int, **extra) -> dict:
    values = {"step": step, "loss": 1 / 3 / step, "grad_norm": 0.1, "lr": 1e-3, "clips_per_s": 2.0}
    return {**values, "data_wait_frac": 0.0, "mfu": None, **extra}


def write(folder: Path, first: int, last: int) -> None:
    writer = MetricsWriter(folder, first, 10)
    for step in range(first, last + 1):
        writer.write(report(step, loss_by_frame=[0.1 * step, None]))
    writer.close()


def test_floats_read_back_bit_exactly(tmp_path):
    write(tmp_path, 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1 / 3 / step for step in (1, 2, 3)]
    assert lines[1]["loss_by_frame"] == [0.2, None]


def test_not_a_number_is_still_json(tmp_path):
    writer = MetricsWriter(tmp_path, 1, 10)
    writer.write(report(1, loss=math.nan, grad_norm=math.inf))
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert math.isnan(float(line["loss"])) and float(line["grad_norm"]) == math.inf


def test_resume_cuts_later_lines_and_half_lines(tmp_path):
    write(tmp_path, 1, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    write(tmp_path, 4, 5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_lines_before_stops_at_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert lines_before(path, 5) == []
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    assert lines_before(path, 5) == ['{"step": 1}\n']


def test_tensorboard_forgets_purged_steps_and_shows_videos(tmp_path):
    write(tmp_path, 1, 6)
    writer = MetricsWriter(tmp_path, 4, 10)
    writer.write(report(4))
    frames = np.zeros((3, 8, 6, 3), np.uint8)
    frames[1] = 200
    writer.add_video("samples/00", frames, 4, 8.0)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    picture = events.Images("samples/00")[0]
    assert picture.encoded_image_string[:4] == b"GIF8" and (picture.height, picture.width) == (8, 6)


def test_figures_of_held_out_data_have_charts_of_their_own(tmp_path):
    writer = MetricsWriter(tmp_path, 1, 10)
    writer.write(report(1, validation_psnr=21.5))
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"validation/psnr", "train/loss"} <= set(board.Tags()["scalars"])
    assert board.Scalars("validation/psnr")[0].value == 21.5


def test_a_full_disk_is_told_with_the_file(tmp_path):
    writer = MetricsWriter(tmp_path, 1, 10)
    writer.write(report(1))
    writer._lines.close()
    writer._lines = Path("/dev/full").open("w")  # noqa: SIM115 - every flush fails with ENOSPC
    with pytest.raises(UserError, match=r"/dev/full: cannot be written .* make room and start again"):
        writer.write(report(2))
    writer.close()
