"""What a scan finds out about each file, and the file beside the corpus in which that is kept.

A result depends on the file's content and the scene settings alone; labels, splits and duplicates are worked out
from all results together. Each result is one line of `corpus.jsonl.results`, added as soon as it is known, so that a
scan that was killed, or is repeated with more files, decodes only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ardiff.data.corpus import OK
from ardiff.errors import UserError
from ardiff.files import replacing
from ardiff.video import Frame, VideoError, check, fingerprint
from data_tools.scanning.near_duplicates import Pictures, Signature
from data_tools.scanning.scenes import THUMBNAIL_SIDE, SceneFinder, SceneSettings, split_at

VERSION = 1  # of the way results are found; another one makes earlier results void


@dataclass(frozen=True)
class Scene:
    """A stretch of frames without a cut, and what it looks like."""

    first_frame: int
    num_frames: int
    signature: Signature


@dataclass(frozen=True)
class Result:
    """What was found out about one video file or folder of pictures; only with status "ok" is the rest meaningful."""

    path: str
    status: str  # "ok" or the reason why it cannot be used
    sha256: str | None = None  # ardiff.video.fingerprint; None when it cannot be read
    codec: str = ""
    width: int = 0
    height: int = 0
    fps: str | None = None  # an exact fraction such as "30000/1001"; None for a folder, which does not say
    num_frames: int = 0
    scenes: tuple[Scene, ...] = ()


@dataclass(frozen=True)
class Task:
    """A file to be examined, unless its fingerprint is the `known` one."""

    path: str
    settings: SceneSettings
    known: str | None


def examine(task: Task, report: Callable[[Result | None], None]) -> None:
    """Report the result for one file, or None if it is the known one."""
    report(_examine(task))


def _examine(task: Task) -> Result | None:
    path = Path(task.path)
    try:
        digest = fingerprint(path)
    except OSError as error:
        return Result(task.path, f"cannot be read ({error.strerror})")
    if digest == task.known:
        return None
    finder, pictures = SceneFinder(task.settings), Pictures()

    def visit(frame: Frame) -> None:
        thumbnail = frame.thumbnail(THUMBNAIL_SIDE)
        finder.see(thumbnail)
        pictures.see(thumbnail)

    try:
        info = check(path, visit=visit)
    except VideoError as error:
        return Result(task.path, error.reason, digest)
    scenes = [Scene(*bounds, pictures.signature(*bounds)) for bounds in split_at(finder.cuts(), info.num_frames)]
    fps = None if path.is_dir() else f"{info.fps.numerator}/{info.fps.denominator}"
    return Result(task.path, OK, digest, info.codec, info.width, info.height, fps, info.num_frames, tuple(scenes))


class ResultsFile:
    """The results so far, by path, kept in a file of one JSON object per line.

    A line belongs to the scene settings that it names; those of other settings are kept until `finish`, so that a
    call with a wrong setting does not cost the work of earlier ones. Raises UserError when nothing can be written.
    """

    def __init__(self, path: Path, settings: SceneSettings) -> None:
        self.path, self.settings = path, {"version": VERSION, **asdict(settings)}
        self.known: dict[str, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        self._stream.seek(0)
        whole = True
        for line in self._stream:
            whole = line.endswith("\n")
            result = _parse(line, self.settings) if whole else None  # a killed run may have left half a line
            if result is not None:
                self.known[result.path] = result
        if not whole:
            print(file=self._stream, flush=True)

    def add(self, result: Result) -> None:
        """Keep a result, replacing an earlier one of that path."""
        self.known[result.path] = result
        print(self._format(result), file=self._stream, flush=True)

    def finish(self, results: Iterable[Result]) -> None:
        """Leave only these results in the file, in this order, and close it."""
        self._stream.close()
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for result in results:
                print(self._format(result), file=stream)

    def _format(self, result: Result) -> str:
        return json.dumps({"settings": self.settings, **asdict(result)})


def _parse(line: str, settings: dict[str, Any]) -> Result | None:
    """The result in a line, or None if it is damaged or of other settings."""
    try:
        values = json.loads(line)
        if values.pop("settings") != settings:
            return None
        scenes = (Scene(**{**scene, "signature": Signature(**scene["signature"])}) for scene in values.pop("scenes"))
        return Result(**values, scenes=tuple(scenes))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
