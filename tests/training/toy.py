"""A small objective under the real engine, and programs of it on one or two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardiff.config import load
from ardiff.data.stream import GlobalBatch
from ardiff.training.distributed import World
from ardiff.training.engine import Engine
from ardiff.training.flat import FlatState

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8


class Toy(nn.Module):
    """A residual network and its squared error: 5 numbers in, 3 out."""

    elements_per_frame = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Module()
        self.network.embed = nn.Linear(5, 7)
        self.network.blocks = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])
        self.network.final = nn.Linear(7, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        x = self.network.embed(batch["x"].to(self.network.embed.weight.dtype))
        for block in self.network.blocks:
            x = x + torch.tanh(block(x))
        error = (self.network.final(x).float() - batch["y"]) ** 2
        return {"loss": (error.sum(), torch.tensor(float(error.numel())))}


def build(world: World, stage: int, accumulation: int = 1, bf16: bool = False) -> Engine:
    micro_batch = BATCH // world.size // accumulation
    sizes = [f"train.global_batch_size={BATCH}", f"train.micro_batch_size={micro_batch}"]
    config = load("tiny", [*sizes, "train.grad_clip=0.5", "train.warmup_steps=3", "train.weight_decay=0.1"])
    return Engine(Toy(), config, {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}, world)


def samples(step: int) -> dict[str, Tensor]:
    """The global batch of a step: x [8, 5], y [8, 3]."""
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(BATCH, 5, generator=generator), "y": 3 * torch.randn(BATCH, 3, generator=generator)}


def train(engine: Engine, step: int, measure: bool = False, broken: bool = False) -> tuple[float, bool]:
    """One optimizer step -> loss of the global batch, whether weights changed. broken: with a target that is not
    finite, on the last rank only.
    """
    world = engine.world
    share = BATCH // world.size
    data = samples(step)
    if broken:
        data["y"][-1] = torch.nan
    mine = {name: part[world.rank * share :][:share].split(share // engine.accumulation) for name, part in data.items()}
    micro_batches = [{"x": x, "y": y} for x, y in zip(mine["x"], mine["y"], strict=True)]
    terms, applied = engine.step(GlobalBatch(0, BATCH, BATCH, micro_batches), step, measure)
    assert applied.network == applied.everything
    return float(world.sum(sum(part["loss"][0] for part in terms).double())), applied.network


def flat_state(engine: Engine) -> FlatState:
    return FlatState(engine.optimizers, engine.parameter_names(), engine.world.rank)


def export(engine: Engine) -> dict[str, Any]:
    """The canonical vectors in full, and Adam's step counts (collective)."""
    flat = flat_state(engine)
    slices = flat.export({}, lambda _name, length, like: torch.empty(length, dtype=like.dtype))
    whole: dict[str, Any] = {}
    for of_rank in engine.world.gather({name: part.tolist() for name, part in slices.items()}):
        for name, part in of_rank.items():
            whole[name] = whole.get(name, []) + part
    return {"vectors": whole, "adam_steps": flat.adam_steps()}


def restore(engine: Engine, state: dict[str, Any]) -> None:
    """What `export` gave, of any stage and number of ranks (collective)."""
    flat = flat_state(engine)
    flat.load(lambda name, start, end: torch.tensor(state["vectors"][name][start:end]), state["adam_steps"])
    flat.publish()


def run_ranks(program: str, ranks: int, folder: Path) -> Any:
    """What rank 0 of a program prints as JSON after the word RESULT; it finds a `world` and this module's names."""
    lines = ["import json, sys, torch", f"sys.path.insert(0, {str(Path(__file__).parent)!r})", "from toy import *"]
    lines += ["from ardiff.training import distributed", "world = distributed.start(1, 1.0)", program]
    path = folder / f"program_{ranks}.py"
    path.write_text("\n".join([*lines, "world.barrier()", "distributed.finish()"]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(path)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.split("RESULT")[1])
