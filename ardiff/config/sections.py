"""The settings, as dataclasses; defaults are those of the paper's 28-layer model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def one_of(default: str, *choices: str) -> Any:
    """A string field that must be one of `choices` (checked by `load`)."""
    return field(default=default, metadata={"choices": (default, *choices)})


@dataclass
class ModelConfig:
    """The diffusion transformer. Defaults are the 28-layer model of the paper (672 M parameters)."""

    num_frames: int = 16  # frames of a training clip
    tokens_per_frame: int = 32
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    rope_theta: float = 10000.0
    num_classes: int = 0  # 0: unconditional; otherwise labels 0..num_classes-1 and a learned null label
    context_dim: int = 0  # 0: no context tokens; otherwise the width of the text features
    mask: str = one_of("frame_causal", "block_causal", "bidirectional")
    block: int = 1  # frames per block of the block-causal mask
    context: str = one_of("strict", "leaky")  # strict: context tokens read only context tokens
    attention_backend: str = one_of("auto", "sdpa")
    activation_checkpointing: bool = False
    window: int = 0  # frames that a frame reads, itself included; 0: all earlier ones
    sink: int = 0  # of a window: the first frames of the video, which are read always


@dataclass
class VAEConfig:
    """The frame auto-encoder (AR-VAE): a frame becomes `num_tokens` tokens of `channels` numbers."""

    image_size: int = 256
    patch_size: int = 16
    num_tokens: int = 32
    channels: int = 4
    hidden_size: int = 512
    encoder_depth: int = 8
    decoder_depth: int = 8
    num_heads: int = 8
    kl_weight: float = 1e-6
    l1_weight: float = 0.2  # the reconstruction loss is (1 - l1_weight) * MSE + l1_weight * L1


@dataclass
class DiffusionConfig:
    """Forward process, prediction target and the distribution of training timesteps."""

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    process: str = one_of("ddpm", "rectified_flow")  # x_t between data and noise: see diffusion/schedule.py
    flow_shift: float = 1.0  # of rectified_flow: r of the time warp r t / (1 + (r - 1) t); 0: from the resolution
    prediction: str = one_of("x0", "eps", "v")  # v of rectified_flow: x0 - noise
    timesteps: str = one_of("fopp", "synchronous", "independent", "uniform_monotone")


@dataclass
class Source:
    """One of several data sets that are mixed."""

    shards: str = ""
    weight: float = 1.0  # its share of the samples is weight / sum of all weights


@dataclass
class DataConfig:
    """Where the shards lie and how clips are cut from them."""

    shards: str | None = None  # a folder with manifest.json, its URL, or tar files as a brace or glob pattern
    mixture: list[Source] = field(default_factory=list)  # several data sets instead of `shards`
    order: str = one_of("global", "lanes")  # lanes: each node reads its share of remote shards only
    lanes: int = 256  # of order `lanes`: parts of the data; ranks and batches divide and are divided by it
    lane_window: int = 4096  # clips that are shuffled together within a lane
    stride: int = 1  # take every stride-th frame of a video
    flip_probability: float = 0.0  # share of clips that are mirrored
    normalize: str = one_of("unit", "standardize", "none")  # unit: each token to length 1, as the reference
    arvae: str | None = None  # decodes samples; None: the one named in the manifest
    prefetch: int = 4  # global batches prepared ahead, at least (small ones are made several at a time)
    decode_threads: int = 2  # per rank, for pictures
    verify: bool = False  # compare the checksum of a video whenever a clip of it is read
    max_bad_fraction: float = 1e-4  # more bad samples than this share end the run
    cache_dir: str | None = None  # where remote shards are kept; a fast local disk
    cache_gb: float = 100.0  # size limit of that folder, for all ranks of a node together


@dataclass
class Phase:
    """A stretch of training with one learning rate."""

    steps: int = 0
    lr: float = 0.0


@dataclass
class TrainConfig:
    """Optimisation, logging and checkpoints. Batch sizes count clips over all ranks and accumulation steps."""

    seed: int = 0
    global_batch_size: int = 1024
    micro_batch_size: int = 16
    max_steps: int | None = None  # None: the sum of the phases
    phases: list[Phase] = field(default_factory=lambda: [Phase(100_000, 2e-4), Phase(50_000, 1e-5)])
    warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    adam_eps: float = 1e-8
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1  # share of samples trained with the null label, for guidance
    log_every: int = 50
    save_every: int = 1000
    keep_checkpoints: int = 3
    sample_every: int = 5000  # 0: no sample videos in TensorBoard
    num_threads: int = 0  # CPU threads of a rank; 0: cores / local ranks
    collective_timeout_minutes: float = 30.0
    max_skipped_steps: int = 20  # this many steps with non-finite gradients in a row end the run


@dataclass
class SamplingConfig:
    """Defaults of `launch/sample.py` and of the sample videos drawn while training."""

    num_videos: int = 4
    num_steps: int = 50
    gap: int = 5
    guidance: float = 1.0
    fps: float = 8.0


@dataclass
class Config:
    """Everything a run is made from; written to run_dir/config.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        planned = sum(phase.steps for phase in self.train.phases)
        return planned if self.train.max_steps is None else self.train.max_steps
