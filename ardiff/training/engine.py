"""The DeepSpeed engine: built from our configuration and a ds_config, one call per optimizer step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardiff.config import Config
from ardiff.data.stream import GlobalBatch
from ardiff.errors import UserError
from ardiff.terms import Terms
from ardiff.training.distributed import World

log = logging.getLogger("ardiff")

# Settings that our configuration owns: in the ds_config they may only be "auto".
_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.betas, train.adam_eps and train.weight_decay",
    "scheduler": "train.phases and train.warmup_steps",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and refuse what cannot work here.

    Raises UserError naming the file and the setting.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--ds_config {path}: no such file; ds_configs/README.md lists those that come along") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--ds_config {path}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"--ds_config {path}: must be a JSON object")
    for key, owner in _OWNED.items():
        if settings.get(key, "auto") != "auto":
            raise UserError(f'--ds_config {path}: set {owner} instead of "{key}" (leave it out or give "auto")')
    _check_ds_settings(path, settings)
    return settings


def _check_ds_settings(path: Path, settings: dict[str, Any]) -> None:
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(settings.get(key, {}), dict):
            raise UserError(f'--ds_config {path}: "{key}" must be a JSON object')
    zero, bf16 = settings.get("zero_optimization", {}), bool(settings.get("bf16", {}).get("enabled"))
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        raise UserError(f"--ds_config {path}: zero_optimization.stage = {stage}; ardiff trains with stage 1 or 2")
    if stage == 1 and bf16:
        raise UserError(f"--ds_config {path}: DeepSpeed keeps no flat master weights in bf16 at stage 1; use stage 2")
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"--ds_config {path}: fp16 is not supported, use bf16 (or neither, for fp32)")
    if bf16 and settings.get("data_types", {}).get("grad_accum_dtype", "fp32") != "fp32":
        raise UserError(f"--ds_config {path}: data_types.grad_accum_dtype must be fp32")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise UserError(f"--ds_config {path}: zero_optimization.{key} is not supported; remove it")
    if zero.get("round_robin_gradients"):
        raise UserError(f"--ds_config {path}: remove round_robin_gradients, it reorders what checkpoints hold")


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches of one rank per optimizer step. Raises UserError, with the arithmetic, if not whole."""
    train = config.train
    per_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_step:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size} is no multiple of train.micro_batch_size x ranks = "
            f"{train.micro_batch_size} x {world_size} = {per_step}"
        )
    return train.global_batch_size // per_step


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: matrices decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (from 1): constant phases after a linear warm-up."""
    train = config.train
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    end = 0
    for phase in train.phases:
        end += phase.steps
        if step <= end:
            return phase.lr * warmup
    return train.phases[-1].lr * warmup


class Engine:
    """Forward, backward and optimizer step of one global batch under ZeRO-1/2."""

    def __init__(self, objective: nn.Module, config: Config, ds_settings: dict[str, Any], world: World) -> None:
        import deepspeed
        import pydantic
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.config, self.world = config, world
        self.accumulation = accumulation_steps(config, world.size)
        train = config.train
        self.ds_config = {
            **ds_settings,
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": train.grad_clip,
            "steps_per_print": 1_000_000_000,
        }
        for key in ("optimizer", "scheduler"):
            self.ds_config.pop(key, None)
        if ds_settings.get("bf16", {}).get("enabled"):
            self.ds_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        optimizer = torch.optim.AdamW(
            parameter_groups(objective, train.weight_decay),
            lr=learning_rate(config, 1),
            betas=(train.betas[0], train.betas[1]),
            eps=train.adam_eps,
            fused=world.device.type == "cuda",
        )
        try:
            self.deepspeed, _, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, config=self.ds_config)
        except (pydantic.ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"--ds_config: DeepSpeed refuses it ({' '.join(str(error).split())})") from error
        self.elements_per_frame = int(objective.elements_per_frame)  # type: ignore[arg-type]

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`, of the computation; master weights are fp32 in both."""
        return "bf16" if self.ds_config.get("bf16", {}).get("enabled") else "fp32"

    @property
    def objective(self) -> nn.Module:
        """The module being trained."""
        return self.deepspeed.module

    @property
    def skipped_steps(self) -> int:
        """Steps without an update since the run began, because gradients were not finite."""
        return self.deepspeed.skipped_steps

    def step(self, batch: GlobalBatch, step: int) -> tuple[list[Terms], bool]:
        """Train on one global batch; returns this rank's loss terms per micro-batch and whether weights changed.

        The gradient is that of (sum over unmasked elements) / (their count in the global batch).
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        # DeepSpeed averages gradients over ranks; multiplying by their number makes it the sum.
        scale = self.world.size / (batch.num_frames * self.elements_per_frame)
        all_terms: list[Terms] = []
        for micro_batch in batch.micro_batches:
            on_device = {name: part.to(self.world.device, non_blocking=True) for name, part in micro_batch.items()}
            terms: Terms = self.deepspeed(on_device)
            # DeepSpeed's coalesce_grad_reduction would reduce once per step, but it adds up micro-batches in bf16.
            self.deepspeed.backward(terms["loss"][0] * scale, scale_wrt_gas=False)
            self.deepspeed.step()  # updates at the last micro-batch only
            all_terms.append({name: (total.detach(), count) for name, (total, count) in terms.items()})
        return all_terms, self.deepspeed.was_step_applied()

    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step, before clipping."""
        return self.deepspeed.get_global_grad_norm()
