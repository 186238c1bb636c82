"""The findings of all ranks as one document: what failed on which host, figures, outliers, estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ardiff.preflight.checks import Check, Remark, Report, ranks_in_words
from ardiff.preflight.comparing import all_of_host
from ardiff.preflight.network import host_links

VERSION = 1
UNKNOWN = "?"  # the host of ranks that have not come
# Figures that are the same for all ranks of a host, or that only one of them has; of others every rank has its own.
_TOP_LEVEL = ("collectives", "links")  # these concern several hosts


@dataclass
class Result:
    """What a preflight found. Lines of `failures` and `warnings` concern no host in particular."""

    hosts: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    outliers: list[str] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    estimates: dict[str, Any] = field(default_factory=dict)
    not_checked: dict[str, str] = field(default_factory=dict)  # check -> why
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures and all(host["ok"] for host in self.hosts)

    def as_json(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            "version": VERSION,
            "ok": self.ok,
            "hosts": self.hosts,
            "failures": self.failures,
            "warnings": self.warnings,
            "outliers": self.outliers,
            "collectives": self.collectives,
            "links": self.links,
            "estimates": self.estimates,
            "not_checked": self.not_checked,
            "seconds": self.seconds,
        }


def assemble(
    reports: Sequence[Report],
    checks: Sequence[Check],
    hosts: Sequence[str],
    extra: Sequence[Remark] = (),
    estimates: dict[str, Any] | None = None,
) -> Result:
    """Put together what the ranks found, what shows when they are compared, and `extra` remarks.

    hosts: of every rank, "" where it has not come; such ranks are on hosts named `?`.
    """
    compared = [remark for check in checks for remark in check.compare(reports)]
    remarks = _merged([*_own(reports, checks), *compared, *extra], hosts)
    result = Result(estimates=estimates or {})
    for host, ranks in _by_host(hosts):
        mine = [report for report in reports if report.rank in ranks]
        failures, warnings = (_lines(remarks, ranks, warning) for warning in (False, True))
        figures = _figures(mine)
        head = {"host": host, "ranks": ranks, "ok": not failures, "failures": failures, "warnings": warnings}
        result.hosts.append({**head, **figures})
        if any(remark.outlier and set(remark.ranks) & set(ranks) for remark in remarks):
            result.outliers.append(host)
    everywhere = [remark for remark in remarks if not remark.ranks]
    result.failures = _unique(remark.text for remark in everywhere if not remark.warning)
    result.warnings = _unique(remark.text for remark in everywhere if remark.warning)
    result.collectives = list(_among_all(reports))
    result.links = [{"from": ends[0], "to": ends[1], "gb_per_s": rate} for ends, rate in host_links(reports).items()]
    for check in checks:
        reasons = [report.findings[check.name].not_checked for report in reports if check.name in report.findings]
        if reasons and all(reasons):
            result.not_checked[check.name] = str(reasons[0])
    return result


def _by_host(hosts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Hosts with their ranks. Ranks that have not come are taken for hosts with as many ranks as the others have."""
    known: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        if host:
            known.setdefault(host, []).append(rank)
    usual = max((len(ranks) for ranks in known.values()), default=1)
    unknown: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts):
        if not host:
            unknown.setdefault(rank // usual, []).append(rank)
    return sorted([*known.items(), *((UNKNOWN, ranks) for ranks in unknown.values())], key=lambda entry: entry[1][0])


def _own(reports: Sequence[Report], checks: Sequence[Check]) -> list[Remark]:
    """What each rank found by itself, or for its host; the same line of several ranks is one remark."""
    of_host = {check.name for check in checks if check.scope == "host"}
    found: dict[tuple[str, bool], list[int]] = {}
    for report in reports:
        for name, finding in report.findings.items():
            ranks = all_of_host(reports, report.rank) if name in of_host else (report.rank,)
            for warning, lines in ((False, finding.failures), (True, finding.warnings)):
                for line in lines:
                    found.setdefault((line, warning), []).extend(ranks)
    return [Remark(line, tuple(ranks), warning) for (line, warning), ranks in found.items()]


def _merged(remarks: Sequence[Remark], hosts: Sequence[str]) -> list[Remark]:
    """Remarks of the same words as one; what holds for all ranks of several hosts is about the job, and no host."""
    by_words: dict[tuple[str, bool, bool, bool], set[int]] = {}
    for remark in remarks:
        key = (remark.text, remark.warning, remark.outlier, bool(remark.ranks))
        by_words.setdefault(key, set()).update(remark.ranks)
    everyone = set(range(len(hosts))) if len(set(hosts)) > 1 else set()
    return [
        Remark(text, () if ranks == everyone else tuple(sorted(ranks)), warning, outlier)
        for (text, warning, outlier, _), ranks in by_words.items()
    ]


def _lines(remarks: Sequence[Remark], ranks: Sequence[int], warning: bool) -> list[str]:
    """The lines about a host with these ranks; the ranks are named unless all of them are meant."""
    lines = []
    for remark in remarks:
        here = sorted(set(remark.ranks) & set(ranks))
        if here and remark.warning == warning:
            lines.append(remark.text if len(here) == len(ranks) else f"{ranks_in_words(here)}: {remark.text}")
    return _unique(lines)


def _figures(reports: Sequence[Report]) -> dict[str, Any]:
    """Figures of a host: one value where all ranks (that have it) say the same, otherwise a list by rank."""
    names = {name: None for report in reports for found in report.findings.values() for name in found.figures}
    figures: dict[str, Any] = {}
    for name in names:
        if name in _TOP_LEVEL:
            continue
        values = [report.figure(name) for report in reports]
        known = [value for value in values if value is not None]
        same = len(known) > 0 and all(value == known[0] for value in known)
        figures[name.replace(" ", "_")] = known[0] if same else values
    return figures


def _among_all(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The collectives of rank 0, which all share, and those within every host."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for report in reports:
        for one in report.figure("collectives") or []:
            within = one["scope"] != "among all ranks"
            if (within and report.host not in seen) or (not within and not seen):
                found.append({**one, "host": report.host} if within else one)
        if report.figure("collectives"):
            seen.add(report.host)
    return found


def _unique(lines: Any) -> list[str]:
    return list(dict.fromkeys(lines))
