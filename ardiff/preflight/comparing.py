"""Ranks compared: who has something else than most, and who is far slower than most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median_high
from typing import Any, TypeVar

from ardiff.preflight.checks import Remark, Report, ranks_in_words

Key = TypeVar("Key", int, str)  # a rank or a host


def unlike_most(
    reports: Sequence[Report], figure: str | Callable[[Report], Any], what: str, remedy: str, warning: bool = False
) -> list[Remark]:
    """A remark for every group of ranks whose figure is not that of most (of equally many: that of the lowest rank)."""
    values = {report.rank: report.figure(figure) if isinstance(figure, str) else figure(report) for report in reports}
    hosts = {report.rank: report.host for report in reports}
    known = {rank: str(value) for rank, value in values.items() if value is not None}
    if len(set(known.values())) < 2:
        return []
    common = Counter(known[rank] for rank in sorted(known)).most_common(1)[0][0]
    usual = [rank for rank in sorted(known) if known[rank] == common]
    remarks = []
    for value in dict.fromkeys(known[rank] for rank in sorted(known)):
        if value == common:
            continue
        ranks = tuple(rank for rank in known if known[rank] == value)
        text = f"{what} is {value} here, but {common} on {_place(usual, hosts)}; {remedy}"
        remarks.append(Remark(text, ranks, warning))
    return remarks


def all_of_host(reports: Sequence[Report], rank: int) -> tuple[int, ...]:
    """The ranks on the host of a rank: what it found is the host's."""
    host = next(report.host for report in reports if report.rank == rank)
    return tuple(report.rank for report in reports if report.host == host)


def _place(ranks: Sequence[int], hosts: dict[int, str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    first = f"{names[0]} ({ranks_in_words([rank for rank in ranks if hosts[rank] == names[0]])})"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more host{'s' if len(names) > 2 else ''}"


def slower_than_most(
    rates: dict[Key, float], fail_below: float, warn_below: float
) -> tuple[float, list[Key], list[Key]]:
    """The median of these rates, and the keys far below it and somewhat below it (as shares of the median).

    The median of an even number is the higher one, so that of two the slower is compared with the other.
    """
    if len(rates) < 2:
        return (next(iter(rates.values()), 0.0), [], [])
    middle = median_high(rates.values())
    far = [key for key, rate in rates.items() if rate < fail_below * middle]
    near = [key for key, rate in rates.items() if fail_below * middle <= rate < warn_below * middle]
    return middle, far, near
