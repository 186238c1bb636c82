"""Video files: strict decoding to RGB frames, resizing, and writing mp4, GIF and contact sheets.

Decoding is strict because FFmpeg by default conceals damage: a broken file gives plausible, wrong frames and
no error. Here the decoder stops at the first picture that it finds damaged or had to conceal, and the frames are
counted against the header. H.264 has no checksums, so damage that happens to be valid syntax stays unseen.

    for frame in decode(Path("clip.mp4"), first_frame=10, num_frames=32, stride=2):  # uint8 [H, W, 3]
        small = resize_and_crop(frame, 256)
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ardiff.errors import UserError
from ardiff.files import replacing

EXTENSIONS = frozenset((".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"))
LOCAL = {"protocol_whitelist": "file"}  # a playlist that poses as a video must not reach the network
SMPTE170M = 6  # ITU-T H.273 matrix coefficients: what swscale uses for RGB to YUV unless told otherwise
END_TOLERANCE = Fraction(1, 10)  # seconds; or 3 frames, whichever is longer


class VideoError(UserError):
    """A video that cannot be used: `path` and `reason` (one line, without the path)."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. Width and height are as displayed (a phone's rotation applied), fps is the average."""

    codec: str
    width: int
    height: int
    fps: Fraction
    num_frames: int  # declared by the container (0: it does not say) or, from `check`, decoded


def probe(path: Path) -> VideoInfo:
    """Read the headers and the first frame only. Raises VideoError when there is no readable video stream."""
    with _open(path) as (container, stream):
        info = _describe(path, stream)
        first = next(_strict_frames(path, container, stream, info))
        width, height = _displayed_size(first)
    return VideoInfo(info.codec, width, height, info.fps, info.num_frames)


def check(path: Path) -> VideoInfo:
    """Decode the whole video strictly, without converting it; `num_frames` is the number of decoded frames.

    Raises VideoError when anything is damaged, missing or changes its size midway.
    """
    with _open(path) as (container, stream):
        info = _describe(path, stream)
        count, width, height = 0, info.width, info.height
        for frame in _strict_frames(path, container, stream, info):
            if count == 0:
                width, height = _displayed_size(frame)
            count += 1
    return VideoInfo(info.codec, width, height, info.fps, count)


def decode(path: Path, first_frame: int = 0, num_frames: int | None = None, stride: int = 1) -> Iterator[np.ndarray]:
    """Iterate over every stride-th of the source frames first_frame ... first_frame + num_frames - 1.

    Yields uint8 RGB [H, W, 3], one at a time; memory does not grow with the length. Without `num_frames` all
    frames to the end, and then the count is compared with the declared one. Frames before `first_frame` are
    decoded and dropped, so that positions are exact in every file. Raises VideoError when the video is
    damaged or too short.
    """
    if first_frame < 0 or stride < 1 or (num_frames is not None and num_frames < 1):
        raise UserError(
            f"{path}: cannot take {num_frames} frames from {first_frame} with stride {stride}; "
            "the number and the stride must be at least 1, the first at least 0"
        )
    end = None if num_frames is None else first_frame + num_frames
    position = 0
    with _open(path) as (container, stream):
        for frame in _strict_frames(path, container, stream, _describe(path, stream)):
            if position >= first_frame and (position - first_frame) % stride == 0:
                yield _to_rgb(frame)
            position += 1
            if position == end:
                return
    if position <= first_frame or end is not None:
        wanted = first_frame if end is None else end - 1
        raise VideoError(path, f"has {position} frames, so there is no frame {wanted}")


def resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """Scale uint8 [H, W, 3] to a shorter side of `size` (antialiased bicubic); crop the centre square."""
    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    scale = size / min(height, width)
    new_width, new_height = max(size, round(width * scale)), max(size, round(height * scale))
    image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def write_mp4(path: Path, frames: np.ndarray, fps: float | Fraction, crf: int = 16) -> None:
    """Write uint8 [F, H, W, 3] as H.264 yuv420p, which every player shows. Atomic; equal frames, equal bytes.

    That pixel format needs even sides: an odd one is extended by repeating the last row or column. `crf` is
    x264's quality: smaller is better, 18 is about visually lossless.
    """
    height, width = _as_frames(frames).shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UserError(f"{path}: cannot be written with {fps} frames per second")
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    # x264 notes its number of threads in the file, so one that depends on the machine is not taken. Its macroblock
    # tree reads memory that it has not set where AVX-512 is used: equal frames would not give equal bytes.
    options = {"crf": str(crf), "threads": "4" if height * width > 512 * 512 else "1", "mbtree": "0"}
    # The format is explicit because the temporary name does not end in .mp4.
    with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = SMPTE170M
        for frame in frames:
            even = np.ascontiguousarray(np.pad(frame, padding, mode="edge"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))


def gif_bytes(frames: np.ndarray, fps: float | Fraction) -> bytes:
    """An endlessly looping GIF of uint8 [F, H, W, 3]; the format counts time in hundredths of a second."""
    images = [Image.fromarray(frame) for frame in _as_frames(frames)]
    buffer = io.BytesIO()
    duration = max(20, round(1000 / float(fps)))  # milliseconds; browsers slow down what is shorter
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
    return buffer.getvalue()


def contact_sheet(
    path: Path, videos: Sequence[np.ndarray], max_columns: int = 16, min_side: int = 96, gap: int = 2
) -> None:
    """Write a PNG with one row per video: uint8 [F, H, W, 3], all of one frame size.

    Longer videos are subsampled evenly to `max_columns` frames, the first and last included. Frames smaller
    than `min_side` pixels are enlarged by a whole factor, so that small ones can be seen.
    """
    rows = [_as_frames(video) for video in videos]
    if not rows or len({row.shape[1:] for row in rows}) != 1 or max_columns < 1:
        raise UserError(f"{path}: a contact sheet needs at least one column and video, all of one frame size")
    rows = [row[np.linspace(0, len(row) - 1, min(len(row), max_columns)).round().astype(int)] for row in rows]
    height, width = rows[0].shape[1:3]
    scale = max(1, -(-min_side // min(height, width)))
    height, width = height * scale, width * scale
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, 32, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = frame.repeat(scale, 0).repeat(scale, 1)
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _as_frames(frames: np.ndarray) -> np.ndarray:
    """Refuse what is not a video, before a library does so in words of its own."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not empty; found {frames.dtype} {frames.shape}")
    return frames


@contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
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
) -> Iterator[av.VideoFrame]:
    """All frames in display order; at the end the count (or, without one, the duration) is compared."""
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
                yield frame
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


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    turned = frame.rotation % 180 != 0
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    rgb = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as rot90
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if quarter_turns else rgb
