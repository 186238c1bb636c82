"""The page that TensorBoard opens on: what it shows of a run, and that TensorBoard itself finds it."""

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from ardiff.monitor.dashboard import CHARTS, Dashboard, layout, scalars

METRICS = {
    "step": 10,
    "loss": 0.5,
    "mfu": None,
    "clips_per_s": 30.0,
    "loss_by_frame": [0.1, None, 0.3],
    "grad_norm_of": {"blocks.0": 0.2},
    "validation_loss": 0.6,
    "validation_loss_by_decile": [0.7],
    "nodes": {"a": {"cpu": 1.0, "gpu": {"power_w": [1.0, 2.0, 3.0]}}},
}


class Board:
    """Keeps the layouts that it is given."""

    def __init__(self):
        self.layouts = []

    def add_custom_scalars(self, given):
        self.layouts.append(given)


def test_tags_of_a_line_of_metrics():
    assert dict(scalars(METRICS)) == {
        "train/loss": 0.5,
        "speed/clips_per_s": 30.0,
        "loss_by_frame/00": 0.1,
        "loss_by_frame/02": 0.3,
        "grad_norm_of/blocks.0": 0.2,
        "validation/loss": 0.6,
        "validation/loss_by_decile/00": 0.7,
    }


def test_only_charts_that_have_something_to_show():
    found = layout({"train/loss", "validation/psnr", "gpu/power_w/n1.0", "host/cpu/n1"})
    assert {category: list(charts) for category, charts in found.items()} == {
        "Training": ["loss"],
        "Auto-encoder": ["PSNR, held out (dB)"],
        "GPUs": ["power (W)"],
        "Hosts": ["processors (%)"],
    }
    assert found["Training"]["loss"] == ["Multiline", ["^train/loss$", "^validation/loss$"]]
    assert layout({"unknown"}) == {}


def test_every_pattern_is_one():
    patterns = [pattern for titles in CHARTS.values() for patterns in titles.values() for pattern in patterns]
    assert all(re.compile(pattern) for pattern in patterns)
    assert len(patterns) == len(set(patterns))


def test_the_page_is_written_when_it_changes():
    board = Board()
    dashboard = Dashboard(board)
    dashboard.see(["train/loss", "train/lr"])
    dashboard.see(["train/loss", "train/lr"])
    dashboard.see(["train/loss", "nothing/to/show"])
    assert len(board.layouts) == 1
    dashboard.see(["validation/psnr"])
    assert board.layouts[1] == layout({"train/loss", "train/lr", "validation/psnr"})


def test_tensorboard_reads_the_last_page_of_a_resumed_run(tmp_path):
    from ardiff.monitor.writers import MetricsWriter

    line = METRICS | {"grad_norm": 0.1, "lr": 1e-3, "data_wait_frac": 0.0}
    for first, step in ((1, 10), (11, 11)):
        writer = MetricsWriter(tmp_path, first, 20)
        without = {key: value for key, value in line.items() if "validation" not in key or step == 10}
        writer.write(without | {"step": step})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    page = layout_pb2.Layout()
    page.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in page.category}
    assert charts["Training"][0] == "loss" and "clips per second" in charts["Throughput"]
    assert "held out, by decile of the timestep" in charts["Loss by noise level and by frame"]  # of before
    tags = events.Tags()["scalars"]
    shown = [tag for category in page.category for chart in category.chart for tag in chart.multiline.tag]
    assert all(any(re.match(pattern, tag) for tag in tags) for pattern in shown if "lr" not in pattern)
