"""Training of an AR-VAE from weights that exist already, whatever of them fits (setting `train.init`).

Sources: a file of TiTok or of a published AR-VAE, a folder that launch/convert.py made of one, a run_dir, checkpoint or
export of ours. A source of `vae.architecture = ardiff` fits that architecture only; a published one fits
`reference` by its names, and ours as far as that has the same parts. Averaged weights (EMA) are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ardiff.compat.reference import ReferenceARVAE, read_checkpoint
from ardiff.compat.reference.fitting import fit_published, fit_published_to_own
from ardiff.compat.reference.state_dict import split_arvae
from ardiff.errors import UserError
from ardiff.files import sha256
from ardiff.models import ARVAE
from ardiff.models.fitting import fit_own, usable
from ardiff.training.coverage import Coverage, measure
from ardiff.training.weights import FILES, read_weights

DIGEST = 12  # characters of a sha256 that are shown
_OWN = "to_latents.weight"  # only our architecture has a tensor of this name


@dataclass
class Source:
    """Weights of an AR-VAE and what they are."""

    architecture: str
    weights: dict[str, Tensor]
    digest: str
    num_heads: int = 0  # of our architecture, where the source tells it


def initialise(network: ARVAE | ReferenceARVAE, source: Path) -> Coverage:
    """Give `network`, untrained, the weights of `source` as far as they fit; to be called before the engine is built.

    Returns what came from where; `coverage.table()` is to be printed. The network changes only if all goes well.

    Raises UserError that names train.init for a source that is missing, damaged, no AR-VAE, of the wrong architecture
    or without anything that fits.
    """
    try:
        found = _read(source)
        coverage = _transfer(network, found)
    except UserError as error:
        raise UserError(f"train.init = {source}: {str(error).removeprefix(f'{source}: ')}") from error
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"train.init = {source}: cannot be used ({type(error).__name__}: {text})") from error
    coverage.source, coverage.digest = str(source), found.digest
    return coverage


def _transfer(network: ARVAE | ReferenceARVAE, found: Source) -> Coverage:
    target = network.state_dict()
    weights = {name: value.detach().cpu().float() for name, value in found.weights.items() if usable(value)}
    notes: list[str] = []
    warnings: list[str] = []
    if isinstance(network, ReferenceARVAE):
        if found.architecture != "reference":
            raise UserError(
                "weights of vae.architecture = ardiff do not fit vae.architecture = reference: set "
                "vae.architecture=ardiff, or name a TiTok file or a published AR-VAE"
            )
        fits, notes = fit_published(weights, target)
    elif found.architecture == "reference":
        fits, notes = fit_published_to_own(weights, target, network.config)
    else:
        fits = fit_own(weights, target)
        if found.num_heads not in (0, network.config.num_heads):
            warnings.append(
                f"the source has {found.num_heads} attention heads, vae.num_heads = {network.config.num_heads}: its "
                "layers will not compute what they did there"
            )
    for name, fit in fits.items():
        if not torch.isfinite(fit.value).all():
            raise UserError(f"holds values that are not finite, in {fit.source or name}")
    if not any(fit.filled for fit in fits.values()):
        raise UserError("nothing in it fits the auto-encoder of vae.*: is it the weights of one, of the same size?")
    with torch.no_grad():
        for name, fit in fits.items():
            target[name].copy_(fit.value)  # a state dict shares its memory with the network
    coverage = measure(fits, found.weights, target)
    coverage.notes = notes + coverage.notes
    coverage.warnings = warnings + coverage.warnings
    return coverage


def _read(source: Path) -> Source:
    if source.is_dir():
        stored = read_weights(source)
        if stored.latent_space is not None:
            raise UserError("holds a diffusion transformer, but an AR-VAE is needed")
        vae = stored.config.vae
        exported = stored.origin / FILES["ema"]
        digest = sha256(exported if exported.is_file() else stored.origin / "MANIFEST.json")[:DIGEST]
        return Source(vae.architecture, stored.weights, digest, vae.num_heads)
    if not source.is_file():
        raise UserError("no such file or folder; name a run, an export, a TiTok file or a published AR-VAE")
    weights, digest = read_checkpoint(source), sha256(source)[:DIGEST]
    if _OWN in weights:
        return Source("ardiff", weights, digest)
    return Source("reference", split_arvae(weights, codebooks=True), digest)
