"""Memory by kind and the time of a step, from the configuration alone: what to expect before anything has run.

Memory is that of one rank under DeepSpeed's ZeRO (0.19), with what it holds at the end of a backward pass, when
activations and gradients meet. Everything is closed arithmetic; `tests/monitor/test_estimates.py` compares it with
counted tensors and with what the engine holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ardiff.config import Config, ModelConfig
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.monitor.throughput import TRAINING, context_tokens, dit_block_flops, dit_flops

GIB = 2**30
FP32 = 4
BYTES = {"bf16": 2, "fp32": FP32}
BUCKET = 50_000_000  # elements of ZeRO's reduce bucket: the default of ds_configs/
DEEPSPEED_BUCKET = 500_000_000  # what DeepSpeed takes where the ds_config says nothing
STEP_SHARE = 0.6  # of a plain matrix product's rate that a whole training step is assumed to reach


@dataclass(frozen=True)
class Zero:
    """What of a ds_config decides memory and traffic. bucket: elements."""

    precision: str  # bf16 or fp32
    stage: int
    bucket: int
    overlap: bool

    @classmethod
    def of(cls, ds_settings: dict[str, Any]) -> Zero:
        """With DeepSpeed's defaults where nothing is said."""
        zero = ds_settings.get("zero_optimization", {})
        return cls(
            precision="bf16" if ds_settings.get("bf16", {}).get("enabled") else "fp32",
            stage=int(zero.get("stage", 0)),
            bucket=int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)),
            overlap=bool(zero.get("overlap_comm", False)),
        )


def memory_under(
    config: Config,
    ds_settings: dict[str, Any],
    world_size: int,
    on_gpu: bool | None = None,
    num_context: int | None = None,
) -> dict[str, float]:
    """`memory` of a configuration as it is, under a ds_config."""
    zero = Zero.of(ds_settings)
    return memory(
        config,
        world_size,
        zero.precision,
        zero.stage,
        bucket=zero.bucket,
        overlap=zero.overlap,
        on_gpu=on_gpu,
        num_context=num_context,
    )


def num_parameters(config: Config) -> int:
    """Trained parameters of the diffusion transformer."""
    with torch.device("meta"):
        network = build_dit(config.model, config.diffusion.prediction)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def memory(
    config: Config,
    world_size: int,
    precision: str,
    stage: int = 2,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool | None = None,
    *,
    bucket: int = BUCKET,
    overlap: bool = False,
    on_gpu: bool | None = None,
    num_context: int | None = None,
) -> dict[str, float]:
    """GiB of one rank's device by kind: weights, gradients, optimizer, ema, activations, buffers, total.

    precision: `bf16` or `fp32`, of the computation; master weights, moments and averages are fp32 in both.
    stage: of ZeRO, 0 to 2; below 2 in fp32 only, otherwise UserError.
    bucket, overlap: reduce_bucket_size (elements) and overlap_comm of the ds_config.
    on_gpu: which kernels run, as some keep less for the backward pass (None: whether there is a GPU).
    num_context: tokens of text in front of the frames, as for `dit_flops`.
    micro_batch_size, activation_checkpointing: instead of the configuration's.
    """
    if stage < 2 and precision == "bf16":
        raise UserError(f"zero_optimization.stage = {stage} is for fp32; use stage 2 for bf16")
    parameters, ranks, width = num_parameters(config), world_size, BYTES[precision]
    micro_batch = micro_batch_size or config.train.micro_batch_size
    averages = 1 + len(config.train.extra_ema_decays)
    kept = activation_bytes(config.model, micro_batch, precision, activation_checkpointing, on_gpu, num_context)
    sharded = parameters / ranks
    if stage == 0:  # master weights are the weights, moments are whole on every rank, averages are cut
        gradients, optimizer = float(FP32 * parameters), 2.0 * FP32 * parameters
    else:  # the optimizer's are master weights and two moments
        gradients, optimizer = _gradients(parameters, ranks, precision, stage), 3 * FP32 * sharded
    sizes = {
        "weights": width * parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "ema": averages * FP32 * sharded,
        "activations": kept,
        "buffers": _buffers(parameters, ranks, width, stage, bucket, overlap),
    }
    gib = {kind: size / GIB for kind, size in sizes.items()}
    return {**gib, "total": sum(gib.values())}


def _gradients(parameters: int, ranks: int, precision: str, stage: int) -> float:
    """Bytes of gradients that outlive a micro-batch.

    Stage 2, bf16: an fp32 accumulator of this rank's slice, which the optimizer reads as it is. fp32: this slice, and
    a second one of the micro-batch before or, flattened, for the optimizer. Stage 1 reduces at the last micro-batch
    only, so all gradients stay until then.
    """
    slices = FP32 * parameters / ranks * (1 if precision == "bf16" else 2)
    return slices if stage == 2 else FP32 * parameters + slices


def _buffers(parameters: int, ranks: int, width: int, stage: int, bucket: int, overlap: bool) -> float:
    """Bytes of ZeRO's reduce bucket (two with overlap), and of the flat copy of it that is sent."""
    if stage == 0:
        return 0.0
    sent = min(bucket, parameters)
    return width * (bucket * (2 if overlap else 1) + (sent if ranks > 1 or stage == 2 else 0))


def activation_bytes(
    config: ModelConfig,
    batch: int,
    precision: str,
    checkpointing: bool | None = None,
    on_gpu: bool | None = None,
    num_context: int | None = None,
) -> float:
    """Bytes of the tensors that the network keeps for its backward pass, of a micro-batch.

    With activation checkpointing the inputs of the blocks, and those of one block in full while it is recomputed.
    """
    checkpointing = config.activation_checkpointing if checkpointing is None else checkpointing
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    width, frames = BYTES[precision], config.num_frames
    tokens, context = frames * config.tokens_per_frame, context_tokens(config, num_context)
    rows = batch * tokens * config.hidden_size * width
    block = _block_bytes(config, batch, width, on_gpu, context)
    # Ends: the embedded time step (a row per frame), the last norm, what it is modulated to, and the objective's.
    ends = 3 * rows + batch * frames * (6 * config.hidden_size + 256) * width + 4 * batch * tokens * FP32
    ends += 3 * batch * tokens * config.in_channels * FP32
    features = config.reference.context_dim if config.architecture == "reference" else config.context_dim
    ends += batch * context * features * width
    if checkpointing:
        return config.depth * rows + block + ends
    return config.depth * block + ends


def _block_bytes(config: ModelConfig, batch: int, width: int, on_gpu: bool, context: int) -> float:
    """Bytes that one block keeps: multiples of [B, T, D] (T: tokens of context and frames), and what is smaller.

    5 around attention (input, normed, modulated, its output, projected), qkv 3, 4 around the MLP (its residual, normed,
    modulated, output) and twice its hidden width. q and k once more after the norm or rotation (some published networks
    have neither), and then, on CPUs, the output once more, contiguous. Our norm of q and k keeps its input and result
    in fp32 where it is no single kernel (CPUs); that of the published networks always is one.
    """
    reference = config.architecture == "reference"
    rotary = not reference or config.reference.positions == "rotary"
    turned = rotary or config.qk_norm
    frames, hidden, heads = config.num_frames, config.hidden_size, config.num_heads
    tokens = context + frames * config.tokens_per_frame
    rows = batch * tokens * hidden
    kept = 5 + 3 + 4 + 2 * config.mlp_ratio
    if turned:
        kept += 2 if on_gpu else 3
    if reference and config.reference.merge_mode == "sharenorm_shift_first_t":
        kept += 2  # context tokens are modulated by themselves
    size = rows * kept * width
    per_token = 2 * 2 * FP32  # mean and deviation of two layer norms
    if config.qk_norm:
        per_token += (2 if reference else 1) * 2 * heads * FP32
        if not on_gpu and not reference:
            size += 2 * rows * FP32 * (1 if width == FP32 else 2)
    per_token += heads * FP32  # log-sum-exp of attention
    size += batch * tokens * per_token
    modulated = 1 if reference and config.reference.merge_mode == "reproduce" else frames
    size += batch * modulated * hidden * width * (6 + 2 + reference)  # the modulation, 1 + scale, and its input
    if rotary:
        size += 4 * tokens * (hidden // heads // 2) * FP32  # tables
    if config.mask != "bidirectional" or config.window or (context and config.context == "strict"):
        size += tokens * tokens * width  # the mask as numbers to add
    return size


def node_memory(config: Config, world_size: int, ranks_per_node: int | None = None) -> dict[str, float]:
    """GiB of one node's memory by kind: loader, checkpoint, per_rank, total; without the program itself (about 1 GiB).

    loader: prefetched batches; a rank's latents and noise are float32. checkpoint: the copy of a rank's state that is
    being written (pinned where there is a GPU).
    """
    model, train = config.model, config.train
    clip = 2 * model.num_frames * model.tokens_per_frame * model.in_channels * FP32
    loader = (config.data.prefetch + 1) * train.global_batch_size / world_size * clip
    vectors = 3 + 1 + len(train.extra_ema_decays)
    staged = vectors * FP32 * num_parameters(config) / world_size
    rank = (loader + staged) / GIB
    return {
        "loader": loader / GIB,
        "checkpoint": staged / GIB,
        "per_rank": rank,
        "total": rank * (ranks_per_node or min(world_size, 8)),
    }


def step_seconds(
    config: Config,
    world_size: int,
    precision: str,
    matmul_flops: float,
    bus_gb_per_s: float | None = None,
    micro_batch_size: int | None = None,
    *,
    stage: int = 2,
    bucket: int = BUCKET,
    overlap: bool = False,
    num_context: int | None = None,
) -> dict[str, float]:
    """Seconds of an optimizer step by part: compute, reduction (what the backward pass does not hide), gather, total.

    matmul_flops: FLOP/s that a plain matrix product reaches on one rank's device; a step is taken to reach 60 % of it.
    bus_gb_per_s: bus bandwidth of a large all-reduce among all ranks, GB/s (None or one rank: no communication).
    stage, bucket, overlap: of ZeRO, as for `memory`. Stage 2 reduces after every micro-batch, the others once per step;
    stage 0 gathers nothing. num_context: as for `dit_flops`.
    """
    train, model = config.train, config.model
    per_rank = train.global_batch_size / world_size
    micro_steps = max(1, round(per_rank / (micro_batch_size or train.micro_batch_size)))
    forward = dit_flops(model, num_context=num_context)
    flops = TRAINING * forward
    if model.activation_checkpointing:
        flops += dit_block_flops(model, num_context=num_context)
    compute = flops * per_rank / (matmul_flops * STEP_SHARE)
    reduction = gather = 0.0
    if world_size > 1 and bus_gb_per_s:
        parameters = num_parameters(config)
        one_way = BYTES[precision] * parameters * (world_size - 1) / world_size / (bus_gb_per_s * 1e9)
        backward = compute / micro_steps * (1 - forward / flops)
        buckets = math.ceil(parameters / bucket)
        hidden = min(2 * one_way, backward) * (buckets - 1) / buckets if overlap else 0.0  # never the last bucket
        # An all-reduce moves everything twice.
        reduction = (micro_steps if stage == 2 else 1) * (2 * one_way - hidden)
        gather = one_way if stage else 0.0
    return {
        "compute": compute,
        "reduction": reduction,
        "gather": gather,
        "total": compute + reduction + gather,
    }
