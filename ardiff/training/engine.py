"""The DeepSpeed engine: built from our configuration and a ds_config, one call per optimizer step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ardiff.config import Config
from ardiff.data.stream import GlobalBatch
from ardiff.errors import UserError
from ardiff.terms import Terms
from ardiff.training.adamw import FreezingAdamW, import_muon_uncompiled, parameter_groups
from ardiff.training.adversary import Adversary, DiscriminatorObjective
from ardiff.training.checkpoint import ADVERSARY
from ardiff.training.distributed import World
from ardiff.training.grad_norms import LayerNorms, gather_layer_norms
from ardiff.training.replicated import ReplicatedAdamW

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
    if "bfloat16" in settings:
        raise UserError(f'--ds_config {path}: "bfloat16" is an old name; write "bf16"')
    zero, bf16 = settings.get("zero_optimization", {}), bool(settings.get("bf16", {}).get("enabled"))
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2):
        raise UserError(f"--ds_config {path}: zero_optimization.stage = {stage}; ardiff trains with stage 0, 1 or 2")
    if stage == 0 and bf16:
        raise UserError(
            f"--ds_config {path}: zero_optimization.stage = 0 is for fp32: DeepSpeed's bf16 without ZeRO deviates "
            "from it far more than stage 2's; use stage 2, or remove bf16"
        )
    if stage == 1 and bf16:
        raise UserError(f"--ds_config {path}: DeepSpeed keeps no flat master weights in bf16 at stage 1; use stage 2")
    if settings.get("bf16", {}).get("check_grad_overflow") is False:
        raise UserError(
            f"--ds_config {path}: remove bf16.check_grad_overflow: steps that are not finite would be taken"
        )
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"--ds_config {path}: fp16 is not supported, use bf16 (or neither, for fp32)")
    if settings.get("data_types", {}).get("grad_accum_dtype", "fp32") != "fp32":
        raise UserError(f"--ds_config {path}: data_types.grad_accum_dtype must be fp32")
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):
        offload = zero.get(key)
        if offload and not (isinstance(offload, dict) and offload.get("device") in (None, "none")):
            raise UserError(f"--ds_config {path}: zero_optimization.{key} is not supported; remove it")
    if zero.get("round_robin_gradients"):
        raise UserError(f"--ds_config {path}: remove round_robin_gradients, it reorders what checkpoints hold")


def _replicates(settings: dict[str, Any]) -> bool:
    """Whether a ds_config shards nothing (stage 0)."""
    return settings.get("zero_optimization", {}).get("stage", 0) == 0


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


class Applied(NamedTuple):
    """What a step changed: nothing where gradients were not finite."""

    network: bool
    everything: bool  # the discriminator too, where there is one


def warm_up(config: Config, step: int) -> float:
    """The share of its learning rate that optimizer step `step` (from 1) has."""
    return min(1.0, step / config.train.warmup_steps) if config.train.warmup_steps else 1.0


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (from 1): constant phases after a linear warm-up."""
    return config.phase_of(step).lr * warm_up(config, step)


class Engine:
    """Forward, backward and optimizer step of one global batch under ZeRO-0/1/2.

    discriminator: makes the stage `adversarial` possible; see `Adversary`.
    forward_timer: a context that is entered around each forward pass of the network; may be set.
    """

    def __init__(
        self,
        objective: nn.Module,
        config: Config,
        ds_settings: dict[str, Any],
        world: World,
        discriminator: nn.Module | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.forward_timer: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.accumulation = accumulation_steps(config, world.size)
        train = config.train
        self.ds_config = {
            **ds_settings,
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if _replicates(ds_settings) else train.grad_clip,  # then our optimizer clips
            "steps_per_print": 1_000_000_000,
        }
        for key in ("optimizer", "scheduler"):
            self.ds_config.pop(key, None)
        if ds_settings.get("bf16", {}).get("enabled"):
            self.ds_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        groups = parameter_groups(objective, train.weight_decay)
        self._parameters: list[list[nn.Parameter]] = [group["params"] for group in groups]
        self.deepspeed = self._initialize(objective, groups)
        self.adversary: Adversary | None = None
        if discriminator is not None:
            module = DiscriminatorObjective(discriminator)
            self.adversary = Adversary(
                self._initialize(module, parameter_groups(module, train.weight_decay)), world.rank
            )
        self._layers = LayerNorms(self.optimizers[0], self.parameter_names(), world.rank)
        self.elements_per_frame = int(objective.elements_per_frame)  # type: ignore[arg-type]

    def _initialize(self, module: nn.Module, groups: list[dict[str, Any]]) -> Any:
        """A DeepSpeed engine of this module and these groups of its parameters."""
        import deepspeed
        import pydantic
        from deepspeed.runtime.config import DeepSpeedConfigError
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        import_muon_uncompiled()
        train = self.config.train
        settings: dict[str, Any] = {
            "lr": learning_rate(self.config, 1),
            "betas": (train.betas[0], train.betas[1]),
            "eps": train.adam_eps,
            "fused": self.world.device.type == "cuda",
        }
        optimizer: Any
        if _replicates(self.ds_config):
            world = self.world

            def optimizer(_: Any) -> ReplicatedAdamW:  # called when the parameters are on the device, and rank 0's
                return ReplicatedAdamW(groups, train.grad_clip, world.rank, world.size, **settings)
        else:
            if FreezingAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # which are compared by type
                ZERO_SUPPORTED_OPTIMIZERS.append(FreezingAdamW)
            optimizer = FreezingAdamW(groups, **settings)
        try:
            return deepspeed.initialize(model=module, optimizer=optimizer, config=dict(self.ds_config))[0]
        except (pydantic.ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"--ds_config: DeepSpeed refuses it ({' '.join(str(error).split())})") from error

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`, of the computation; master weights are fp32 in both."""
        return "bf16" if self.ds_config.get("bf16", {}).get("enabled") else "fp32"

    @property
    def objective(self) -> nn.Module:
        """The module being trained."""
        return self.deepspeed.module

    @property
    def optimizers(self) -> list[Any]:
        """Of the network and then of the discriminator: ZeRO's, or at stage 0 ours, which look alike."""
        return [self.deepspeed.optimizer] + ([self.adversary.deepspeed.optimizer] if self.adversary else [])

    def parameter_names(self) -> dict[int, str]:
        """id of every parameter -> its name in checkpoints."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        if self.adversary is not None:
            names |= {id(p): f"{ADVERSARY}{name}" for name, p in self.adversary.network.named_parameters()}
        return names

    @property
    def skipped_steps(self) -> int:
        """Steps without an update since the run began, because gradients were not finite."""
        return self.deepspeed.skipped_steps

    def learns(self) -> list[bool]:
        """Which groups of the network's parameters are not frozen."""
        return [any(parameter.requires_grad for parameter in parameters) for parameters in self._parameters]

    def _set_learning_rates(self, step: int) -> None:
        lr = learning_rate(self.config, step)
        for learns, group in zip(self.learns(), self.deepspeed.optimizer.param_groups, strict=True):
            group["lr"] = lr if learns else 0.0
        if self.adversary is not None:
            own = self.config.vae.discriminator_lr * warm_up(self.config, step)
            self.adversary.set_learning_rate(own or lr)

    def step(self, batch: GlobalBatch, step: int, measure_layers: bool = False) -> tuple[list[Terms], Applied]:
        """Train on one global batch; returns this rank's loss terms per micro-batch and which weights changed.

        The gradient is that of (sum over unmasked elements) / (their count in the global batch).

        measure_layers: makes `layer_norms` of this step known; the same on all ranks.
        """
        self._set_learning_rates(step)
        self._layers.forget()
        if self.adversary is not None:
            self.adversary.layers.forget()
        adversary = self.adversary if self.config.phase_of(step).stage == "adversarial" else None
        extra = {} if adversary is None else {"judge": adversary.judge, "trust": self.config.adversarial_ramp(step)}
        # DeepSpeed averages gradients over ranks; multiplying by their number makes it the sum.
        scale = self.world.size / (batch.num_frames * self.elements_per_frame)
        all_terms: list[Terms] = []
        for micro_batch in batch.micro_batches:
            on_device = {name: part.to(self.world.device, non_blocking=True) for name, part in micro_batch.items()}
            with self.forward_timer():
                terms: Terms = self.deepspeed(on_device, **extra)
            # DeepSpeed's coalesce_grad_reduction would reduce once per step, but it adds up micro-batches in bf16.
            self.deepspeed.backward(terms["loss"][0] * scale, scale_wrt_gas=False)
            last = self.deepspeed.is_gradient_accumulation_boundary()
            if measure_layers and last:
                self._layers.measure()
            self.deepspeed.step()  # updates at the last micro-batch only
            if adversary is not None:
                terms = {
                    **terms,
                    **adversary.learn(
                        on_device["video"],
                        on_device["mask"],
                        self.world.size / batch.num_frames,
                        measure_layers and last,
                    ),
                }
            all_terms.append({name: (total.detach(), count) for name, (total, count) in terms.items()})
        network = self.deepspeed.was_step_applied()
        return all_terms, Applied(network, network and (adversary is None or adversary.deepspeed.was_step_applied()))

    def layer_norms(self) -> dict[str, float]:
        """Gradient norm of the last step by layer, before clipping, the discriminator's as `discriminator.LAYER`
        (collective); empty unless that step was measured, infinite where gradients were not finite.
        """
        parts = [self._layers] + ([self.adversary.layers] if self.adversary else [])
        return gather_layer_norms(parts, self.world)

    def grad_norm(self) -> Tensor | float:
        """Global gradient norm of the last step, before clipping."""
        return self.deepspeed.get_global_grad_norm()
