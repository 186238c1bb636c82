"""The settings, as dataclasses; defaults are those of the paper's 28-layer model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def one_of(default: str, *choices: str) -> Any:
    """A string field that must be one of `choices` (checked by `load`)."""
    return field(default=default, metadata={"choices": (default, *choices)})


@dataclass
class ReferenceModelConfig:
    """What only the networks of the published AR-Diffusion code have (model.architecture = reference)."""

    merge_mode: str = one_of("share_norm", "separate_norm", "reproduce", "sharenorm_shift_first_t")
    positions: str = one_of("flat", "rotary")  # of the token in the clip (flat) or after the context tokens (rotary)
    context_tokens: int = 77  # of the stored embedding that conditions every frame
    context_dim: int = 768
    learn_sigma: bool = False  # twice the output channels, of which sampling uses the first half


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
    architecture: str = one_of("ardiff", "reference")  # reference: the network of the published weights
    reference: ReferenceModelConfig = field(default_factory=ReferenceModelConfig)


@dataclass
class ReferenceVAEConfig:
    """What only the published auto-encoders have; their sizes come from here instead of width, depths and heads."""

    encoder: str = one_of("large", "base", "small")  # ViT of 24, 12, 8 layers of width 1024, 768, 512 (TiTok)
    decoder: str = one_of("large", "base", "small")
    decoder_patch_size: int = 16
    temporal: bool = False  # frames are decoded with those before them
    unit_norm: bool = True  # latents are normalised to length 1 before they are decoded


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
    sample_posterior: bool = True  # train on draws of the posterior; False: on its mean
    perceptual_weight: float = 0.0  # of the perceptual loss of a frame, as mean per pixel
    perceptual: str = one_of("structure", "lpips")  # structure: gradients and SSIM at several scales, no weights needed
    lpips: str | None = None  # file with the weights of LPIPS-VGG: for perceptual = lpips, and then measured as well
    adversarial_weight: float = 0.5  # of the discriminator's verdict, on top of the adaptive weight
    adversarial_warmup: int = 0  # first steps of the stage adversarial, in which that weight grows from 0
    discriminator_width: int = 64  # channels of its first layer
    discriminator_layers: int = 3  # that halve the picture
    discriminator_lr: float = 0.0  # 0: the learning rate of the phase
    temporal: bool = False  # the decoder also reads earlier frames, from the stage temporal on
    window: int = 16  # of a temporal decoder: frames that a frame reads in each layer, itself included
    architecture: str = one_of("ardiff", "reference")  # reference: the network of the published weights
    reference: ReferenceVAEConfig = field(default_factory=ReferenceVAEConfig)


# Distributions of training timesteps, see diffusion/timesteps: without order or plain (the first five), imitating a
# method of sampling (the next four), and several of them by weight.
TIMESTEPS = (
    "fopp",
    "synchronous",
    "independent",
    "uniform_monotone",
    "fvdm",
    "pavdm",
    "rolling",
    "ad_matched",
    "teacher_forced",
    "mixture",
)


@dataclass
class StaircaseConfig:
    """The sampling that the timesteps `pavdm`, `ad_matched`, `teacher_forced` and `rolling` imitate in training."""

    num_steps: int = 50  # S: solver steps that take a frame from noise to data
    gap: int = 5  # s of ad_matched: steps between the starts of neighbouring blocks; pavdm has S / its chunks
    block: int = 1  # frames that share a level and move together (n of PA-VDM's chunks)
    prefix: int = 0  # clean frames in front, given and not trained: PA-VDM's keep_x0 is one block
    prefix_dropout: float = 0.0  # of pavdm and rolling: share of samples without it, so that videos begin from nothing
    pattern: str = one_of("linear-shift", "linear", "linear-variance", "linear-variance-shift")  # what jitter moves
    jitter: float = 0.4  # its deviation, in solver steps: of all frames alike (shift) or of each by itself (variance)
    variable_length: float = 0.0  # share of samples in a window of the start or end of a video: frames are left out


@dataclass
class ConditioningConfig:
    """Frames that are given in training, on top of any distribution: fed without noise and masked in the loss."""

    probability: float = 0.0  # share of samples with given frames
    max_frames: int = 1  # their number is uniform in 1..max_frames
    where: str = one_of("prefix", "ends", "anywhere")  # ends: some in front and some at the end, for interpolation


@dataclass
class TimestepsShare:
    """One of several distributions of timesteps that are mixed."""

    timesteps: str = ""
    weight: float = 1.0  # its share of the samples is weight / sum of all weights


@dataclass
class DiffusionConfig:
    """Forward process, prediction target and the distribution of training timesteps."""

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    process: str = one_of("ddpm", "rectified_flow")  # x_t between data and noise: see diffusion/schedule.py
    flow_shift: float = 1.0  # of rectified_flow: r of the time warp r t / (1 + (r - 1) t); 0: from the resolution
    prediction: str = one_of("x0", "eps", "v")  # v of rectified_flow: x0 - noise
    timesteps: str = one_of(*TIMESTEPS)
    shared_probability: float = 0.8  # of fvdm: share of samples with one timestep for all frames
    init_probability: float = 0.1  # of rolling: share of samples that begin a video
    staircase: StaircaseConfig = field(default_factory=StaircaseConfig)
    mixture: list[TimestepsShare] = field(default_factory=list)  # of timesteps = mixture
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)

    @property
    def used_timesteps(self) -> set[str]:
        """The distributions that samples are drawn from."""
        return {part.timesteps for part in self.mixture} if self.timesteps == "mixture" else {self.timesteps}


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
    crop_scale: float = 1.0  # of frames for an AR-VAE: least side of a random square that is enlarged; 1: whole frames
    normalize: str = one_of("unit", "standardize", "none")  # unit: each token to length 1, as the reference
    arvae: str | None = None  # decodes samples; None: the one named in the manifest
    validation: str | None = None  # held-out shards; None: SHARDS/validation if it exists
    prefetch: int = 4  # global batches prepared ahead, at least (small ones are made several at a time)
    decode_threads: int = 2  # per rank, for pictures
    verify: bool = False  # compare the checksum of a video whenever a clip of it is read
    max_bad_fraction: float = 1e-4  # more bad samples than this share end the run
    cache_dir: str | None = None  # where remote shards are kept; a fast local disk
    cache_gb: float = 100.0  # size limit of that folder, for all ranks of a node together


@dataclass
class Phase:
    """A stretch of training with one learning rate and, of an AR-VAE, one stage."""

    steps: int = 0
    lr: float = 0.0
    stage: str = one_of("frames", "adversarial", "temporal")  # of an AR-VAE: see launch/README.md
    num_frames: int = 1  # of the stage temporal: frames of a clip
    trains: str = one_of("all", "temporal")  # of the stage temporal: all parameters, or those that read other frames


@dataclass
class TrainConfig:
    """Optimisation, logging and checkpoints.

    Batch sizes count clips (of an AR-VAE: frames), the global one over all ranks and accumulation steps.
    """

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
    ema_decay: float = 0.9999  # of the averaged weights that are sampled, validated and exported
    extra_ema_decays: list[float] = field(default_factory=list)  # further averages, kept beside it to choose from later
    label_dropout: float = 0.1  # share of samples trained with the null label, for guidance
    log_every: int = 50
    save_every: int = 1000  # steps between checkpoints
    save_minutes: float = 0.0  # and at most so long between them; 0: steps alone decide
    keep_checkpoints: int = 3  # the last ones
    keep_every: int = 0  # checkpoints of steps that are a multiple of it are kept for good; 0: none
    probe_tolerance: float = 0.05  # greatest deviation of predictions, relative, that a loaded checkpoint may show
    sample_every: int = 5000  # 0: no sample videos in TensorBoard
    init: str | None = None  # of an AR-VAE: weights to start from, as far as they fit (a run, an export, TiTok's file)
    validate_every: int = 0  # steps between measurements on held-out videos; 0: none
    validation_frames: int = 256  # so many frames of them, at most
    num_threads: int = 0  # CPU threads of a rank; 0: cores / local ranks
    collective_timeout_minutes: float = 30.0
    hang_minutes: float | None = None  # a rank without progress for so long ends the run; None: 2/3 of the time-out
    time_limit_minutes: float = 0.0  # stop, with a checkpoint, so long after the start; 0: no limit
    max_skipped_steps: int = 20  # this many steps with non-finite gradients in a row end the run
    spike_sigmas: float = 8.0  # a loss so many deviations above its recent mean is a spike; 0: do not look
    spike_window: int = 100  # steps that are recent
    spike_action: str = one_of("warn", "rollback")  # rollback: to the checkpoint before it, leaving its samples out
    spike_batches: int = 1  # that a rollback leaves out: the one with the spike and those before it
    grad_norms_every: int = 0  # steps between reports of the gradient norm of every layer; 0: never

    @property
    def hang_limit(self) -> float:
        """Minutes without progress that end the run: before the other ranks' collectives time out."""
        return 2 / 3 * self.collective_timeout_minutes if self.hang_minutes is None else self.hang_minutes


@dataclass
class SamplingConfig:
    """Defaults of `launch/sample.py` and of the sample videos drawn while training."""

    num_videos: int = 4
    num_steps: int = 50
    gap: int = 5
    guidance: float = 1.0
    fps: float = 8.0
    block: int = 0  # frames that share a level; 0: those of the model's mask
    solver: str = one_of("ddim", "dpmpp")
    eta: float = 0.0  # of ddim: 0 deterministic, 1 ancestral
    cache: str = one_of("auto", "exact", "none")  # auto: exact where the mask allows it
    window: int = 0  # frames that a frame reads at most (0: as the model), so that a long video takes no more memory
    sink: int = 0  # of a window: the first frames of the video, which are read always
    sliding: int = 0  # frames that the network sees at a time, for masks that allow no cache; 0: all of them
    history: int = -1  # of `sliding`: finished frames among them at most; -1: as many as fit
    variable: bool = False  # of `sliding`: frames that have not begun are left out (PA-VDM's variable length)
    partition: int = 0  # of `sliding`: evaluate it in pieces of so many frames (FIFO)
    lookahead: bool = False  # of `partition`: pieces overlap by half and count for their noisier half


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

    def phase_number(self, step: int) -> int:
        """Which of train.phases optimizer step `step` (from 1) belongs to; the last one goes on beyond its steps."""
        end = 0
        for number, phase in enumerate(self.train.phases):
            end += phase.steps
            if step <= end:
                return number
        return len(self.train.phases) - 1

    def adversarial_ramp(self, step: int) -> float:
        """The share of vae.adversarial_weight that optimizer step `step` has: 0 to 1."""
        before = 0
        for phase in self.train.phases:
            if phase.stage == "adversarial":
                break
            before += phase.steps
        return min(1.0, max(0, step - before - 1) / self.vae.adversarial_warmup) if self.vae.adversarial_warmup else 1.0

    def phase_of(self, step: int) -> Phase:
        """The phase of an optimizer step."""
        return self.train.phases[self.phase_number(step)]
