"""Convert published AR-Diffusion checkpoints to folders that all programs take as a run, and back.

    python launch/convert.py --dit model.safetensors --arvae vae.safetensors --config reference_sky --out converted
    python launch/sample.py --run converted --num_videos 8 --out samples

The published files hold averaged (EMA) weights only: both ema.safetensors and model.safetensors get these.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.compat.reference import (
    ReferenceARVAE,
    ReferenceModel,
    detect_schedule,
    load_arvae,
    load_dit,
    read_checkpoint,
    to_reference,
)
from ardiff.compat.reference.options import model_arguments, vae_arguments
from ardiff.compat.reference.settings import arvae_arguments, with_reference_settings
from ardiff.compat.reference.state_dict import NETWORK, split_dit
from ardiff.config import Config, load
from ardiff.data.latent_space import LatentSpace
from ardiff.diffusion.schedule import Schedule
from ardiff.errors import UserError
from ardiff.files import replacing, write_json
from ardiff.training import weights


def convert_arvae(state_dict: dict[str, Tensor], options: argparse.Namespace, config: Config, out: Path) -> str:
    """Write a published auto-encoder as an export; returns its id."""
    network = load_arvae(state_dict, arvae_arguments(state_dict, options.arvae_config))
    config.vae = network.config
    stored = weights.Stored(network.state_dict(), config, out, None)
    weights.write_export(out, lambda vector: stored)
    load(str(out / "config.yaml"))  # refuses what no program could use
    arvae_id = weights.arvae_id(config.vae, stored.weights)
    kind = "temporal" if network.temporal else "per-frame"
    count = sum(value.numel() for value in network.parameters())
    print(f"AR-VAE {arvae_id} ({kind}, {count / 1e6:.0f} M parameters) written to {out}")
    return arvae_id


def convert_dit(state_dict: dict[str, Tensor], options: argparse.Namespace, config: Config) -> None:
    """Write a published DiT as an export, its auto-encoder beside it. Raises UserError where they do not fit."""
    if config.model.architecture != "reference":
        raise UserError(
            f"--config {options.config}: has model.architecture = ardiff; use one of the reference_* presets"
        )
    schedule = detect_schedule(state_dict)
    if schedule is None:
        print("note: the checkpoint holds no betas; those of the configuration are taken")
    else:
        told = {name: getattr(config.diffusion, name) for name in schedule}
        if told != schedule:
            print(f"note: the configuration says {told}, the checkpoint's betas say {schedule}: taken from there")
        for name, value in schedule.items():
            setattr(config.diffusion, name, value)
    dit = load_dit(state_dict, model_arguments(config.model))
    if dit.context_emb is None and dit.class_emb is None:
        raise UserError(f"--dit {options.dit}: holds no context_emb or class_emb; convert the whole file, not a part")
    if config.model.num_classes != dit.config.num_classes:
        print(f"note: the checkpoint has {dit.config.num_classes} classes")
        config.model.num_classes = dit.config.num_classes
    config.data.normalize = "unit"
    cached = config.model.mask == "frame_causal" and config.model.context == "strict"
    config.sampling.sliding = 0 if cached else config.model.num_frames  # the network sees a clip at a time
    classes = _class_names(options.classes, dit.config.num_classes)
    arvae_id, arvae_path = _auto_encoder(state_dict, options, config)
    channels = config.model.in_channels
    needed, found = (config.model.tokens_per_frame, channels), (config.vae.num_tokens, config.vae.channels)
    if needed != found:
        raise UserError(
            f"--dit {options.dit}: takes latents of {needed[0]} tokens x {needed[1]} channels, but the auto-encoder "
            f"has {found[0]} x {found[1]}"
        )
    space = LatentSpace(
        "unit", [0.0] * channels, [1.0] * channels, arvae_id, str(arvae_path.resolve()), options.fps, 1, classes
    )
    network = dit.as_model(config.diffusion.prediction)
    stored = weights.Stored(network.state_dict(), config, options.out, space.as_json())
    weights.write_export(options.out, lambda vector: stored)
    load(str(options.out / "config.yaml"))
    count = sum(value.numel() for value in dit.parameters())
    print(f"DiT ({count / 1e6:.1f} M parameters, predicts {config.diffusion.prediction}) written to {options.out}")


def _auto_encoder(state_dict: dict[str, Tensor], options: argparse.Namespace, config: Config) -> tuple[str, Path]:
    """Id and folder of the auto-encoder: converted from --arvae or the DiT's own `vae.*`, or one that is ready."""
    if options.arvae is not None and options.arvae.is_dir():
        ready, arvae_id = weights.load_arvae(options.arvae)
        config.vae = ready.config
        return arvae_id, options.arvae
    folder = options.out / "arvae"
    if options.arvae is not None:
        return convert_arvae(read_checkpoint(options.arvae), options, config, folder), folder
    own = split_dit(state_dict).vae
    if not own:
        raise UserError(f"--dit {options.dit}: holds no vae.*; name the auto-encoder of its latents with --arvae")
    return convert_arvae(own, options, config, folder), folder


def _class_names(path: Path | None, count: int) -> list[str]:
    """Names of the classes in their order: the last word of every line, as in UCF-101's classInd.txt."""
    if path is None:
        return [str(number) for number in range(count)]
    try:
        names = [line.split()[-1] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from error
    if len(names) != count:
        raise UserError(f"--classes {path}: names {len(names)} classes, the checkpoint has {count}")
    return names


def convert_back(options: argparse.Namespace) -> None:
    """Write a network of ours under the reference's names, and its constructor arguments beside it."""
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: must be a .safetensors file with --to_reference")
    stored = weights.read_weights(options.to_reference, options.weights)
    network: object
    if stored.latent_space is None:
        network, schedule, prefix = weights.load_arvae(options.to_reference)[0], None, ""
    else:
        network, config, _ = weights.load_dit(options.to_reference, options.weights)
        schedule, prefix = Schedule.from_config(config.diffusion), NETWORK
    if not isinstance(network, (ReferenceModel, ReferenceARVAE)):
        raise UserError(
            f"--to_reference {options.to_reference}: only networks of architecture = reference can be written"
        )
    found = to_reference(network, prefix if options.prefix is None else options.prefix, schedule)
    with replacing(options.out) as temporary:
        save_file(found, temporary)
    described = (
        model_arguments(network.config) if isinstance(network, ReferenceModel) else vae_arguments(network.config)
    )
    write_json(options.out.with_suffix(".json"), {"config": described})
    print(f"{len(found)} tensors written to {options.out}, constructor arguments to {options.out.with_suffix('.json')}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dit", type=Path, metavar="FILE", help="a published diffusion model (.safetensors, .bin, .pt)")
    add("--arvae", type=Path, metavar="FILE", help="a published auto-encoder, or the folder of a converted one "
        "(default: the vae.* of --dit)")  # fmt: skip
    add("--reference_config", type=Path, metavar="FILE", help="takes network and schedule from a YAML file of the "
        "reference code, or YAML or JSON of constructor arguments")  # fmt: skip
    add("--arvae_config", type=Path, metavar="FILE", help="the same for the auto-encoder (default: from the shapes "
        "of its weights)")  # fmt: skip
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one a line, such as UCF-101's classInd.txt "
        "(default: their numbers)")  # fmt: skip
    add("--fps", type=float, help="of the training videos, for the samples (default sampling.fps)")
    add("--to_reference", type=Path, metavar="RUN", help="the way back: a run_dir, checkpoint or export")
    add("--weights", choices=("ema", "master"), default="ema", help="of --to_reference")
    add("--prefix", help=f"of --to_reference, before the names of the network (default {NETWORK} for a diffusion "
        "model, nothing for an auto-encoder)")  # fmt: skip
    add("--out", type=Path, required=True, help="a folder, or with --to_reference a .safetensors file")


def main() -> int:
    """The program."""
    parser = cli.parser(
        "Convert published AR-Diffusion checkpoints to folders that all programs take as a run, and back.",
        "python launch/convert.py --dit model.safetensors --arvae vae.safetensors --config reference_sky "
        "--out converted",
        "reference_sky",
    )
    _add_arguments(parser)
    options, config = cli.parse_with_config(parser)
    if options.fps is not None and not (math.isfinite(options.fps) and options.fps > 0):
        raise UserError(f"--fps {options.fps}: must be a number above 0")
    if options.to_reference is not None:
        if options.dit or options.arvae:
            raise UserError("--to_reference converts back: leave out --dit and --arvae")
        convert_back(options)
    elif options.dit is not None:
        if options.reference_config is not None:
            config = with_reference_settings(config, options.reference_config)
        convert_dit(read_checkpoint(options.dit), options, config)
    elif options.arvae is not None:
        convert_arvae(read_checkpoint(options.arvae), options, config, options.out)
    else:
        raise UserError("nothing to convert: give --dit, --arvae or --to_reference")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
