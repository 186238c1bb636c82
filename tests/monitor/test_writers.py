"""metrics.jsonl and TensorBoard files."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from ardiff.errors import UserError
from ardiff.monitor.writers import Details, MetricsWriter, _quieten_tensorboard, lines_before


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


def test_the_ranks_lines_are_cut_with_the_metrics(tmp_path):
    for first, last in ((1, 6), (4, 5)):
        writer = MetricsWriter(tmp_path, first, 10)
        for step in range(first, last + 1):
            writer.write(report(step), Details({"step": step, "forward_ms": [float(first), 0.5]}))
        writer.close()
        with (tmp_path / "logs" / "ranks.jsonl").open("a") as file:
            file.write('{"step": 7, "forw')
    lines = lines_before(tmp_path / "logs" / "ranks.jsonl", 99)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [json.loads(line)["forward_ms"][0] for line in lines] == [1.0, 1.0, 1.0, 4.0, 4.0]
    assert "forward_ms" not in (tmp_path / "metrics.jsonl").read_text()


def test_charts_and_extremes_of_the_nodes(tmp_path):
    writer = MetricsWriter(tmp_path, 1, 10)
    nodes = {"n1": {"cpu": 5.0, "gpu": {"power_w": [1.0, 2.0, 3.0]}}}
    writer.write(report(1, nodes=nodes), Details(charts={"gpu/power_w/n1.0": 300.0}, extremes="| a | b |"))
    writer.add_picture("schedule/a", np.full((4, 6, 3), 99, np.uint8), 0)
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["nodes"] == nodes
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = board.Tags()
    assert board.Scalars("gpu/power_w/n1.0")[0].value == 300.0
    assert not [tag for tag in tags["scalars"] if "nodes" in tag]
    assert "nodes/extremes/text_summary" in tags["tensors"]
    assert (board.Images("schedule/a")[0].height, board.Images("schedule/a")[0].width) == (4, 6)


def test_errors_of_tensorboards_thread_are_hidden_once(tmp_path):
    before = threading.excepthook
    for _ in range(3):
        MetricsWriter(tmp_path, 1, 10).close()
        hook = threading.excepthook
    MetricsWriter(tmp_path, 1, 10).close()
    assert threading.excepthook is hook  # rollbacks open many writers
    seen = []
    _quieten_tensorboard.cache_clear()
    threading.excepthook = lambda found: seen.append(found.exc_type)
    try:
        _quieten_tensorboard()
        for kind, thread in ((OSError, _AsyncWriterThread), (ValueError, _AsyncWriterThread), (OSError, object)):
            threading.excepthook(threading.ExceptHookArgs((kind, kind(), None, thread.__new__(thread))))
        assert seen == [ValueError, OSError]
    finally:
        threading.excepthook = before
        _quieten_tensorboard.cache_clear()


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
