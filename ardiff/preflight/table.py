"""A preflight's result for people: failures with their remedies, hosts, bandwidths, estimates, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ardiff.preflight.checks import ranks_in_words
from ardiff.preflight.network import AMONG
from ardiff.preflight.result import UNKNOWN, Result

LISTED = 40  # hosts without anything to say, in the table; the JSON has all
KIB = 1024


def lines_of(result: Result) -> list[str]:
    """The whole report."""
    lines = [*_remarks("FAILED", result, "failures"), *_remarks("warnings", result, "warnings")]
    if result.not_checked:
        lines += ["not checked", *(f"  {name}: {reason}" for name, reason in result.not_checked.items()), ""]
    lines += [*_hosts(result), ""]
    if result.collectives:
        lines += [*_collectives(result), ""]
    if result.links:
        lines += [*_links(result), ""]
    if estimated := _estimates(result.estimates):
        lines += [*estimated, ""]
    return [*lines, verdict(result)]


def verdict(result: Result) -> str:
    """The last line."""
    warnings = len(result.warnings) + sum(len(host["warnings"]) for host in result.hosts)
    noted = f", {warnings} warning{'s' if warnings != 1 else ''}" if warnings else ""
    ranks = sum(len(host["ranks"]) for host in result.hosts)
    who = f"{len(result.hosts)} host(s), {ranks} rank(s), {result.seconds:.0f} s{noted}"
    if result.ok:
        return f"preflight: OK ({who})"
    bad = [_name(host) for host in result.hosts if not host["ok"]]
    where = f" on {', '.join(bad[:8])}{f' and {len(bad) - 8} more' if len(bad) > 8 else ''}" if bad else ""
    failures = len(result.failures) + sum(len(host["failures"]) for host in result.hosts)
    return f"preflight: FAILED, {failures} failure{'s' if failures != 1 else ''}{where} ({who})"


def _remarks(title: str, result: Result, key: str) -> list[str]:
    """Lines said of hosts, each once with all its hosts, and those that concern none in particular."""
    hosts_of: dict[str, list[str]] = {}
    for host in result.hosts:
        for line in host[key]:
            hosts_of.setdefault(line, []).append(_name(host))
    lines = [f"  {_names(hosts)}: {line}" for line, hosts in hosts_of.items()]
    lines += [f"  {line}" for line in getattr(result, key)]
    return [title, *lines, ""] if lines else []


def _name(host: dict[str, Any]) -> str:
    """Of a host that has not come, all that is known are its ranks."""
    return f"? ({ranks_in_words(host['ranks'])})" if host["host"] == UNKNOWN else host["host"]


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else "")


def _spread(value: Any, form: str = "{:.3g}") -> str:
    """One number, or the least and the greatest of several."""
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def _one(value: Any) -> str:
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    return "-" if not values else str(values[0]) if len(set(map(str, values))) == 1 else "several"


# heading, figure of a host, how it is shown
_COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("device", "device", _one),
    ("GPU GiB", "memory_gb", lambda value: _spread(value, "{:.0f}")),
    ("TFLOP/s", "matmul_tflops", _spread),
    ("of peak", "matmul_of_peak", lambda value: _spread(value, "{:.0%}")),
    ("clips/s", "clips_per_s", lambda value: _spread(value, "{:.0f}")),
    ("write MB/s", "write_mb_per_s", lambda value: _spread(value, "{:.0f}")),
    ("within GB/s", "within_gb_per_s", _spread),
    ("free GiB", "host_available_gb", lambda value: _spread(value, "{:.0f}")),
    ("shm GiB", "shm_free_gb", lambda value: _spread(value, "{:.1f}")),
    ("cores", "cores", _one),
    ("clock s", "clock_ahead_s", lambda value: _spread(value, "{:+.3f}")),
]


def _hosts(result: Result) -> list[str]:
    columns = [column for column in _COLUMNS if any(host.get(column[1]) is not None for host in result.hosts)]
    rows = [["host", "ranks", *(heading for heading, _, _ in columns), ""]]
    shown = sorted(result.hosts, key=lambda host: host["ok"])[:LISTED]
    for host in shown:
        cells = [show(host.get(name)) for _, name, show in columns]
        state = "FAILED" if not host["ok"] else "warnings" if host["warnings"] else "ok"
        rows.append([host["host"], ranks_in_words(host["ranks"]).partition(" ")[2], *cells, state])
    lines = aligned(rows)
    more = len(result.hosts) - len(shown)
    return [*lines, f"  and {more} more hosts that are ok"] if more else lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _collectives(result: Result) -> list[str]:
    rows = [["collectives", "", "bytes", "ms", "bus GB/s"]]
    for one in result.collectives:
        where = AMONG if one["scope"] == AMONG else f"within {one['host']}"
        size = one["bytes"]
        shown = f"{size / KIB**2:.0f} MiB" if size >= KIB**2 else f"{size / KIB:.0f} KiB"
        cells = [f"{1000 * one['seconds']:.3f}", f"{one['bus_gb_per_s']:.3g}"]
        rows.append([f"{where} ({one['ranks']})", one["op"].replace("_", "-"), shown, *cells])
    return aligned(rows)


def _links(result: Result) -> list[str]:
    """The slowest links; all of them where there are few."""
    links = sorted(result.links, key=lambda link: link["gb_per_s"])
    rows = [["messages from", "to", "GB/s"]]
    rows += [[link["from"], link["to"], f"{link['gb_per_s']:.3g}"] for link in links[:8]]
    lines = aligned(rows)
    return [*lines, f"  and {len(links) - 8} faster links"] if len(links) > 8 else lines


def _estimates(estimates: dict[str, Any]) -> list[str]:
    lines = []
    if memory := estimates.get("memory_gb"):
        kinds = ", ".join(f"{kind} {size:.3g}" for kind, size in memory.items() if kind != "total")
        lines.append(f"estimated memory of a rank: {memory['total']:.3g} GiB ({kinds})")
    if step := estimates.get("step_s"):
        parts = ", ".join(f"{part} {seconds:.3g}" for part, seconds in step.items() if part != "total")
        lines.append(f"estimated time of a step: {step['total']:.3g} s ({parts})")
    lines += [f"  ({note})" for note in estimates.get("notes", ())]
    if checkpoint := estimates.get("checkpoint_gb"):
        lines.append(f"a checkpoint: {checkpoint:.3g} GiB")
    if reason := estimates.get("not_estimated"):
        lines.append(f"no estimate of {reason}")
    return lines
