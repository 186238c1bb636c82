"""Counting GPUs without a framework."""

import pytest

from ardiff.launching import devices


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,2", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4), ("GPU-1b2c,GPU-3d4e", 2), ("MIG-1,MIG-2,MIG-3", 3)],
)
def test_visible_gpus_are_counted(tmp_path, monkeypatch, visible, count):
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpus() == count


def test_there_are_none_without_a_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "missing")
    assert devices.gpus() == 0
