"""Samples in words, for the log."""

from __future__ import annotations

from contextlib import suppress

from ardiff.data.mixture import Mixture


def describe_samples(data: Mixture, position: int, size: int) -> list[str]:
    """Of which videos and frames the global batch of `size` samples from `position` on is made, a line each.

    A line reads `DATA/latents-000003.tar: 000012 frames 12-27`: shard, key of the video, first and last frame of the
    clip (and `, every 2nd` or so with data.stride). Samples that could not be read were replaced by others; those are
    reported as bad samples. A video whose shard cannot be read any more is given by its number in the data set. Raises
    nothing, whatever is wrong with the data.
    """
    stride, lines = data.plans[0].stride, []
    visits = data.visits(position, size)
    columns = (visits.video.tolist(), visits.first_frame.tolist(), visits.num_frames.tolist())
    for video, first, count in zip(*columns, strict=True):
        frames = f"frames {first}-{first + (count - 1) * stride}" if count > 1 else f"frame {first}"
        every = f", every {_ordinal(stride)}" if stride > 1 and count > 1 else ""
        lines.append(f"{_named(data, video)} {frames}{every}")
    return lines


def _named(data: Mixture, video: int) -> str:
    """A video by shard and key, as far as they can be read."""
    name = f"video {video}"
    # A warning must not end a run, and what a damaged table or header raises cannot be foretold.
    with suppress(Exception):
        place = data.place_of(video)[0]
        name = f"{place}: {name}"
        name = f"{place}: {data.key_of(video)}"
    return name


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
