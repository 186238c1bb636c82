"""A training state without DeepSpeed: what its optimizer holds, made by hand, for tests of what is saved of it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ardiff.training.checkpoint import State
from ardiff.training.distributed import World
from ardiff.training.ema import ShardedEMA
from ardiff.training.flat import FlatState

SHAPES = ((3, 5), (1,), (7,), (2, 2, 3))
DECAYS = (0.9, 0.05)


class FakeZero:
    """The parts of DeepSpeed's ZeRO optimizer that FlatState and ShardedEMA read, for one group."""

    def __init__(self, parameters: list[torch.Tensor], world: int, rank: int, align: int) -> None:
        offsets, end = [], 0
        for parameter in parameters:
            end += -end % align
            offsets.append(end)
            end += parameter.numel()
        size = -(-end // (2 * world)) * 2
        padded = torch.full((size * world,), -1.0)
        for parameter, offset in zip(parameters, offsets, strict=True):
            padded[offset : offset + parameter.numel()] = parameter.flatten()
        self.round_robin_bit16_groups = [parameters]
        self.round_robin_bit16_offsets = [offsets]
        self.partition_size = [size]
        self.single_partition_of_fp32_groups = [padded[rank * size : (rank + 1) * size].clone().requires_grad_()]
        self.optimizer = torch.optim.AdamW(self.single_partition_of_fp32_groups, lr=0.1)
        self.gathered = 0

    def update_lp_params(self) -> None:
        self.gathered += 1


def counting_parameters() -> list[torch.Tensor]:
    """Parameters whose canonical vector is 0, 1, 2, ..."""
    parts = torch.arange(sum(torch.Size(shape).numel() for shape in SHAPES), dtype=torch.float32)
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.reshape(shape) for part, shape in zip(parts.split(sizes), SHAPES, strict=True)]


class TinyRun:
    """One rank's training state, and steps that change all of it as a function of the step alone."""

    def __init__(self, rank: int, size: int, decays: tuple[float, ...] = DECAYS) -> None:
        parameters = counting_parameters()
        self.size = size
        self.zero = FakeZero(parameters, size, rank, align=4)
        self.flat = FlatState([self.zero], {id(tensor): f"network.p{i}" for i, tensor in enumerate(parameters)}, rank)
        self.ema = ShardedEMA(self.zero, decays)
        self.objective = torch.nn.BatchNorm1d(3)
        self.step = 0

    def train(self) -> None:
        """One step: masters, moments, averages and buffers change."""
        self.step += 1
        master = self.zero.single_partition_of_fp32_groups[0]
        master.grad = torch.sin(master.detach() + self.step)
        self.zero.optimizer.step()
        self.ema.update([True])
        self.objective.running_mean += 0.5

    def state(self) -> State:
        """Of this moment; with the very lists that training goes on changing."""
        return State(
            step=self.step,
            samples=8 * self.step,
            skipped_steps=0,
            adam_steps=self.flat.adam_steps(),
            ema_updates=self.ema.num_updates,
            ema_decays=self.ema.decays,
            seed=0,
            order="global",
            data_identity="d",
            precision="fp32",
            world_size=self.size,
            layout=self.flat.layout,
            versions={"torch": torch.__version__},
        )

    def contents(self) -> dict[str, torch.Tensor]:
        """A copy of everything that a checkpoint restores."""
        tensors = self.flat.export(self.ema.vectors())
        return tensors | {name: buffer.clone() for name, buffer in self.objective.named_buffers()}


def join_world() -> World:
    """The World of a process group that has been initialised, on the CPU."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size, torch.device("cpu"), dist.new_group(backend="gloo"))
