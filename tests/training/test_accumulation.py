"""Micro-batches are added up in fp32 even when the model computes in bf16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# 1 + 255 * 2**-10 = 1.2490: in bf16 every one of the small gradients would be rounded away.
SCRIPT = """
import torch
from ardiff.config import load
from ardiff.data.stream import GlobalBatch
from ardiff.training import distributed
from ardiff.training.engine import Engine, read_ds_config
from pathlib import Path

class Objective(torch.nn.Module):
    elements_per_frame = 1
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))
    def forward(self, batch):
        return {"loss": ((self.weight * batch["gradient"].to(self.weight.dtype)).sum(), torch.ones(()))}

world = distributed.start(1, 1.0)
config = load("tiny", ["train.global_batch_size=256", "train.micro_batch_size=1", "train.grad_clip=0"])
engine = Engine(Objective(), config, read_ds_config(Path("ds_configs/zero2.json")), world)
gradients = [1.0] + [2.0**-10] * 255
micro_batches = [{"gradient": torch.full((4, 4), value)} for value in gradients]
_, applied = engine.step(GlobalBatch(0, 256, 1, micro_batches), 1)
assert applied.network and applied.everything and engine.precision == "bf16"
print("NORM", float(engine.grad_norm()))
distributed.finish()
"""


def test_bf16_micro_batches_are_added_up_in_fp32():
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    norm = float(result.stdout.split("NORM")[1])
    assert norm == pytest.approx(4 * (1 + 255 * 2**-10), rel=1e-3)  # of 16 equal gradients
