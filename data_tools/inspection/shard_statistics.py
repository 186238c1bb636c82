"""Numbers about a data set, from the samples themselves: channels of the latents, sizes and brightness of pictures,
lengths, classes, frame rates and resolutions of the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ardiff.data.shards import LATENTS_MEMBER, Moments
from ardiff.data.tar import ShardError
from data_tools.common import plural
from data_tools.inspection.sample_checks import Checked, add_latents, chunks, decode_picture
from data_tools.inspection.shard_checks import read_checked
from data_tools.inspection.shard_folders import Part, Problem, Rules, ShardJob, jobs_of, printable, rate_of, total
from data_tools.inspection.shard_listing import describe_classes, duration
from data_tools.inspection.shard_workers import for_each_shard

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
DEAD = 1e-3  # a channel whose std is a smaller share of the largest says nothing
PICTURES_PER_SHARD = 32  # whose brightness is looked at
SHOWN_SOURCES = 8


@dataclass
class ShardNumbers:
    """What was counted in one shard."""

    problems: list[Problem] = field(default_factory=list)
    sums: dict[str, Any] = field(default_factory=dict)  # see Moments
    low: np.ndarray | None = None  # per channel
    high: np.ndarray | None = None
    lengths: list[int] = field(default_factory=list)  # frames of every video
    classes: Counter[str] = field(default_factory=Counter)
    rates: Counter[str] = field(default_factory=Counter)
    resolutions: Counter[str] = field(default_factory=Counter)
    picture_bytes: list[int] = field(default_factory=list)
    brightness: list[float] = field(default_factory=list)  # 0 to 1, of some pictures


@dataclass
class Statistics:
    """The numbers of one data set."""

    part: Part
    problems: list[Problem]
    values: dict[str, Any]  # as they are printed with --json
    classes: Counter[str]

    def lines(self) -> Iterator[str]:
        """The numbers as text."""
        values, manifest = self.values, self.part.manifest
        yield f"{self.part.folder}"
        yield f"  {manifest.kind}: {total(self.part.chosen)}"
        rate = rate_of(manifest)
        running = f", {duration(values['frames'] / rate)} at {rate:.6g} frames per second" if rate else ""
        yield f"  read: {plural(values['videos'], 'video')}, {plural(values['frames'], 'frame')}{running}"
        yield f"  frames per video: {_percentiles(values['lengths'])}"
        yield printable(f"  {describe_classes(self.classes, len(manifest.classes))}")
        for name, unit in (("rates", "frames per second"), ("resolutions", "pixels")):
            yield printable(f"  sources, {unit}: {_most_common(values[name])}")
        yield from self._latents() if manifest.kind == "latents" else self._pictures()

    def _latents(self) -> Iterator[str]:
        channels = self.values["channels"]
        yield f"  {'channel':>7}  {'mean':>10}  {'std':>10}  {'min':>10}  {'max':>10}"
        for number in range(len(channels["mean"])):
            row = (f"{channels[name][number]:>10.4f}" for name in ("mean", "std", "min", "max"))
            yield f"  {number:>7}  {'  '.join(row)}{'  dead' if number in channels['dead'] else ''}"
        dead = len(channels["dead"])
        yield f"  dead channels (std below {DEAD:g} of the largest): {dead} of {len(channels['mean'])}"

    def _pictures(self) -> Iterator[str]:
        brightness = self.values["brightness"]
        yield f"  bytes per picture: mean {self.values['mean_bytes']:.0f}, {_percentiles(self.values['bytes'])}"
        shown = f"mean {brightness['mean']:.3f}, std {brightness['std']:.3f}" if brightness else "unknown"
        yield f"  brightness of {plural(self.values['pictures_decoded'], 'picture')} (0 black, 1 white): {shown}"


def statistics(parts: Sequence[Part], workers: int = 0, timeout: float = 600) -> list[Statistics]:
    """Read all shards; samples that cannot be used are named in `problems` and not counted.

    `workers` and `timeout` as in `for_each_shard`.
    """
    jobs = jobs_of(parts)
    numbers = [ShardNumbers() for _ in jobs]
    sizes = [job.entry.bytes for job in jobs]
    for outcome in for_each_shard(count_shard, jobs, sizes, workers, timeout, "reading"):
        if outcome.failure:
            problem = Problem(str(jobs[outcome.item].tar), f"could not be read: {outcome.failure}")
            numbers[outcome.item] = ShardNumbers([problem])
        else:
            numbers[outcome.item] = outcome.value
    results, first = [], 0
    for part in parts:
        results.append(_merge(part, numbers[first : first + len(part.chosen)]))
        first += len(part.chosen)
    return results


def count_shard(job: ShardJob, report: Callable[[Any], None]) -> None:
    """Count what is in one shard, reporting BytesDone and at the end ShardNumbers."""
    result, moments = ShardNumbers(), Moments(job.rules.channels)
    step = max(1, job.entry.frames // PICTURES_PER_SHARD)
    pictures = 0
    try:
        for group, members, checked in read_checked(job, result.problems, report, decode=False):
            if checked is None:
                continue
            _count(checked, job.rules, result, moments)
            for name in checked.pictures:
                result.picture_bytes.append(len(members[name]))
                if pictures % step == 0:
                    _look_at(members[name], job, group[0].key, result)
                pictures += 1
    except ShardError as error:
        result.problems.append(Problem.of(error))
    except OSError as error:
        result.problems.append(Problem(str(job.tar), f"cannot be read ({error.strerror})"))
    result.sums = moments.as_json()
    report(result)


def _count(checked: Checked, rules: Rules, result: ShardNumbers, moments: Moments) -> None:
    info = checked.info
    label = info.get("class")
    result.lengths.append(checked.frames)
    result.classes["" if label is None else rules.classes[label]] += 1
    result.rates[str(info.get("fps", "unknown"))] += 1
    size = f"{info['width']} x {info['height']}" if "width" in info and "height" in info else "unknown"
    result.resolutions[size] += 1
    if LATENTS_MEMBER in checked.arrays:
        latents = checked.arrays[LATENTS_MEMBER]
        add_latents(moments, latents)
        for part in chunks(latents):
            low, high = part.min(axis=(0, 1)), part.max(axis=(0, 1))
            result.low = low if result.low is None else np.minimum(result.low, low)
            result.high = high if result.high is None else np.maximum(result.high, high)


def _look_at(data: bytes, job: ShardJob, key: str, result: ShardNumbers) -> None:
    try:
        result.brightness.append(float(decode_picture(data, job.rules.size).mean() / 255))
    except ValueError as error:
        result.problems.append(Problem(str(job.tar), f"a picture {error}", key=key))


def _merge(part: Part, numbers: Sequence[ShardNumbers]) -> Statistics:
    lengths = [length for shard in numbers for length in shard.lengths]
    rates, resolutions, classes = Counter[str](), Counter[str](), Counter[str]()
    for shard in numbers:
        rates += shard.rates
        resolutions += shard.resolutions
        classes += shard.classes
    values: dict[str, Any] = {
        "folder": str(part.folder),
        "kind": part.manifest.kind,
        "videos": len(lengths),
        "frames": sum(lengths),
        "lengths": _quantiles(lengths),
        "classes": dict(classes),
        "rates": dict(rates),
        "resolutions": dict(resolutions),
    }
    if part.manifest.kind == "latents":
        values["channels"] = _channels(numbers)
    else:
        sizes = [size for shard in numbers for size in shard.picture_bytes]
        brightness = [value for shard in numbers for value in shard.brightness]
        values["bytes"], values["mean_bytes"] = _quantiles(sizes), float(np.mean(sizes)) if sizes else 0.0
        values["pictures_decoded"] = len(brightness)
        values["brightness"] = (
            {"mean": float(np.mean(brightness)), "std": float(np.std(brightness))} if brightness else None
        )
    problems = [problem for shard in numbers for problem in shard.problems]
    return Statistics(part, problems, values, classes)


def _channels(numbers: Sequence[ShardNumbers]) -> dict[str, Any]:
    """Per channel: mean, std, min and max over all tokens of all frames, and which channels are dead."""
    used = [shard for shard in numbers if shard.low is not None]
    if not used:
        return {"mean": [], "std": [], "min": [], "max": [], "dead": []}
    mean, std = Moments.merge(shard.sums for shard in used)
    low = np.min([shard.low for shard in used if shard.low is not None], axis=0)
    high = np.max([shard.high for shard in used if shard.high is not None], axis=0)
    dead = [number for number, value in enumerate(std) if value <= DEAD * max(std)]
    return {
        "mean": mean,
        "std": std,
        "min": low.astype(float).tolist(),
        "max": high.astype(float).tolist(),
        "dead": dead,
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    return {str(share): float(value) for share, value in zip(PERCENTILES, found, strict=True)}


def _percentiles(values: dict[str, float]) -> str:
    names = {"0": "min", "50": "median", "100": "max"}
    return ", ".join(f"{names.get(share, share + ' %')} {value:g}" for share, value in values.items()) or "none"


def _most_common(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} ({count:,})" for name, count in ordered[:SHOWN_SOURCES]]
    if len(ordered) > SHOWN_SOURCES:
        shown.append(f"{len(ordered) - SHOWN_SOURCES} more")
    return ", ".join(shown)
