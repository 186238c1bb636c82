"""Scene cuts, found with PySceneDetect while the video is decoded, frame by frame on thumbnails.

    finder = SceneFinder(SceneSettings())
    check(path, visit=lambda frame: finder.see(frame.thumbnail(THUMBNAIL_SIDE)))
    finder.cuts()  # [30, 76]: the scenes are frames 0 to 29, 30 to 75, and 76 to the end

"adaptive" compares the change from one frame to the next with the changes around it, so that fast motion and a shaking
camera are no cuts; "content" compares it with a fixed threshold. Both find hard cuts. Besides, a video is cut where
black begins or ends, which takes fades to black and black beginnings apart. A dissolve, in which one scene shows
through the other, is not a cut.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

THUMBNAIL_SIDE = 128  # pixels; up to 256 the cuts that are found stay the same, at twice the time
WINDOW = 3  # frames on either side that "adaptive" compares with; 2 would miss a cut blended over two frames
THRESHOLDS = {"adaptive": 2.5, "content": 27.0}
DETECTORS = (*THRESHOLDS, "none")

# Many videos repeat frames because their frame rate was raised. A repeated frame has no change, which makes the
# ordinary change after it look like a cut; so repeated frames are not shown to the detector, up to a limit.
REPEATED = 2.0  # mean difference of the RGB values
MAX_REPEATED = 2


@dataclass(frozen=True)
class SceneSettings:
    """How cuts are found; equal settings and frames give equal cuts."""

    detector: str = "adaptive"  # one of DETECTORS
    threshold: float = THRESHOLDS["adaptive"]  # adaptive: times the changes around it; content: the change itself
    min_change: float = 15.0  # adaptive: the mean change of hue, saturation and brightness (0 to 255) that a cut needs
    black_below: float = 8.0  # mean brightness (0 to 255) below which a frame is black; 0: black is not looked for


class SceneFinder:
    """Collects the frames of one video in order; `cuts` then says where its scenes begin."""

    def __init__(self, settings: SceneSettings) -> None:
        import cv2
        from scenedetect.detectors import AdaptiveDetector, ContentDetector

        cv2.setNumThreads(1)  # programs use processes
        self._adaptive = settings.detector == "adaptive"
        self._content = None
        if self._adaptive:
            self._content = AdaptiveDetector(
                adaptive_threshold=settings.threshold,
                min_scene_len=1,
                window_width=WINDOW,
                min_content_val=settings.min_change,
            )
        elif settings.detector == "content":
            self._content = ContentDetector(threshold=settings.threshold, min_scene_len=0)
        self._black_below = settings.black_below
        self._was_black = False
        self._seen = 0
        self._shown: list[int | None] = []  # the frame of each picture that the detector got; None: a mirror image
        self._found: set[int] = set()
        self._head: list[tuple[int, np.ndarray]] = []  # the first pictures, until their mirror images can be shown
        self._tail: deque[np.ndarray] = deque(maxlen=WINDOW + 1)
        self._repeated = 0

    def see(self, thumbnail: np.ndarray) -> None:
        """Take the next frame: uint8 RGB [H, W, 3], all of one size."""
        if self._black_below:
            is_black = bool(thumbnail.mean() < self._black_below)
            if is_black != self._was_black:
                self._found.add(self._seen)
            self._was_black = is_black
        if self._content is not None and not self._is_repeated(thumbnail):
            self._tail.append(thumbnail)
            if not self._adaptive or len(self._head) > WINDOW:
                self._show(self._seen, thumbnail)
            else:
                self._head.append((self._seen, thumbnail))
                if len(self._head) > WINDOW:
                    self._show_head()
        self._seen += 1

    def cuts(self) -> list[int]:
        """The frames at which a new scene begins, ascending, without 0. To be called once, after the last frame."""
        if self._adaptive:
            if len(self._head) <= WINDOW:
                self._show_head()
            # The detector decides on a frame when it knows the WINDOW frames after it.
            for thumbnail in [*self._tail][-2::-1]:
                self._show(None, thumbnail)
        return sorted(cut for cut in self._found if 0 < cut < self._seen)

    def _show_head(self) -> None:
        """Show the first pictures, and before them their mirror images, so that an early cut has surroundings."""
        for _, thumbnail in self._head[:0:-1]:
            self._show(None, thumbnail)
        for number, thumbnail in self._head:
            self._show(number, thumbnail)

    def _show(self, number: int | None, thumbnail: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        assert self._content is not None
        time = FrameTimecode(len(self._shown), 25.0)  # only used for counting: the rate has no meaning
        self._shown.append(number)
        for cut in self._content.process_frame(time, np.ascontiguousarray(thumbnail[..., ::-1])):
            frame = self._shown[cut.frame_num]
            if frame is not None:
                self._found.add(frame)

    def _is_repeated(self, thumbnail: np.ndarray) -> bool:
        import cv2

        if self._tail and self._repeated < MAX_REPEATED and cv2.absdiff(thumbnail, self._tail[-1]).mean() < REPEATED:
            self._repeated += 1
            return True
        self._repeated = 0
        return False


def split_at(cuts: list[int], num_frames: int) -> list[tuple[int, int]]:
    """(first frame, number of frames) of each scene of a video of `num_frames`."""
    bounds = [0, *cuts, num_frames]
    return [(start, end - start) for start, end in pairwise(bounds)]
