"""Guards of a run: losses that jump."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
LEAST_SIGMA = 0.02  # as a share of the loss: what is steadier than this is judged as if it were not
RECENT = 4  # the last quarter of the window says where the loss stands


class SpikeDetector:
    """Finds losses that lie far above the recent ones.

    A loss is compared with the median of the last quarter of the `window` losses before it, in units of the standard
    deviation that robust statistics give: the larger of the median absolute deviation from that median and, over the
    window, the median step from one loss to the next (divided by the square root of 2). So a loss that falls steeply
    neither hides a spike nor widens what is tolerated. Losses are compared by their logarithms, for they fall over
    orders of magnitude, unless some are not positive (those of adversarial training).

    A spike does not enter the statistics. When half of the window would be spikes they are no spikes but the new level,
    and are accepted. Losses that are not finite are passed over: they belong to steps that are skipped.

    sigmas: from how many deviations on a loss is a spike; 0: never. window: how many losses are recent, at least 10.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        assert sigmas >= 0 and window >= 10
        self.sigmas, self.window = sigmas, window
        self._least = max(10, window // RECENT)  # so many losses are needed before any is judged
        self._seen: deque[tuple[float, bool]] = deque(maxlen=window)  # losses, and whether each was a spike

    def see(self, loss: float) -> float | None:
        """Take in the loss of a step; if it is a spike, by how many deviations it exceeds the recent ones."""
        if not self.sigmas or not math.isfinite(loss):
            return None
        deviations = self._deviations(loss)
        spike = deviations is not None and deviations > self.sigmas
        self._seen.append((loss, spike))
        if 2 * sum(was_spike for _, was_spike in self._seen) < self.window:
            return deviations if spike else None
        self._seen = deque(((value, False) for value, _ in self._seen), self.window)
        return None

    def reset(self) -> None:
        """Forget all losses: another stage or learning rate begins, and with it perhaps another level."""
        self._seen.clear()

    def state(self) -> list[float]:
        """What `restore` needs to decide as this detector does: for each recent loss its value, and 1 for a spike."""
        return [number for loss, spike in self._seen for number in (loss, float(spike))]

    def restore(self, values: Sequence[float]) -> None:
        """Go on from a `state`, of which a shorter window takes the end."""
        pairs = zip(values[::2], values[1::2], strict=True)
        self._seen = deque(((float(loss), bool(spike)) for loss, spike in pairs), self.window)

    def _deviations(self, loss: float) -> float | None:
        """How far a loss lies above the recent ones, or None while there are too few of them."""
        losses = [value for value, spike in self._seen if not spike]
        if len(losses) < self._least:
            return None
        logarithmic = loss > 0 and min(losses) > 0
        if logarithmic:
            loss, losses = math.log(loss), [math.log(value) for value in losses]
        recent = losses[-self._least :]
        centre = median(recent)
        around = TO_SIGMA * median(abs(value - centre) for value in recent)
        steps = [abs(after - before) for before, after in pairwise(losses)]
        sigma = max(around, TO_SIGMA * median(steps) / math.sqrt(2))
        floor = LEAST_SIGMA * (1.0 if logarithmic else max(median(map(abs, recent)), 1e-12))
        return (loss - centre) / max(sigma, floor)
