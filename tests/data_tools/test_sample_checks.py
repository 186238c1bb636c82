"""What a sample, a picture, a description and a manifest must be, whatever their checksums say."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from mutations.sets import describe, members_of, sealed
from mutations.target import npy
from PIL import Image

from ardiff.data.shards import read_manifest
from data_tools.inspection.manifest_checks import frames_per_second, manifest_faults
from data_tools.inspection.sample_checks import decode_picture, parse_description
from data_tools.inspection.verification import verify


def lines(source) -> list[str]:
    return [str(problem) for problem in verify(str(source)).problems]


def with_member(members, name, data):
    return [(known, data if known == name else content) for known, content in members]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("000000.json", b"{", "000000.json is not JSON"),
        ("000000.json", b'{"fps": NaN}', "NaN is not a number of JSON"),
        ("000000.json", b'{"fps": 1e999}', "1e999 is not a number of JSON"),
        ("000000.json", b'{"a":' * 40 + b"1" + b"}" * 40, "is not the description of a sample"),
        ("000000.json", b"[]", "is not the description of a sample"),
        ("000000.json", json.dumps(describe(1, 1)).encode(), "it describes another sample"),
        ("000000.json", json.dumps({**describe(0, 3), "class": 3}).encode(), "its class is not one of the 3"),
        ("000000.json", json.dumps({**describe(0, 3), "class": True}).encode(), "is not the description|not one of"),
        ("000000.json", json.dumps({**describe(0, 3), "label": "wave"}).encode(), "label and its class do not belong"),
        (
            "000000.json",
            json.dumps({**describe(0, 3), "num_frames": 4}).encode(),
            "another number of frames than",
        ),
        ("000000.json", json.dumps({**describe(0, 3), "arvae": "x"}).encode(), "of another AR-VAE"),
        ("000000.json", json.dumps({**describe(0, 3), "sha256": "0"}).encode(), "64 hexadecimal digits"),
        ("000000.json", json.dumps({**describe(0, 3), "fps": "1e999999999"}).encode(), "not a frame rate"),
        ("000000.json", json.dumps({**describe(0, 3), "width": 0}).encode(), "its width is not"),
        ("000000.json", json.dumps({**describe(0, 3), "caption": 1}).encode(), "its caption is not text"),
        ("000000.latents.npy", npy(np.full((3, 2, 4), np.nan, np.float16)), "numbers that are not finite"),
        ("000000.latents.npy", npy(np.ones((3, 2, 5), np.float16)), r"of \(2, 5\) numbers instead of \(2, 4\)"),
        ("000000.latents.npy", npy(np.ones((3, 2, 4), np.float32)), "must be a float16 .npy array"),
        (
            "000000.latents.npy",
            npy(np.ones((3, 2, 4), np.float16)).replace(b"v\0{", b"\x80\0{"),
            "must be a float16 .npy",
        ),
        ("000000.flipped.npy", npy(np.ones((2, 2, 4), np.float16)), r"has shape \(2, 2, 4\), the latents \(3, 2, 4\)"),
        ("000000.text.npy", npy(np.ones((2, 4), np.float16)), "of 4 numbers instead of 3"),
        ("000000.text.npy", npy(np.ones((5, 3), np.float16)), "text_tokens is 2, the longest text has 5"),
    ],
)
def test_what_is_wrong_in_itself_is_named_although_all_checksums_fit(latents, name, data, reason):
    tar = latents / "latents-000000.tar"
    sealed(tar, with_member(members_of(tar), name, data))
    found = lines(latents)
    assert any(re.search(reason, line) for line in found), found


def test_missing_and_superfluous_members(latents):
    tar = latents / "latents-000000.tar"
    whole = members_of(tar)
    for missing, reason in (("json", "there is no 000000.json"), ("flipped.npy", "there is no flipped.npy")):
        sealed(tar, [member for member in whole if member[0] != f"000000.{missing}"])
        assert any(reason in line for line in lines(latents)), lines(latents)
    sealed(tar, [*whole[:4], ("000000.00000.jpg", b"x"), *whole[4:]])
    assert any("pictures have no business" in line for line in lines(latents))
    sealed(tar, [*whole[:4], ("000000.txt", b"x"), *whole[4:]])  # of another program
    assert lines(latents) == []


def encoded(size: int, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 90)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(17), "has 17 x 17 pixels instead of 16 x 16"),
        (encoded(16)[:-40], "cannot be decoded (OSError: "),
        (encoded(16, "GIF"), "is no JPEG, PNG or WebP picture"),
        (encoded(16, "PNG")[:60], "cannot be decoded"),
        (encoded(17, "WEBP"), "has 17 x 17 pixels"),
        (encoded(17, "WEBP", lossless=True), "has 17 x 17 pixels"),
        (b"", "is no JPEG, PNG or WebP picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "is no JPEG, PNG or WebP picture"),
    ],
)
def test_pictures_that_cannot_be_used(frames, data, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        decode_picture(data, 16)
    tar = frames / "frames-000000.tar"
    sealed(tar, with_member(members_of(tar), "000000.00001.jpg", data))
    found = {problem.key: problem.reason for problem in verify(str(frames)).problems}
    assert reason in found["000000"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_that_can_be_used(form):
    assert decode_picture(encoded(16, form), 16).shape == (16, 16, 3)


def test_pictures_are_numbered_without_gaps(frames):
    tar = frames / "frames-000000.tar"
    whole = members_of(tar)
    sealed(tar, [member for member in whole if member[0] != "000000.00001.jpg"])
    found = lines(frames)
    assert any("instead of picture 00001 there is another" in line for line in found)


def test_a_bomb_is_not_opened(frames):
    # 16,383 x 16,383 pixels would be gigabytes
    header = b"VP8X\n\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0"
    with pytest.raises(ValueError, match="has 16383 x 16383 pixels"):
        decode_picture(b"RIFF" + len(header).to_bytes(4, "little") + b"WEBP" + header, 16)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "videos"}, "neither latents nor frames"),
        ({"classes": ["a", "a"]}, "same name"),
        ({"classes": [[]]}, "not a list of names"),
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": True}, "tokens must be"),
        ({"tokens": 10**6, "channels": 10**6}, "absurd"),
        ({"mean": [0.0] * 3}, "mean must be 4 numbers"),
        ({"mean": [0.0, 0.0, 0.0, 10**400]}, "mean must be 4 numbers"),
        ({"std": [1.0, 1.0, 1.0, -1.0]}, "std must be"),
        ({"arvae": "x"}, "arvae must give"),
        ({"text_dim": -1}, "text_dim must be"),
        ({"text_tokens": "2"}, "text_tokens must be"),
        ({"note": json.loads("[" * 50 + "]" * 50)}, "nested too deeply"),
        ({"shards": []}, "lists no shards"),
    ],
)
def test_manifests_are_checked_before_they_are_relied_on(latents, change, fault):
    manifest = read_manifest(latents)
    assert manifest_faults(manifest) == []
    for name, value in change.items():
        if name in ("kind", "classes", "shards"):
            setattr(manifest, name, value)
        else:
            manifest.details[name] = value
    assert any(fault in line for line in manifest_faults(manifest)), manifest_faults(manifest)


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", "a/b.tar", "x", "", None, ".x.tar", "a\n.tar", ["x.tar"]])
def test_a_manifest_leads_nowhere_else(latents, file):
    manifest = read_manifest(latents)
    manifest.shards[1] = replace(manifest.shards[1], file=file)
    assert any("file name" in line for line in manifest_faults(manifest))


def test_frame_rates():
    assert frames_per_second("30000/1001") == pytest.approx(29.97, abs=0.001)
    assert frames_per_second(25) == 25.0
    for value in (None, "x", "1/0", "0/1", "1e999999999/1", "9" * 20 + "/1", 0, -1, float("nan"), [25], True):
        assert frames_per_second(value) is None


def test_descriptions_are_strict():
    assert parse_description(b'{"a": [1, {"b": 2.5}]}') == {"a": [1, {"b": 2.5}]}
    for data in (b"", b"[1]", b'{"a": Infinity}', b'{"a": -1e400}', b"[" * 100_000, b"\xff", b" " * (1 << 25)):
        with pytest.raises(ValueError, match=r"JSON|description|bytes"):
            parse_description(data)
