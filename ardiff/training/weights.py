"""Networks from disk: a run_dir, one checkpoint of it, or an export.

An export (launch/export.py) is a folder with model.safetensors, ema.safetensors, config.yaml and, for a diffusion
transformer, latent_space.json. Averages besides the main one have a file each, such as ema_0.999.safetensors.

All of them hold weights as named vectors: `ema` (the main average), `master` (not averaged), `ema_0.999` and so on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardiff.config import Config, VAEConfig, load, to_yaml
from ardiff.data.latent_space import LatentSpace
from ardiff.errors import UserError
from ardiff.files import replacing, write_json, write_text
from ardiff.models import build_arvae, build_dit
from ardiff.models.temporal import is_temporal
from ardiff.training.checkpoint import full_weights, newest_valid, opened, problem_with, rank_file, read_state
from ardiff.training.ema import MAIN, ema_name

if TYPE_CHECKING:
    from ardiff.compat.reference import ReferenceARVAE, ReferenceModel
    from ardiff.models import ARVAE, DiT

PREFIX = "network."  # objectives hold their network under this name
FILES = {MAIN: "ema.safetensors", "master": "model.safetensors"}
FURTHER = re.compile(r"(ema_[0-9.e-]+)\.safetensors")  # of an export, by the names of ema_name
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Stored:
    """What a run, checkpoint or export holds: the weights and buffers of a network by name, and how to use them."""

    weights: dict[str, Tensor]
    config: Config
    origin: Path
    latent_space: dict[str, Any] | None


def read_weights(source: Path, vector: str = MAIN) -> Stored:
    """Read `ema` (the main average), `master` (unaveraged) or the weights of a further average (`ema_0.999`).

    `ema_` and the main decay is another name of `ema`. Raises UserError when `source` is none of the three, damaged, or
    does not hold this vector.
    """
    if not is_export(source):
        return _read_checkpoint(find_checkpoint(source), vector)
    config = load(str(source / "config.yaml"))
    further = sorted(found[1] for path in source.iterdir() if (found := FURTHER.fullmatch(path.name)))
    held = [name for name in (MAIN, *further, "master") if (source / file_of(name)).is_file()]
    path = source / file_of(_chosen(source, vector, config, held))
    space = source / "latent_space.json"
    try:
        found_space = json.loads(space.read_text(encoding="utf-8")) if space.is_file() else None
    except (ValueError, OSError) as error:
        raise UserError(f"{space}: not what it should be ({error}); export again") from error
    try:
        return Stored(load_file(path), config, source, found_space)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not what it should be ({error}); export again") from error


def vector_of(weights: str, decay: float | None) -> str:
    """The vector that the options --weights (`ema` or `master`) and --ema (None: not given) mean. Raises UserError."""
    if decay is None:
        return weights
    if weights != MAIN:
        raise UserError(f"--ema {decay}: means averaged weights, but --weights {weights} others; leave one out")
    if not 0 <= decay < 1:  # NaN included
        raise UserError(f"--ema {decay}: must be the decay of an average, at least 0 and below 1, such as 0.999")
    return ema_name(decay)


def is_export(source: Path) -> bool:
    """Whether a folder is an export."""
    return any((source / name).is_file() for name in FILES.values())


def file_of(vector: str) -> str:
    """Name of the file of an export that holds these weights."""
    return FILES.get(vector) or f"{vector}.safetensors"


def vectors_of(checkpoint: Path) -> list[str]:
    """What weights a checkpoint holds: the main average first, the further ones, and `master` last."""
    return [MAIN, *(ema_name(decay) for decay in read_state(checkpoint).ema_decays[1:]), "master"]


def _chosen(origin: Path, vector: str, config: Config, held: Sequence[str]) -> str:
    """The vector of this name among those that are held. Raises UserError where there is none."""
    main = ema_name(config.train.ema_decay)
    name = MAIN if vector == main else vector
    if name in held:
        return name
    listed = ", ".join(f"{MAIN} (decay {config.train.ema_decay!r})" if other == MAIN else other for other in held)
    raise UserError(f"{origin}: holds no weights {vector}, but {listed}; choose one of these")


def _read_checkpoint(checkpoint: Path, vector: str) -> Stored:
    """From a checkpoint that has been verified."""
    config = load(str(checkpoint / "config.yaml"))
    weights = full_weights(checkpoint, _chosen(checkpoint, vector, config, vectors_of(checkpoint)))
    weights |= _buffers(checkpoint)
    network = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return Stored(network, config, checkpoint, read_state(checkpoint).latent_space)


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that a run_dir (its newest valid one) or a checkpoint directory stands for."""
    if (source / "checkpoints").is_dir():
        newest = newest_valid(source)
        if newest is None:
            raise UserError(f"{source}: the run has no checkpoint yet")
        return newest
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not (source / "MANIFEST.json").is_file():
        raise UserError(f"{source}: neither a run_dir with checkpoints, nor a checkpoint, nor an export")
    problem = problem_with(source)
    if problem is not None:
        raise UserError(f"{source}: a damaged checkpoint ({problem})")
    return source


def load_dit(source: Path, vector: str = MAIN) -> tuple[DiT | ReferenceModel, Config, LatentSpace]:
    """The diffusion transformer of a run, checkpoint or export: fp32, on the CPU, in evaluation mode."""
    stored = read_weights(source, vector)
    if stored.latent_space is None:
        raise UserError(f"{stored.origin}: does not hold a diffusion transformer (is it the run of an AR-VAE?)")
    try:
        space = LatentSpace(**stored.latent_space)
    except TypeError as error:
        raise UserError(f"{stored.origin}: its latent space is not one that this version knows ({error})") from error
    network = build_dit(stored.config.model, stored.config.diffusion.prediction)
    return _fill(network, stored), stored.config, space


def load_arvae(source: Path, vector: str = MAIN) -> tuple[ARVAE | ReferenceARVAE, str]:
    """The auto-encoder of a run, checkpoint or export, and its id (a hash of configuration and weights).

    So an auto-encoder has another id under each of its averages: their latents differ.
    """
    stored = read_weights(source, vector)
    if stored.latent_space is not None:
        raise UserError(f"{stored.origin}: holds a diffusion transformer, but an AR-VAE is needed")
    network = _fill(build_arvae(stored.config.vae), stored)
    return network, arvae_id(stored.config.vae, stored.weights)


def arvae_id(vae: VAEConfig, weights: dict[str, Tensor]) -> str:
    """The id of an auto-encoder: a hash of configuration and weights.

    Without those by which a decoder reads other frames: they may be trained by themselves, and decode the same latents.
    """
    digest = hashlib.sha256(_description(vae).encode())
    for name in sorted(name for name in weights if not is_temporal(name)):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _description(vae: VAEConfig) -> str:
    """What goes into the id: always these fields, so that a new setting does not give old auto-encoders a new id."""
    names = "image_size patch_size num_tokens channels hidden_size encoder_depth decoder_depth num_heads kl_weight"
    described = ", ".join(f"{name}={getattr(vae, name)!r}" for name in [*names.split(), "l1_weight"])
    extra = f", reference={vae.reference!r}" if vae.architecture == "reference" else ""
    return f"VAEConfig({described}{extra})"


def export(source: Path, out: Path, decay: float | None = None) -> Path:
    """Write the networks of a run or checkpoint for use elsewhere; returns the checkpoint that was exported.

    decay: of the average that is the main one of the export (None: as in training). Raises UserError if there is none.
    """
    if is_export(source):
        raise UserError(f"--run {source}: is an export already; name the run or the checkpoint that it was made from")
    checkpoint = find_checkpoint(source)
    config = load(str(checkpoint / "config.yaml"))
    main = config.train.ema_decay if decay is None else decay
    _chosen(checkpoint, ema_name(main), config, vectors_of(checkpoint))  # refused before anything is written
    decays = [config.train.ema_decay, *read_state(checkpoint).ema_decays[1:]]
    further = [other for other in decays if other != main]

    def stored_of(vector: str) -> Stored:
        stored = _read_checkpoint(checkpoint, ema_name(main) if vector == MAIN else vector)
        stored.config.train.ema_decay, stored.config.train.extra_ema_decays = main, further
        return stored

    write_export(out, stored_of, [MAIN, *map(ema_name, further), "master"])
    return checkpoint


def write_export(out: Path, stored_of: Callable[[str], Stored], vectors: Sequence[str] = tuple(FILES)) -> None:
    """Write an export; `stored_of` gives what belongs into its file of each of `vectors`.

    Raises UserError for a folder that is something else.
    """
    if (out / "checkpoints").exists() or (out / "MANIFEST.json").exists():
        raise UserError(f"--out {out}: is a run or a checkpoint, an export there would hide it; choose another folder")
    (out / "latent_space.json").unlink(missing_ok=True)
    for old in out.glob("ema_*.safetensors"):  # of an earlier export of something else
        if FURTHER.fullmatch(old.name):
            old.unlink()
    for vector in vectors:
        stored = stored_of(vector)
        with replacing(out / file_of(vector)) as temporary:
            save_file(stored.weights, temporary)
    if stored.latent_space is not None:
        write_json(out / "latent_space.json", stored.latent_space)
    write_text(out / "config.yaml", to_yaml(stored.config))


def _buffers(checkpoint: Path) -> dict[str, Tensor]:
    """What a network holds besides its parameters; rank 0 has written it."""
    with opened(checkpoint / rank_file(0)) as file:
        names = [key for key in file.keys() if key.startswith("buffer.")]  # noqa: SIM118 - not a dictionary
        return {key.removeprefix("buffer."): file.get_tensor(key) for key in names}


def _fill(network: Network, stored: Stored) -> Network:
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in stored.weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise UserError(f"{stored.origin}: weights do not fit their configuration ({len(odd)} differ, first: {odd[0]})")
    network.load_state_dict(stored.weights)
    return network.eval()
