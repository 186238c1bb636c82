"""The data: what a run would refuse, equal on all ranks, samples of every shard read and compared, clips per second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ardiff.data.dataset import ShardSet
from ardiff.data.mixture import Mixture
from ardiff.data.tar import ShardError
from ardiff.preflight.checks import Context, Finding, Remark, Report
from ardiff.preflight.comparing import slower_than_most, unlike_most
from ardiff.training.job import Feed

SECONDS, QUICK_SECONDS = 10.0, 2.0  # of reading samples, and half of it for clips
VIDEOS = 2  # of every shard, other ones on every rank
NAMED = 3  # broken shards in a message
FAR, NEAR = 0.25, 0.5  # of the median rate


def check_shards(context: Context) -> Finding:
    """Build what a run would be made of, then read: sets `context.job`."""
    config = context.config
    if config is None:
        return Finding(not_checked="no configuration")
    if not (config.data.shards or config.data.mixture):
        return Finding(not_checked="no --data.shards")
    # Sample videos need an AR-VAE, which is none of the data.
    job = context.build_job(replace(config, train=replace(config.train, sample_every=0)))
    job.check(context.run_size)
    context.job = job
    data = job.data
    found = Finding(
        {
            "data": data.identity[:16],
            "held_out": "none" if job.validate is None else job.validate.identity[:16],
            "shards": sum(len(part.manifest.shards) for part in data.sets),
            "videos": len(data),
            "clips_per_epoch": data.visits_per_epoch,
        }
    )
    seconds = QUICK_SECONDS if context.quick else SECONDS
    if data.is_remote:
        seconds = 0.0  # one shard: each is fetched whole, and kept
    tried, broken = read_samples(data, context.rank, seconds)
    found.figures["shards_read"] = tried
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        found.failures.append(f"{len(broken)} shard(s) cannot be read: {'; '.join(broken[:NAMED])}{more}")
    elif not data.is_remote:
        found.figures["clips_per_s"] = clips_per_second(
            job.feeds[0], config.train.micro_batch_size, context, seconds / 2
        )
    return found


def read_samples(data: Mixture, seed: int, seconds: float) -> tuple[int, list[str]]:
    """Read some videos of every shard, in a random order and with their checksums, until the time is over (but at least
    one). Returns how many shards were read, and a line for each that is broken.
    """
    generator = np.random.default_rng(seed)
    shards = [(part, number) for part in data.sets for number in range(len(part.manifest.shards))]
    until, tried, broken = time.monotonic() + seconds, 0, []
    for place in generator.permutation(len(shards)):
        part, number = shards[place]
        videos = np.flatnonzero(part.shard_of_video == number)
        tried += 1
        try:
            for video in generator.choice(videos, min(VIDEOS, len(videos)), replace=False):
                _read(part, int(video))
        except ShardError as error:
            broken.append(str(error))
        if time.monotonic() > until:
            break
    return tried, broken


def _read(part: ShardSet, video: int) -> None:
    if part.manifest.kind == "frames":
        part.read_frames(video, 0, 1)  # a picture's checksum is always compared
        return
    verify, part.verify = part.verify, True
    try:
        part.read_latents(video, 0, int(part.frames[video]))
    finally:
        part.verify = verify


def clips_per_second(feed: Feed, micro_batch: int, context: Context, seconds: float) -> float:
    """Clips that this rank reads and prepares in a second, of places in the order where no other rank reads."""
    size = max(1, micro_batch // feed.counts_as)
    total = feed.data.visits_per_epoch
    begin, made = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not made:
        lanes = feed.data.lanes  # an order of lanes is asked for in whole rows
        count = -(-size // lanes) * lanes
        position = (context.rank * total // context.size + made) // lanes * lanes
        feed.collate(feed.data.visits(position, count))
        made += count
    return made / (time.perf_counter() - begin)


def compare_shards(reports: Sequence[Report]) -> list[Remark]:
    """Other data than on most ranks, and ranks that read far more slowly."""
    same = "copy the same shards there, or give all hosts the same path"
    remarks = unlike_most(reports, "data", "the data (identity of manifest and shards)", same)
    remarks += unlike_most(reports, "held_out", "the held-out data (identity)", same)
    rates = {report.rank: report.figure("clips_per_s") for report in reports}
    known = {rank: rate for rank, rate in rates.items() if rate is not None}
    middle, far, near = slower_than_most(known, FAR, NEAR)
    for rank in [*far, *near]:
        text = f"shards give {known[rank]:.0f} clips/s, on most ranks {middle:.0f}; look at its disk and mounts"
        remarks.append(Remark(text, (rank,), warning=True))
    return remarks
