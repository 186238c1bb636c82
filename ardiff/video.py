"""Videos: strict decoding to RGB frames, resizing, and writing mp4, GIF and contact sheets.

Decoding is strict because FFmpeg by default conceals damage: a broken file gives plausible, wrong frames and
no error. Here the decoder stops at the first picture that it finds damaged or had to conceal, and the frames are
counted against the header. H.264 has no checksums, so damage that happens to be valid syntax stays unseen.

A folder of pictures (PNG or JPEG, in the natural order of their names) is a video as well, for every function here
that takes the path of one.

    for frame in decode(Path("clip.mp4"), first_frame=10, num_frames=32, stride=2):  # uint8 [H, W, 3]
        small = resize_and_crop(frame, 256)
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from ardiff.errors import UserError
from ardiff.files import replacing, sha256

EXTENSIONS = frozenset((".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"))
PICTURES = frozenset((".png", ".jpg", ".jpeg"))
PICTURE_FORMATS = ("PNG", "JPEG")  # Pillow opens no others: for some it would start other programs
FOLDER_FPS = 25  # of a folder of pictures, which does not say
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


class Frame(Protocol):
    """One frame as the decoder gives it, converted only when asked."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as displayed."""

    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""

    def thumbnail(self, side: int) -> np.ndarray:
        """uint8 RGB [H, W, 3], scaled down so that neither side is longer than `side`."""


def probe(path: Path, fps: Fraction | float = FOLDER_FPS) -> VideoInfo:
    """Read the headers and the first frame only. Raises VideoError when there is no readable video stream.

    `fps` is the frame rate of a folder of pictures; files say it themselves.
    """
    with _open(path, fps) as (info, frames):
        width, height = next(frames).size()
    return VideoInfo(info.codec, width, height, info.fps, info.num_frames)


def check(path: Path, fps: Fraction | float = FOLDER_FPS, visit: Callable[[Frame], object] | None = None) -> VideoInfo:
    """Decode the whole video strictly, without converting it; `num_frames` is the number of decoded frames.

    `visit` is called with every frame in order. Raises VideoError when anything is damaged, missing or changes its
    size midway; `fps` as in `probe`.
    """
    with _open(path, fps) as (info, frames):
        count, first_size = 0, (info.width, info.height)
        for frame in frames:
            size = frame.size()
            first_size = first_size if count else size
            if visit is not None:
                visit(frame)
            count += 1
    return VideoInfo(info.codec, *first_size, info.fps, count)


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
    wanted = itertools.count(first_frame, stride) if end is None else range(first_frame, end, stride)
    for _, frame in _take(path, wanted, end):
        yield frame


def frames_at(path: Path, positions: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Iterate over (position, uint8 RGB [H, W, 3]) of the source frames at `positions`: sorted, distinct, from 0.

    One strict pass over the video serves them all and stops after the last one. Raises VideoError as `decode` does.
    """
    if any(first >= second for first, second in itertools.pairwise(positions)) or any(at < 0 for at in positions[:1]):
        raise ValueError("positions of frames must be sorted, distinct and at least 0")
    if len(positions):
        yield from _take(path, positions, positions[-1] + 1)


def fingerprint(path: Path) -> str:
    """Hex sha256 that changes with the content: of a file's bytes, or of the names and bytes of a folder's pictures.

    Raises OSError when something cannot be read or a folder holds no pictures.
    """
    if not path.is_dir():
        return sha256(path)
    pictures = _pictures(path)
    if not pictures:
        raise FileNotFoundError(errno.ENOENT, "a folder without pictures", str(path))
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.name.encode("utf-8", "surrogateescape") + b"\0" + bytes.fromhex(sha256(picture)))
    return digest.hexdigest()


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


def _take(path: Path, wanted: Iterable[int], end: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames at the ascending positions `wanted`; stops after frame end - 1, which must exist."""
    ahead = iter(wanted)
    first = following = next(ahead)
    position = 0
    with _open(path) as (_, frames):
        for frame in frames:
            if position == following:
                yield position, frame.rgb()
                following = next(ahead, -1)
            position += 1
            if position == end:
                return
    if position <= first or end is not None:
        missing = first if end is None else end - 1
        raise VideoError(path, f"has {position} frames, so there is no frame {missing}")


@contextmanager
def _open(path: Path, fps: Fraction | float = FOLDER_FPS) -> Iterator[tuple[VideoInfo, Iterator[Frame]]]:
    """What a file or a folder of pictures declares, and its frames in display order; `fps` is that of a folder."""
    if path.is_dir():
        yield _open_folder(path, Fraction(fps).limit_denominator(1001))
        return
    with _open_file(path) as (container, stream):
        info = _describe(path, stream)
        yield info, _strict_frames(path, container, stream, info)


@contextmanager
def _open_file(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
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
        width, height = _shrunk((self.frame.width, self.frame.height), side)
        # AREA averages over all pixels that are merged; swscale's default skips most of them.
        return self._upright(self.converter.reformat(self.frame, width, height, "rgb24", interpolation="AREA"))

    def _upright(self, converted: av.VideoFrame) -> np.ndarray:
        rgb = converted.to_ndarray()
        quarter_turns = round(self.frame.rotation / 90) % 4  # counter-clockwise, as rot90
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if quarter_turns else rgb


def _shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, frame_2 before frame_10."""

    def natural(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", path.name)  # text and digits in turns, so that like meets like
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    found = (path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith("."))
    return sorted(found, key=natural)


def _open_folder(path: Path, fps: Fraction) -> tuple[VideoInfo, Iterator[Frame]]:
    """What a folder of pictures is, and its frames. Raises VideoError when its first picture cannot be read."""
    if fps <= 0:
        raise UserError(f"{path}: cannot be shown with {fps} frames per second")
    try:
        pictures = _pictures(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error})") from error
    if not pictures:
        raise VideoError(path, "cannot be opened as a video (a folder without PNG or JPEG pictures)")
    first = _Picture(path, pictures[0])
    size = first.size()
    info = VideoInfo(first.codec, *size, fps, len(pictures))
    return info, (_Picture(path, picture, size) for picture in pictures)


class _Picture:
    """A picture in a folder as a frame of a video; read and checked when something is first asked of it."""

    def __init__(self, folder: Path, file: Path, expected: tuple[int, int] | None = None) -> None:
        self.folder, self.file, self.expected = folder, file, expected
        self.codec = ""

    def size(self) -> tuple[int, int]:
        width, height = self._image.size
        return width, height

    def rgb(self) -> np.ndarray:
        return np.array(self._image)

    def thumbnail(self, side: int) -> np.ndarray:
        return np.array(self._image.resize(_shrunk(self.size(), side), Image.Resampling.BOX))

    @cached_property
    def _image(self) -> Image.Image:
        try:
            with Image.open(self.file, formats=PICTURE_FORMATS) as opened:
                self.codec = (opened.format or "").lower()
                image: Image.Image = ImageOps.exif_transpose(opened)  # a phone's rotation
                if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # Pillow raises nearly anything when a picture is damaged
            raise VideoError(self.folder, f"picture {self.file.name} cannot be read ({error})") from error
        if self.expected not in (None, image.size):
            was, found = ("x".join(map(str, size)) for size in (self.expected or (), image.size))
            raise VideoError(self.folder, f"picture {self.file.name} changes the size from {was} to {found}")
        return image
