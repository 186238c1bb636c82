"""Video files, decoded by FFmpeg without tolerance for damage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ardiff.video.frames import Frame, VideoError, VideoInfo, shrunk

EXTENSIONS = frozenset((".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"))
LOCAL = {"protocol_whitelist": "file"}  # a playlist that poses as a video must not reach the network
END_TOLERANCE = Fraction(1, 10)  # seconds; or 3 frames, whichever is longer


@contextmanager
def open_file(path: Path) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """What a file declares, and its frames in display order. Raises VideoError, also while they are iterated."""
    with _opened(path) as (container, stream):
        info = _describe(path, stream)
        yield info, _strict_frames(path, container, stream, info)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video with a decoder that stops at damage; errors of FFmpeg become VideoError."""
    try:
        with av.open(f"file:{path}", options=LOCAL) as container:
            stream = container.streams.best("video")  # not a cover picture, if there is anything else
            if not isinstance(stream, av.VideoStream):
                raise VideoError(path, "has no video stream")
            if stream.codec_context is None:
                raise VideoError(path, "its codec is unknown to FFmpeg")
            stream.codec_context.options = {"err_detect": "explode"}
            stream.thread_type, stream.codec_context.thread_count = "SLICE", 1  # programs use processes
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(path, f"cannot be opened as a video ({error.strerror})") from error
    except (OSError, UnicodeError) as error:
        raise VideoError(path, f"cannot be read ({error})") from error


def _describe(path: Path, stream: av.VideoStream) -> VideoInfo:
    fps = stream.average_rate or stream.guessed_rate
    if not fps or not stream.width or not stream.height:
        raise VideoError(path, "does not declare its frame rate or size")
    return VideoInfo(stream.codec_context.name, stream.width, stream.height, Fraction(fps), stream.frames)


def _strict_frames(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo
) -> Iterator[Frame]:
    """All frames in display order; at the end the count (or, without one, the duration) is compared."""
    converter = VideoReformatter()  # kept for the whole video: setting one up costs more than a small frame
    count = hidden = 0
    size: tuple[int, int] | None = None
    end = Fraction(0)
    try:
        for packet in container.demux(stream):
            hidden += packet.is_discard  # cut away by an edit list: counted by the container, never shown
            for frame in packet.decode():
                if frame.is_corrupt or packet.is_corrupt:
                    raise VideoError(path, f"frame {count} is damaged")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise VideoError(path, f"frame {count} changes the size {size[0]}x{size[1]}")
                if frame.pts is not None and frame.time_base is not None:
                    end = max(end, frame.pts * frame.time_base + 1 / info.fps)
                count += 1
                yield _FileFrame(frame, converter)
    except av.FFmpegError as error:
        raise VideoError(path, f"frame {count} cannot be decoded ({error.strerror})") from error
    # AVI counts the empty packet that ends a stream with packed B-frames as a frame.
    slack = 1 if container.format.name == "avi" else 0
    if count + hidden + slack < info.num_frames:
        raise VideoError(path, f"incomplete: {count} of {info.num_frames} declared frames can be decoded")
    if count == 0:
        raise VideoError(path, "has no frames")
    declared_end = _declared_end(container, stream)
    if not info.num_frames and declared_end - end > max(END_TOLERANCE, 3 / info.fps):
        raise VideoError(path, f"truncated: ends at {float(end):.2f} s of {float(declared_end):.2f} s declared")


def _declared_end(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """The time in seconds at which the container says the video ends, or 0."""
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", ""))  # Matroska's
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3])
    if stream.duration and stream.time_base:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    alone = len(container.streams) == 1  # otherwise the duration may be that of the sound
    return Fraction(container.duration or 0, av.time_base) if alone else Fraction(0)


@dataclass(frozen=True)
class _FileFrame:
    """A frame of a video file. The rotation that a phone notes in it is applied to all that is taken from it."""

    frame: av.VideoFrame
    converter: VideoReformatter

    def size(self) -> tuple[int, int]:
        turned = self.frame.rotation % 180 != 0
        return (self.frame.height, self.frame.width) if turned else (self.frame.width, self.frame.height)

    def rgb(self) -> np.ndarray:
        return self._upright(self.converter.reformat(self.frame, format="rgb24"))

    def thumbnail(self, side: int) -> np.ndarray:
        width, height = shrunk((self.frame.width, self.frame.height), side)
        # AREA averages over all pixels that are merged; swscale's default skips most of them.
        return self._upright(self.converter.reformat(self.frame, width, height, "rgb24", interpolation="AREA"))

    def _upright(self, converted: av.VideoFrame) -> np.ndarray:
        rgb = converted.to_ndarray()
        quarter_turns = round(self.frame.rotation / 90) % 4  # counter-clockwise, as rot90
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if quarter_turns else rgb
