"""Writing and strict decoding of videos, resizing, contact sheets and GIFs."""

import hashlib
import io
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from ardiff.errors import UserError
from ardiff.video import (
    VideoError,
    check,
    contact_sheet,
    decode,
    fingerprint,
    frames_at,
    gif_bytes,
    probe,
    resize_and_crop,
    write_mp4,
)


def moving_bar(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames that can be told apart: a bright bar moves over a gradient."""
    x = np.arange(width)
    frames = np.zeros((num_frames, height, width, 3))
    frames[..., 2] = np.linspace(30, 200, height)[:, None]
    for i in range(num_frames):
        frames[i, ..., 0] = 220 * np.exp(-(((x - 6 - 4 * i) / 6.0) ** 2))
    return frames.round().astype(np.uint8)


def write_matroska(path: Path, frames: np.ndarray, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_mp4(path, moving_bar(20, 64, 96), fps=8)
    return path


def test_a_written_video_reads_back(clip):
    info = check(clip)
    assert (info.codec, info.width, info.height, info.fps, info.num_frames) == ("h264", 96, 64, Fraction(8), 20)
    assert probe(clip) == info
    decoded = np.stack(list(decode(clip)))
    assert decoded.dtype == np.uint8 and decoded.shape == (20, 64, 96, 3)
    assert np.abs(decoded.astype(int) - moving_bar(20, 64, 96)).mean() < 4


def test_colours_survive(tmp_path):
    frames = np.empty((3, 64, 64, 3), np.uint8)
    frames[:] = (230, 40, 30)
    write_mp4(tmp_path / "red.mp4", frames, fps=8)
    for frame in decode(tmp_path / "red.mp4"):
        assert np.abs(frame.astype(int) - frames[0]).max() <= 4


def test_equal_frames_give_equal_bytes_and_no_leftovers(clip, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(10):
        garbage = [rng.integers(0, 256, rng.integers(1, 100_000), dtype=np.uint8) for _ in range(20)]
        del garbage  # what x264 finds in memory that it does not initialise
        write_mp4(tmp_path / "again.mp4", moving_bar(20, 64, 96), fps=8)
        assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.mp4"]


def test_odd_sizes_single_frames_and_broken_rates(tmp_path):
    frames = moving_bar(1, 33, 51)
    write_mp4(tmp_path / "odd.mp4", frames, fps=Fraction(30000, 1001))
    info = check(tmp_path / "odd.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (52, 34, 1, Fraction(30000, 1001))
    decoded = next(decode(tmp_path / "odd.mp4")).astype(int)
    assert np.abs(decoded[:33, :51] - frames[0]).mean() < 4
    assert np.abs(decoded[33] - decoded[32]).mean() < 6  # the added row repeats the last one


def test_wrong_arguments_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3)), fps=8)
    with pytest.raises(UserError, match="0 frames per second"):
        write_mp4(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3), np.uint8), fps=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "num", "stride"), [(0, 20, 1), (3, 9, 1), (5, 10, 3), (19, 1, 4), (0, 1, 1)])
def test_ranges_are_exact(clip, first, num, stride):
    whole = np.stack(list(decode(clip)))
    assert np.array_equal(np.stack(list(decode(clip, first, num, stride))), whole[first : first + num : stride])


def test_ranges_outside_the_video(clip):
    assert len(list(decode(clip, first_frame=18))) == 2
    with pytest.raises(VideoError, match="has 20 frames, so there is no frame 24"):
        list(decode(clip, first_frame=15, num_frames=10))
    with pytest.raises(VideoError, match="has 20 frames, so there is no frame 20"):
        list(decode(clip, first_frame=20))
    with pytest.raises(UserError, match="stride 0"):
        list(decode(clip, stride=0))


@pytest.mark.parametrize("positions", [[0], [19], [3, 4, 11], list(range(20)), [], np.array([2, 17])])
def test_frames_at_positions(clip, positions):
    whole = list(decode(clip))
    found = list(frames_at(clip, positions))
    assert [position for position, _ in found] == list(positions)
    for position, frame in found:
        assert np.array_equal(frame, whole[position])


def test_frames_at_reads_no_further_than_it_must(clip, tmp_path):
    """The last pictures are missing: that is found only when they are wanted."""
    data = clip.read_bytes()
    table = data.find(b"stsz") + 12
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: table + 4 * 12] + bytes(4 * 8) + data[table + 4 * 20 :])
    assert [position for position, _ in frames_at(cut, [1, 5])] == [1, 5]
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        list(frames_at(cut, [1, 19]))


def test_frames_at_impossible_positions(clip):
    with pytest.raises(VideoError, match="has 20 frames, so there is no frame 20"):
        list(frames_at(clip, [0, 20]))
    for positions in ([3, 2], [3, 3], [-1, 2]):
        with pytest.raises(ValueError, match="sorted, distinct"):
            list(frames_at(clip, positions))


def test_a_damaged_picture_stops_the_decoder(clip, tmp_path):
    data = bytearray(clip.read_bytes())
    media = data.find(b"mdat")
    middle = media + 4 + (len(data) - media) // 3
    data[middle : middle + 40] = bytes(byte ^ 0x55 for byte in data[middle : middle + 40])
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with pytest.raises(VideoError, match=r"damaged\.mp4: frame \d+ (cannot be decoded|is damaged)"):
        check(damaged)
    with pytest.raises(VideoError, match="frame"):
        list(decode(damaged))


def test_most_small_damage_is_found(clip, tmp_path):
    """One bit is flipped in the coded pictures, 40 times at other places; by itself FFmpeg reports nearly none."""
    data = clip.read_bytes()
    media = data.find(b"mdat")
    first = data.find(b"x264", media) + 700  # after the encoder's notes about itself
    end = media - 4 + int.from_bytes(data[media - 4 : media], "big")
    assert end - first > 1000
    found = 0
    for place in np.linspace(first, end - 1, 40).astype(int):
        damaged = bytearray(data)
        damaged[place] ^= 4
        (tmp_path / "damaged.mp4").write_bytes(damaged)
        try:
            check(tmp_path / "damaged.mp4")
        except VideoError:
            found += 1
    assert found >= 30


def test_truncated_files(clip, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:-200])  # loses the end of the table of contents
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        check(cut)
    whole = tmp_path / "whole.mkv"
    write_matroska(whole, moving_bar(40, 64, 96), fps=8)
    assert check(whole).num_frames == 40
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    with pytest.raises(VideoError, match=r"truncated: ends at|cannot be decoded"):
        check(cut)


def test_fewer_frames_than_declared(tmp_path):
    """The sizes of the last pictures in the table are set to zero: they are declared but not there."""
    frames = moving_bar(8, 64, 96)
    path = tmp_path / "short.mp4"
    write_mp4(path, frames, fps=8)
    data = bytearray(path.read_bytes())
    table = data.find(b"stsz") + 4
    count = struct.unpack(">I", data[table + 8 : table + 12])[0]
    assert count == 8
    data[table + 12 + 4 * 6 : table + 12 + 4 * 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"\d of 8 declared frames|cannot be decoded"):
        check(path)


def test_frames_cut_away_by_an_edit_list_are_not_missed(tmp_path):
    path = tmp_path / "edited.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in moving_bar(12, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        ticks = int(Fraction(4, 8) / stream.time_base)
    whole = list(decode(path))
    data = bytearray(path.read_bytes())
    entry = data.find(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[entry : entry + 8])
    data[entry : entry + 8] = struct.pack(">Ii", duration * 8 // 12, start + ticks)
    path.write_bytes(data)
    assert check(path).num_frames == 8
    assert np.array_equal(next(decode(path)), whole[4])


def test_a_phones_rotation_is_applied(clip, tmp_path):
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    assert (probe(turned).width, probe(turned).height) == (check(turned).width, check(turned).height) == (64, 96)
    assert np.array_equal(next(decode(turned)), np.rot90(next(decode(clip)), -1))


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/x.ts\n")
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "playlist.mp4", "empty.mp4", "missing.mp4", "."):
        with pytest.raises(VideoError, match="cannot be opened as a video") as caught:
            check(tmp_path / name)
        assert caught.value.path == tmp_path / name and "\n" not in caught.value.reason


def test_names_that_look_like_addresses(tmp_path):
    for name in ("a:b.mp4", "per%03d.mp4", "ha#sh?.mp4"):
        write_mp4(tmp_path / name, moving_bar(2, 32, 32), fps=8)
        assert check(tmp_path / name).num_frames == 2


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48), (20, 31)])
def test_resize_and_crop(shape):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    result = resize_and_crop(frame, 24)
    assert result.shape == (24, 24, 3) and result.dtype == np.uint8
    height, width = shape
    scale = 24 / min(shape)
    scaled = Image.fromarray(frame).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 24) // 2, (scaled.height - 24) // 2
    assert np.array_equal(result, np.asarray(scaled)[top : top + 24, left : left + 24])
    assert resize_and_crop(result, 24) is result


def test_resizing_is_antialiased():
    checkerboard = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    small = resize_and_crop(np.repeat(checkerboard[..., None], 3, axis=2), 16)
    assert np.abs(small.astype(int) - 127).max() < 8


def test_contact_sheet(tmp_path):
    red, green = np.zeros((2, 5, 16, 16, 3), np.uint8)
    red[..., 0] = np.arange(5)[:, None, None] * 50
    green[..., 1] = 200
    contact_sheet(tmp_path / "sheet.png", [red, green[:2]], max_columns=3, min_side=32, gap=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 36 + 4, 3 * 36 + 4, 3)
    for column, value in enumerate((0, 100, 200)):  # the first, the middle and the last frame
        assert (sheet[4:36, 4 + 36 * column : 36 + 36 * column] == (value, 0, 0)).all()
    assert (sheet[40:72, 4:36] == (0, 200, 0)).all()
    assert (sheet[40:72, 76:108] == 32).all()  # the second video has no third frame
    with pytest.raises(UserError, match="one frame size"):
        contact_sheet(tmp_path / "x.png", [red, np.zeros((1, 8, 8, 3), np.uint8)])


def test_gif(tmp_path):
    data = gif_bytes(moving_bar(6, 32, 48), fps=8)
    image = Image.open(io.BytesIO(data))
    assert (image.n_frames, image.size, image.info["loop"], image.info["duration"]) == (6, (48, 32), 0, 120)
    (tmp_path / "x.gif").write_bytes(data)
    assert check(tmp_path / "x.gif").num_frames == 6


FRAMES = moving_bar(12, 48, 64)


def write_pictures(folder: Path, frames: np.ndarray, name: str = "frame_{}.png") -> Path:
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(number), quality=95)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Frames 0 to 11: sorted as text, frame_10 would come before frame_2."""
    folder = write_pictures(tmp_path / "pictures", FRAMES)
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_text("not a picture")
    return folder


def test_a_folder_of_pictures_is_a_video(pictures):
    info = check(pictures)
    assert (info.codec, info.width, info.height, info.fps, info.num_frames) == ("png", 64, 48, 25, 12)
    assert probe(pictures, fps=Fraction(30000, 1001)).fps == Fraction(30000, 1001)
    assert probe(pictures, fps=12.5).fps == Fraction(25, 2)
    assert np.array_equal(np.stack(list(decode(pictures))), FRAMES)
    assert np.array_equal(np.stack(list(decode(pictures, 3, 7, 3))), FRAMES[3:10:3])
    assert [position for position, _ in frames_at(pictures, [2, 10])] == [2, 10]
    assert np.array_equal(dict(frames_at(pictures, [2, 10]))[10], FRAMES[10])
    with pytest.raises(VideoError, match="has 12 frames, so there is no frame 12"):
        list(frames_at(pictures, [12]))


def test_visited_frames_and_their_thumbnails(pictures, clip):
    for path, size in ((pictures, (48, 64)), (clip, (64, 96))):
        seen = []
        info = check(path, visit=lambda frame, seen=seen: seen.append((frame.size(), frame.rgb(), frame.thumbnail(32))))
        assert len(seen) == info.num_frames
        for i, (frame, whole) in enumerate(zip(seen, decode(path), strict=True)):
            assert frame[0] == size[::-1] and np.array_equal(frame[1], whole), i
            small = frame[2]
            assert max(small.shape[:2]) == 32 and small.shape[0] == round(32 * size[0] / size[1])
            box = Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX)
            assert np.abs(np.asarray(box).astype(int) - small).mean() < 4
    thumbnails = []
    check(pictures, visit=lambda frame: thumbnails.append(frame.thumbnail(1000)))
    assert thumbnails[0].shape == (48, 64, 3)  # never enlarged


def test_jpeg_pictures_grey_ones_and_a_phones_rotation(tmp_path):
    folder = write_pictures(tmp_path / "jpeg", FRAMES, "{}.JPG")
    assert check(folder).codec == "jpeg"
    assert np.abs(np.stack(list(decode(folder))).astype(int) - FRAMES).mean() < 3
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray((np.arange(48 * 64).reshape(48, 64) * 20).astype(np.uint16)).save(grey / "1.png")
    expected = ((np.arange(48 * 64) * 20) >> 8).reshape(48, 64)
    assert np.array_equal(next(decode(grey)), np.repeat(expected[..., None], 3, axis=2))
    turned = tmp_path / "turned"
    turned.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(FRAMES[0]).save(turned / "1.png", exif=exif)
    assert (check(turned).width, check(turned).height) == (48, 64)
    assert np.array_equal(next(decode(turned)), np.rot90(FRAMES[0], -1))


@pytest.mark.parametrize("name", ["frame_{}.png", "frame_{}.jpg"])
def test_broken_pictures_are_named(tmp_path, name):
    folder = write_pictures(tmp_path / "pictures", FRAMES, name)
    broken = folder / name.format(10)
    data = broken.read_bytes()
    for damaged in (data[: len(data) // 2], data[:100], b"", b"no picture at all"):
        broken.write_bytes(damaged)
        with pytest.raises(VideoError, match=rf"pictures: picture {broken.name} cannot be read") as caught:
            check(folder)
        assert "\n" not in caught.value.reason
        with pytest.raises(VideoError, match=broken.name):
            list(decode(folder))
        assert len(list(frames_at(folder, [0, 9, 11]))) == 3  # pictures that are not wanted are not read
    Image.fromarray(FRAMES[0][:40]).save(broken)
    with pytest.raises(VideoError, match=f"picture {broken.name} changes the size from 64x48 to 64x40"):
        check(folder)


def test_postscript_that_is_called_a_picture_starts_no_program(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript."""
    (tmp_path / "0001.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **more: started.append(arguments))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")  # as if it were installed
    for use in (check, probe, lambda path: list(decode(path))):
        with pytest.raises(VideoError, match=r"picture 0001.png cannot be read \(cannot identify image file"):
            use(tmp_path)
    assert not started


def test_folders_that_are_no_videos(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    for use in (check, probe, lambda path: list(decode(path))):
        with pytest.raises(VideoError, match="a folder without PNG or JPEG pictures"):
            use(tmp_path)
    with pytest.raises(OSError, match="without pictures"):
        fingerprint(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        fingerprint(tmp_path / "missing")


def test_fingerprints(pictures, clip):
    assert fingerprint(clip) == hashlib.sha256(clip.read_bytes()).hexdigest()
    first = fingerprint(pictures)
    assert len(first) == 64 and fingerprint(pictures) == first
    (pictures / "notes.txt").write_text("something else")
    assert fingerprint(pictures) == first  # it is not part of the video
    (pictures / "frame_3.png").rename(pictures / "frame_03.png")
    renamed = fingerprint(pictures)
    (pictures / "frame_03.png").write_bytes((pictures / "frame_4.png").read_bytes())
    assert len({first, renamed, fingerprint(pictures)}) == 3
