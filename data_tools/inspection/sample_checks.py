"""Whether one sample of a shard is what its manifest says: description, latents, mirrored latents, text, pictures.

Everything here works on bytes that may have been damaged or made to do harm. No pickle is loaded, no parser but
json's and the decoders of JPEG, PNG and WebP see them, and a picture's size is compared before it is decoded.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from ardiff.data.shards import FLIPPED_MEMBER, FRAME_MEMBER, LATENTS_MEMBER, MEMBERS, TEXT_MEMBER, Moments, parse_array
from data_tools.inspection.manifest_checks import DIGEST, frames_per_second, too_deep
from data_tools.inspection.shard_folders import Rules

JSON_MEMBER = "json"
MAX_JSON = 1 << 24
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
CHUNK = 1 << 22  # numbers taken at a time, so that memory does not grow with a video
ARRAY_AXES = {LATENTS_MEMBER: 3, FLIPPED_MEMBER: 3, TEXT_MEMBER: 2}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample and in which of its members (by extension; "" if in none)."""

    member: str
    reason: str


@dataclass
class Checked:
    """A sample that was looked at. With faults the rest holds only what could be made out."""

    faults: list[Fault] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # float16, views of the members' bytes
    starts: dict[str, int] = field(default_factory=dict)  # where the numbers of each array begin in its member
    pictures: list[str] = field(default_factory=list)  # extensions in order
    frames: int = 0


def check_sample(key: str, members: Mapping[str, bytes], rules: Rules, decode: bool = True) -> Checked:
    """Look at all of a sample; `members` are its files by extension, in the order of the tar.

    Without `decode`, pictures are not opened.
    """
    result = Checked()
    result.pictures = [extension for extension in members if FRAME_MEMBER.fullmatch(extension)]
    if rules.kind == "latents":
        _check_arrays(members, rules, result)
    else:
        _check_pictures(members, rules, result, decode)
    if JSON_MEMBER in members:
        try:
            result.info = parse_description(members[JSON_MEMBER])
        except ValueError as error:
            result.faults.append(Fault(JSON_MEMBER, f"{key}.json {error}"))
        else:
            faults = _description_faults(key, result.info, result.frames, rules)
            result.faults += [Fault(JSON_MEMBER, f"{key}.json: {fault}") for fault in faults]
    else:
        result.faults.append(Fault("", f"there is no {key}.json"))
    return result


def parse_description(data: bytes) -> dict[str, Any]:
    """KEY.json as an object. Raises ValueError, in words that go on after the name of the file."""
    if len(data) > MAX_JSON:
        raise ValueError(f"has {len(data)} bytes, more than {MAX_JSON}")
    try:
        value = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(value, dict) or too_deep(value):
        raise ValueError("is not the description of a sample")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _description_faults(key: str, info: dict[str, Any], frames: int, rules: Rules) -> Iterator[str]:
    """Only what is there is looked at: other programs may describe less."""
    label, name = info.get("class"), info.get("label")
    if label is not None and not (type(label) is int and 0 <= label < len(rules.classes)):
        yield f"its class is not one of the {len(rules.classes)} that the manifest lists"
    elif name is not None and (label is None or rules.classes[label] != name):
        yield "its label and its class do not belong together"
    if info.get("id", key) != key:
        yield "it describes another sample"
    if frames and "num_frames" in info and info["num_frames"] != frames:
        yield f"it speaks of another number of frames than the {frames} that are there"
    digest = info.get("sha256")
    if digest is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        yield "its sha256 is not 64 hexadecimal digits"
    if info.get("fps") is not None and frames_per_second(info["fps"]) is None:
        yield "its fps is not a frame rate"
    for side in ("width", "height", "stride"):
        value = info.get(side, 1)
        if type(value) is not int or value < 1:
            yield f"its {side} is not a whole number above 0"
    if not isinstance(info.get("caption", ""), (str, type(None))):
        yield "its caption is not text"
    if rules.arvae is not None and info.get("arvae", rules.arvae) != rules.arvae:
        yield "its latents are of another AR-VAE than the manifest's"


def _check_arrays(members: Mapping[str, bytes], rules: Rules, result: Checked) -> None:
    for name in MEMBERS:
        if name not in members:
            continue
        try:
            start, shape = parse_array(members[name], ARRAY_AXES[name])
        except ValueError as error:
            result.faults.append(Fault(name, f"{name} {error}"))
            continue
        array = np.frombuffer(members[name], dtype="<f2", offset=start).reshape(shape)
        result.arrays[name], result.starts[name] = array, start
        expected = rules.text_dim if name == TEXT_MEMBER else (rules.tokens, rules.channels)
        found = shape[1] if name == TEXT_MEMBER else shape[1:]
        if expected is not None and found != expected:
            result.faults.append(Fault(name, f"{name} has frames or tokens of {found} numbers instead of {expected}"))
        elif not all(np.isfinite(part).all() for part in chunks(array)):
            result.faults.append(Fault(name, f"{name} holds numbers that are not finite"))
    latents, flipped = result.arrays.get(LATENTS_MEMBER), result.arrays.get(FLIPPED_MEMBER)
    needed = {LATENTS_MEMBER: True, FLIPPED_MEMBER: rules.flipped, TEXT_MEMBER: rules.text_dim is not None}
    for name in (name for name, is_needed in needed.items() if is_needed and name not in members):
        result.faults.append(Fault("", f"there is no {name}"))
    if latents is not None and flipped is not None and latents.shape != flipped.shape:
        result.faults.append(
            Fault(FLIPPED_MEMBER, f"{FLIPPED_MEMBER} has shape {flipped.shape}, the latents {latents.shape}")
        )
    if result.pictures:
        result.faults.append(Fault(result.pictures[0], "pictures have no business in a data set of latents"))
    result.frames = 0 if latents is None else len(latents)


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Slices along the first axis of about CHUNK numbers."""
    step = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def add_latents(moments: Moments, latents: np.ndarray) -> None:
    """Add [N, L, C] to the sums without a float64 copy of all of it."""
    for part in chunks(latents):
        moments.add(part)


def _check_pictures(members: Mapping[str, bytes], rules: Rules, result: Checked, decode: bool) -> None:
    arrays = [name for name in members if name in MEMBERS]
    if arrays:
        result.faults.append(Fault(arrays[0], f"{arrays[0]} has no business in a data set of pictures"))
    if not result.pictures:
        result.faults.append(Fault("", "there are no pictures"))
    numbers = [int(name[:5]) for name in result.pictures]
    if numbers != list(range(len(numbers))):
        wrong = next(number for number, found in enumerate([*numbers, -1]) if found != number)
        result.faults.append(Fault(result.pictures[wrong], f"instead of picture {wrong:05d} there is another"))
    result.frames = len(result.pictures)
    if not decode:
        return
    for name in result.pictures:
        try:
            decode_picture(members[name], rules.size)
        except ValueError as error:
            result.faults.append(Fault(name, f"{name} {error}"))


def decode_picture(data: bytes, size: int) -> np.ndarray:
    """A picture as uint8 RGB [size, size, 3].

    Raises ValueError, in words that go on after the name of the file, when it is of another size or does not decode.
    """
    found = _webp_size(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if found in (None, (size, size)):
                image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
                found = image.size
            if found == (size, size):
                return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("is no JPEG, PNG or WebP picture") from error
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error
    raise ValueError(f"has {found[0]} x {found[1]} pixels instead of {size} x {size}")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """What a WebP file declares, or None: some versions of Pillow make room for all of it when they open the file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF
