"""Videos: strict decoding to RGB frames, resizing, and writing mp4, GIF and contact sheets.

Decoding is strict because FFmpeg by default conceals damage: a broken file gives plausible, wrong frames and
no error. Here the decoder stops at the first picture that it finds damaged or had to conceal, and the frames are
counted against the header. H.264 has no checksums, so damage that happens to be valid syntax stays unseen.

A folder of pictures (PNG or JPEG, in the natural order of their names) is a video as well, for every function here
that takes the path of one.

    for frame in decode(Path("clip.mp4"), first_frame=10, num_frames=32, stride=2):  # uint8 [H, W, 3]
        small = resize_and_crop(frame, 256)
"""

from ardiff.video.files import EXTENSIONS
from ardiff.video.folders import PICTURES
from ardiff.video.frames import Frame, VideoError, VideoInfo, resize_and_crop
from ardiff.video.reading import FOLDER_FPS, check, decode, fingerprint, frames_at, probe
from ardiff.video.writing import Mp4Writer, contact_sheet, gif_bytes, write_mp4

__all__ = [
    "EXTENSIONS",
    "FOLDER_FPS",
    "PICTURES",
    "Frame",
    "Mp4Writer",
    "VideoError",
    "VideoInfo",
    "check",
    "contact_sheet",
    "decode",
    "fingerprint",
    "frames_at",
    "gif_bytes",
    "probe",
    "resize_and_crop",
    "write_mp4",
]
