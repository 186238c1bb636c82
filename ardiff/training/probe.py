"""The probe: what a network predicts for a fixed input, kept in its checkpoints and compared when one is loaded.

Checksums show that a file is what was written. The probe shows that the loaded network is the one that was trained:
it notices another implementation of a layer, weights under wrong names or a broken library.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ardiff.errors import UserError
from ardiff.training import run_dir


def take(objective: nn.Module) -> Tensor:
    """The prediction of `objective.probe()`, fp32 on the CPU. In evaluation mode; modes are restored.

    Each rank by itself: there is nothing collective in it.
    """
    modes = [(module, module.training) for module in objective.modules()]
    objective.eval()
    try:
        with torch.no_grad():
            prediction: Tensor = objective.probe()  # type: ignore[operator]
        return prediction.float().cpu().contiguous()
    finally:
        for module, training in modes:
            module.training = training


def compare(checkpoint: Path, stored: Tensor, found: Tensor, tolerance: float, versions: dict[str, str]) -> float:
    """Norm of the difference of two predictions, divided by the norm of the stored one.

    tolerance: train.probe_tolerance; rounding differs between devices and numbers of threads. versions: of the packages
    that wrote the checkpoint. A stored prediction that was not finite is not compared (0). Raises UserError beyond the
    tolerance.
    """
    if stored.shape != found.shape:
        deviation = float("inf")
    elif not stored.isfinite().all():
        return 0.0
    else:
        difference, norm = (found.double() - stored.double()).norm().item(), stored.double().norm().item()
        deviation = difference / norm if norm else (0.0 if difference == 0 else float("inf"))
    if deviation <= tolerance:  # a deviation of NaN is beyond every tolerance
        return deviation
    raise UserError(
        f"{checkpoint}: the network no longer predicts what it did when this was written, by {deviation:.2g} of the "
        f"prediction's norm, and train.probe_tolerance is {tolerance:g} ({_changes(versions)}); use the versions that "
        "wrote it or, if the deviation is understood, a larger train.probe_tolerance"
    )


def _changes(versions: dict[str, str]) -> str:
    now = run_dir.versions()
    names = [name for name in {**versions, **now} if versions.get(name) != now.get(name)]
    changes = [f"{name} {versions.get(name, 'none')} -> {now.get(name, 'none')}" for name in names]
    return ", ".join(changes) or "no version of a package has changed"
