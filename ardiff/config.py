"""Configuration: dataclasses, YAML presets, dotted overrides.

`load("tiny", ["--train.max_steps", "100"])` gives a validated `Config`. OmegaConf does the typing; what is added
here is that every problem is reported at once, each with the nearest key that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ardiff.errors import UserError

PRESETS = Path(__file__).parent / "presets"


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
    prediction: str = one_of("x0", "eps", "v")
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


def presets() -> list[str]:
    """Names accepted by `load` besides paths of YAML files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(preset_or_yaml: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file and apply overrides (`a.b=c`, `--a.b=c` or the pair `--a.b c`).

    Raises UserError that lists every unknown, mistyped or impossible setting.
    """
    tree = OmegaConf.structured(Config)
    problems: list[str] = []
    path = _find(preset_or_yaml)
    for key, value in _leaves(_read_yaml(path)):
        _assign(tree, key, value, str(path), problems)
    for key, value in _parse_overrides(overrides, problems):
        _assign(tree, key, value, "command line", problems)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        problems.append(f"{path}: {str(error).splitlines()[0]}")
        raise UserError(f"configuration refused: {'; '.join(problems)}") from error
    assert isinstance(config, Config)
    problems += _impossible(config)
    if len(problems) == 1:
        raise UserError(f"configuration refused: {problems[0]}")
    if problems:
        raise UserError("configuration refused:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old -> new` for every differing field of two configurations (or sections) of one type."""
    found = []
    for item in dataclasses.fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(before):
            found += differences(before, after, f"{prefix}{item.name}.")
        elif before != after:
            found.append(f"{prefix}{item.name}: {before} -> {after}")
    return found


def _find(preset_or_yaml: str) -> Path:
    path = PRESETS / f"{preset_or_yaml}.yaml"
    if path.is_file():
        return path
    path = Path(preset_or_yaml)
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(preset_or_yaml, presets(), 1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise UserError(f"--config {preset_or_yaml}: neither a file nor a preset ({', '.join(presets())}){hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a valid YAML configuration ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold sections such as 'model:', found a {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    words = list(overrides)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"command line: '{word}' needs a value, as in '{word} VALUE'")
                continue
            text = words.pop(0)
        if key in _text_keys() and text != "null":
            yield key, text  # as it is: a shard pattern such as {a,b}.tar or *.tar would be YAML as well
            continue
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"command line: '{key}': cannot read '{text}' ({' '.join(str(error).split())})")
            continue
        yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _all_keys(section: Any = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its annotation."""
    keys: dict[str, str] = {}
    for item in dataclasses.fields(section):
        if item.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(item.default_factory):
            keys |= _all_keys(item.default_factory, f"{prefix}{item.name}.")
        else:
            keys[f"{prefix}{item.name}"] = str(item.type)
    return keys


def _text_keys() -> set[str]:
    return {key for key, annotation in _all_keys().items() if annotation in ("str", "str | None")}


def _assign(tree: DictConfig, key: str, value: Any, source: str, problems: list[str]) -> None:
    keys = list(_all_keys())
    if key not in keys:
        last = key.rsplit(".", 1)[-1]
        by_name = [other for other in keys if other.rsplit(".", 1)[-1] == last]
        nearest = by_name[:1] or difflib.get_close_matches(key, keys, 1, cutoff=0.5)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; sections are {', '.join(_sections())}"
        problems.append(f"{source}: unknown setting '{key}'{hint}")
        return
    try:
        OmegaConf.update(tree, key, value)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        problems.append(f"{source}: '{key}' cannot be {value!r} ({reason})")


def _sections() -> list[str]:
    return [item.name for item in dataclasses.fields(Config)]


def _bad_choices(section: Any, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        choices = item.metadata.get("choices")
        if dataclasses.is_dataclass(value):
            yield from _bad_choices(value, f"{prefix}{item.name}.")
        elif choices and value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            yield f"{prefix}{item.name} = '{value}' must be one of {', '.join(choices)}{hint}"


POSITIVE = {
    "model": ("num_frames", "tokens_per_frame", "in_channels", "hidden_size", "depth", "num_heads", "block"),
    "vae": ("image_size", "patch_size", "num_tokens", "channels", "hidden_size", "num_heads"),
    "train": ("global_batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints"),
    "data": ("stride", "prefetch", "lanes", "lane_window", "decode_threads"),
    "sampling": ("num_videos", "num_steps"),
    "diffusion": ("num_timesteps",),
}


BOUNDS = (
    ("model.mlp_ratio", 0.125, 64),
    ("model.rope_theta", 1, 1e12),
    ("model.num_classes", 0, 1e6),
    ("model.context_dim", 0, 1e6),
    ("vae.encoder_depth", 0, 1e4),
    ("vae.decoder_depth", 0, 1e4),
    ("vae.kl_weight", 0, 1e6),
    ("vae.l1_weight", 0, 1),
    ("data.flip_probability", 0, 1),
    ("data.max_bad_fraction", 0, 1),
    ("data.cache_gb", 0.001, 1e6),
    ("train.seed", -(2**63), 2**63 - 1),
    ("train.warmup_steps", 0, 1e12),
    ("train.weight_decay", 0, 1e6),
    ("train.grad_clip", 0, 1e12),
    ("train.adam_eps", 0, 1),
    ("train.ema_decay", 0, 1 - 1e-9),
    ("train.label_dropout", 0, 1),
    ("train.sample_every", 0, 1e12),
    ("train.num_threads", 0, 1e4),
    ("train.collective_timeout_minutes", 0.05, 1e5),
    ("train.max_skipped_steps", 1, 1e9),
    ("sampling.guidance", -1e6, 1e6),
    ("sampling.fps", 0.01, 1e4),
)


def _impossible(config: Config) -> Iterator[str]:
    """Values of the right type that cannot work, alone or together, each with the arithmetic."""
    yield from _bad_choices(config, "")
    too_small = [
        f"{section}.{name} = {value} must be at least 1"
        for section, names in POSITIVE.items()
        for name in names
        if (value := getattr(getattr(config, section), name)) < 1
    ]
    yield from too_small
    for key, low, high in BOUNDS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if not low <= value <= high:  # NaN included
            yield f"{key} = {value} must lie between {low:g} and {high:g}"
    yield from _impossible_sampling(config)
    yield from _impossible_data(config)
    if not too_small:  # the arithmetic below divides by them
        yield from _impossible_networks(config)
        yield from _impossible_training(config)


def _impossible_networks(config: Config) -> Iterator[str]:
    model, vae = config.model, config.vae
    for name, width, heads in (
        ("model", model.hidden_size, model.num_heads),
        ("vae", vae.hidden_size, vae.num_heads),
    ):
        if width % heads or (width // heads) % 2:
            yield f"{name}.hidden_size / {name}.num_heads = {width} / {heads} must be an even whole number"
    if vae.image_size % vae.patch_size:
        yield f"vae.image_size = {vae.image_size} is no multiple of vae.patch_size = {vae.patch_size}"
    if model.mask != "block_causal" and model.block != 1:
        yield f"model.block = {model.block} has a meaning only with model.mask = block_causal"


def _impossible_training(config: Config) -> Iterator[str]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size} is no multiple of "
            f"train.micro_batch_size = {train.micro_batch_size}"
        )
    if any(phase.steps < 1 or not 0 < phase.lr < 1e3 for phase in train.phases) or not train.phases:
        yield "train.phases needs a list of {steps: N, lr: X} with N >= 1 and X > 0"
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        yield f"train.betas = {train.betas} must be two numbers in [0, 1)"
    if config.max_steps < 1:
        yield f"train.max_steps = {config.max_steps} must be at least 1"


def _impossible_data(config: Config) -> Iterator[str]:
    data = config.data
    if data.shards and data.mixture:
        yield "data.shards and data.mixture: give one of them"
    for source in data.mixture:
        if not source.shards or not 0 <= source.weight < 1e9:
            yield f"data.mixture: {{shards: {source.shards!r}, weight: {source.weight}}} needs shards and a weight >= 0"
    total = sum(source.weight for source in data.mixture)
    for source in data.mixture:
        if 0 < source.weight < 1e-4 * total:
            yield f"data.mixture: the weight {source.weight} of {source.shards} is less than 1e-4 of all; leave it out"
    if data.mixture and not sum(source.weight for source in data.mixture) > 0:
        yield "data.mixture: at least one weight must be above 0"


def _impossible_sampling(config: Config) -> Iterator[str]:
    sampling, diffusion = config.sampling, config.diffusion
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        yield f"diffusion betas {diffusion.beta_start}, {diffusion.beta_end} must satisfy 0 < start <= end < 1"
    if not 0 <= sampling.gap <= sampling.num_steps:
        yield f"sampling.gap = {sampling.gap} must lie between 0 and sampling.num_steps = {sampling.num_steps}"
    if sampling.num_steps >= config.diffusion.num_timesteps:
        yield (
            f"sampling.num_steps = {sampling.num_steps} must be less than "
            f"diffusion.num_timesteps = {config.diffusion.num_timesteps}"
        )
