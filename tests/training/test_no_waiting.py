"""Between reports nothing of ours waits for the device; what DeepSpeed does in its own step is its own."""

import os
import subprocess
import sys
from pathlib import Path

from data_helpers import write_latents

ROOT = Path(__file__).resolve().parents[2]

# Whatever makes the host wait for numbers of the device passes through one of these.
SCRIPT = """
import sys, traceback
from pathlib import Path
import torch
sys.path.insert(0, str(Path.cwd()))
from ardiff.config import load
from ardiff.training import distributed
from ardiff.training.engine import read_ds_config
from ardiff.training.stop import StopSignal
from ardiff.training.trainer import Trainer
from ardiff.training.watchdog import Watchdog
from launch.train import build_job

shards, run_dir = map(Path, sys.argv[1:])
settings = ["model.hidden_size=32", "model.num_heads=2", "model.depth=1", "model.tokens_per_frame=2",
            "model.num_frames=4", "train.sample_every=0", f"data.shards={shards}"]
config = load("tiny", settings)
world = distributed.start(1, 1.0)
with Watchdog(run_dir, 0, 1, 1.0) as watchdog:
    trainer = Trainer(build_job(config), run_dir, read_ds_config(Path("ds_configs/zero2_cpu.json")), world, watchdog,
                      StopSignal())
    found = []

    def watched(name):
        original = getattr(torch.Tensor, name)
        def call(self, *args, **more):
            frame = traceback.extract_stack()[-2]
            if "/ardiff/" in frame.filename and not frame.filename.endswith("stop.py"):
                found.append(f"{Path(frame.filename).name}:{frame.name}:{name}")
            return original(self, *args, **more)
        return call

    with trainer.running():
        trainer.train_step(trainer.next_batch())
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            setattr(torch.Tensor, name, watched(name))
        for _ in range(4):
            trainer.train_step(trainer.next_batch())
            trainer.agree()
        print("FOUND", sorted(set(found)))
        before = len(found)
        terms = trainer.train_step(trainer.next_batch())
        trainer.report(terms)
        print("REPORT", len(found) > before)
distributed.finish()
"""


def test_only_reports_wait_for_the_device(tmp_path):
    """The loss of the step before comes from host memory (spikes.next_loss), the flags of the ranks were never away
    from it (stop.py); a report shows that waiting would be seen.
    """
    shards = tmp_path / "latents"
    write_latents(shards)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SCRIPT, str(shards), str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "FOUND ['spikes.py:next_loss:tolist']" in result.stdout, result.stdout
    assert "REPORT True" in result.stdout
