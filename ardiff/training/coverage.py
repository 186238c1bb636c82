"""How much of a network came from the weights it was started from, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ardiff.models.fitting import Fit
from ardiff.models.temporal import is_temporal

LISTED = 6  # names in one line
ENOUGH = 0.5  # of the parameters; a source that covers less is probably not the one that was meant


@dataclass
class Row:
    """Numbers of one module: `total` is the sum of the other three."""

    module: str
    total: int = 0
    taken: int = 0  # as they are in the source
    adapted: int = 0  # cut, interpolated or converted
    initial: int = 0  # as initialised
    temporal: bool = False  # it reads other frames


@dataclass
class Coverage:
    """What `initialise` has done to a network; `table()` is for people."""

    source: str
    digest: str  # first characters of the sha256 of the source
    rows: list[Row]  # of the top-level modules, those that read other frames apart
    adapted: dict[str, list[str]] = field(default_factory=dict)  # how -> names
    initial: list[str] = field(default_factory=list)  # names of which nothing is in the source
    unused: list[str] = field(default_factory=list)  # names of the source, with a shape where that was the reason
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        return _sum("total", self.rows)

    def table(self) -> str:
        """Several lines: a row per module, then what was adapted, left and not used, remarks and warnings."""
        head = ("module", "parameters", "taken", "adapted", "as initialised")
        cells = [
            (row.module, *(f"{number:,}" for number in (row.total, row.taken, row.adapted, row.initial)))
            for row in [*self.rows, self.total]
        ]
        widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
        lines = [f"weights from {self.source} (sha256 {self.digest})"]
        for line in [head, *cells]:
            numbers = (f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
            lines.append("  ".join([f"  {line[0]:<{widths[0]}}", *numbers]))
        lines += [f"  adapted ({how}): {_listed(names)}" for how, names in self.adapted.items()]
        anew = [row.module for row in self.rows if row.initial == row.total]
        names = [f"all of {module}" for module in anew] + [n for n in self.initial if _module(n) not in anew]
        lines += [f"  as initialised: {_listed(names)}"] if names else []
        lines += [f"  not used of the source: {_listed(self.unused)}"] if self.unused else []
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def measure(fits: Mapping[str, Fit], found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Coverage:
    """The coverage of a network with the state dict `target` by `fits`, made from `found`; without its source."""
    rows: dict[str, Row] = {}
    coverage = Coverage("", "", [])
    for name, own in target.items():
        module = _module(name)
        row = rows.setdefault(module, Row(module, temporal=is_temporal(name)))
        fit = fits.get(name)
        filled = fit.filled if fit else 0
        row.total += own.numel()
        row.initial += own.numel() - filled
        if fit and fit.how:
            row.adapted += filled
            coverage.adapted.setdefault(fit.how, []).append(name)
        else:
            row.taken += filled
        if not filled:
            coverage.initial.append(name)
    coverage.rows = list(rows.values())
    used = {fit.source or name for name, fit in fits.items()}
    for name in sorted(found.keys() - used):
        other = f" {list(found[name].shape)} instead of {list(target[name].shape)}" if name in target else ""
        coverage.unused.append(name + other)
    _judge(coverage, target)
    return coverage


def _judge(coverage: Coverage, target: Mapping[str, Tensor]) -> None:
    """Warn of a source that covers too little; what reads other frames may well be missing."""
    untouched = [row for row in coverage.rows if row.temporal and row.initial == row.total]
    if untouched:
        last = [target[name] for name in coverage.initial if is_temporal(name) and ".out_proj." in name]
        still = ", where they change nothing" if not any(value.any() for value in last) else ""
        coverage.notes.append(f"nothing in the source reads other frames: temporal blocks are as initialised{still}")
    row = _sum("", [row for row in coverage.rows if row not in untouched])
    share = (row.taken + row.adapted) / max(row.total, 1)
    if share < ENOUGH:
        coverage.warnings.append(
            f"only {share:.0%} of the parameters come from the source: is it of another size than vae.* says?"
        )


def _module(name: str) -> str:
    """The row of a parameter."""
    module = name.partition(".")[0]
    return f"{module} (temporal)" if is_temporal(name) and not is_temporal(module) else module


def _sum(module: str, rows: list[Row]) -> Row:
    columns = ("total", "taken", "adapted", "initial")
    return Row(module, **{column: sum(getattr(row, column) for row in rows) for column in columns})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
