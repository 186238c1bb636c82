"""What somebody may put into a shard to harm its reader: odd tar headers, pickles, absurd arrays, bombs."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import zlib

import numpy as np

from mutations.target import Files, Target, Trap, header, make_tar, npy, npy_header, padded


def path_trick(target: Target) -> tuple[str, Files]:
    name = target.pick(
        b"../000000.json", b"/etc/000000.json", b"a/../../0.json", b"./0.json", b"0.json/../1.json", b"..", b"",
        b"\xff\xfe.json", b"0.json\0hidden", b"C:\\0.json", b"~/0.json", b"0" * 100, b".json", b"0..json", b"0.js on",
        b"0.json\n", b"\xef\xbc\x90.json", b"-rf.json", b"$(touch x).json",
    )  # fmt: skip
    prefix = target.pick(b"", b"", b"..", b"/tmp", b"\0x")
    block = header(name, b"%011o\0" % 2, prefix=prefix) + padded(b"{}")
    return target.raw(target.place(len(target.members) + 1), block, f"a member called {name!r}, prefix {prefix!r}")


def special_member(target: Target) -> tuple[str, Files]:
    kind = target.pick(*(bytes([c]) for c in b"123456789xgLKSVMNADI\xff"))
    link = target.pick(b"/etc/passwd", b"../../x", b"000000.json", b"")
    size = target.pick(b"%011o\0" % 0, b"%011o\0" % 3, b"77777777777\0")
    block = header(b"000000.extra", size, kind, link) + padded(b"abc")
    return target.raw(target.place(len(target.members) + 1), block, f"a member of type {kind!r} to {link!r}")


def extended_header(target: Target) -> tuple[str, Files]:
    text = target.pick("path=/etc/passwd", "size=99999999999999", "path=../../x", "linkpath=/", "GNU.sparse.size=1e99")
    record = f"{len(text) + 4} {text}\n".encode() * target.pick(1, 1000)
    size = target.pick(b"%011o\0" % len(record), b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8)
    block = header(b"0.pax", size, target.pick(b"x", b"g", b"L", b"K"), b"") + padded(record)
    return target.raw(target.place(len(target.members) + 1), block, f"an extended header: {text}")


def odd_size(target: Target) -> tuple[str, Files]:
    size = target.pick(
        b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x02", b"-0000000512\0", b"77777777777\0",
        b"7777777777777", b"            ", b"\0" * 12, b"0x000000200\0", b"00000000002 ", b"99999999999\0", b"1e10\0",
        b"%011o\0" % (1 << 30), b"%011o\0" % (1 << 33), b"%011o\0" % 0,
    )  # fmt: skip
    number = target.place(len(target.members))
    name, data = target.members[number]
    tail = make_tar(target.members[number + 1 :])
    blob = make_tar(target.members[:number], end=False) + header(name.encode(), size) + padded(data) + tail
    return f"size {size!r} of {name}", {f"{target.name}.tar": blob}


def pickled(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    data = pickle.dumps(Trap(target.trap), protocol=target.pick(0, 2, 4, 5))
    return target.replaced(number, data, "a pickle")


def object_array(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    array = target.pick(
        np.array([Trap(target.trap)], dtype=object), np.array([[[Trap(target.trap)]]], dtype=object),
        np.array([(1, Trap(target.trap))], dtype=[("a", "f2"), ("b", "O")]),
    )  # fmt: skip
    return target.replaced(number, npy(array, allow_pickle=True), "an array of objects")


def absurd_array(target: Target) -> tuple[str, Files]:
    number = target.payload()
    data = target.members[number][1]
    numbers = data[128:] if data[:6] == b"\x93NUMPY" else data
    shape, dtype, fortran = "(2, 2, 4)", "'<f2'", "False"
    which = target.place(3)
    if which == 0:
        shape = target.pick(
            "(1000000000000, 2, 4)", "(-1, 2, 4)", "(99999999999999999999999, 2, 4)", "()", "(2, 2)", "(2, 2, 4, 1)",
            "(2, 2, 4" + ", 1" * 60 + ")", "(0, 2, 4)", "(" * 3000, "(2, 2, 4" + "," * 50_000, "(1e3, 2, 4)",
            "__import__('os').system('touch trap')", "(True, 2, 4)", "[2, 2, 4]", "(2, 2, 4, )", "(0x2, 2, 4)",
            "(999999999, 999999999, 999999999)", "(2, 2, 4)" + " " * 60_000, "(2L, 2, 4)", "(02, 2, 4)",
        )  # fmt: skip
    elif which == 1:
        dtype = target.pick(
            "'<f4'", "'>f2'", "'|O'", "'<U1000000000'", "'|V999999999999'", "[('a', '<f2')]", "'<M8[ns]'", "'?'",
            "''", "'e'", "'<f2,<f2'", "('<f2', (2,))", "'f2' * 10000", "'<f2\\0'",
        )  # fmt: skip
    else:
        fortran = target.pick("True", "0", "None", "'False'", "False, 'x': 1", "False, 'shape': (1,)")
    text = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    if len(text) > 65_000:
        text = text[:65_000]
    version = target.pick(b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00")
    return target.replaced(number, npy_header(text, version) + numbers, f"an array of {text[:80]}")


def odd_description(target: Target) -> tuple[str, Files]:
    number = target.member(".json")
    info = json.loads(target.members[number][1])
    key = target.pick(*info)
    value = target.pick(
        -1, 10**30, 1.5, True, "x" * 100_000, [], {}, "../../etc/passwd", "\x1b[31m\n", "\ud800", None, 2**31,
        float("nan"),
    )  # fmt: skip
    data = target.pick(
        b"[" * 200_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500, b'{"id":' + b"[" * 300 + b"]" * 300 + b"}", b"{}",
        b"", b"null",
        b'{"class": 1e999}', b'{"class": ' + b"9" * 5000 + b"}", b'{"class": NaN}', b"\xff\xfe{}", b'{"a": 1',
        b'{"a": "\x00"}', b'"text"', "{}".encode("utf-16"), b'{"fps": "1e999999999"}', b'{"fps": "1/0"}', b"{}{}",
        *[json.dumps({**info, key: value}).encode()] * 20,
    )  # fmt: skip
    return target.replaced(number, data, f"{data[:60]!r}")


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that claims to be of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(4_000_000)))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")


@functools.cache
def bombs() -> dict[str, bytes]:
    """Files that claim to be far larger than they are, or that start another program in some decoders."""
    jpeg = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
    jpeg += b"\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11\1\x03\x11\1"
    webp = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff\x3f\0" + b"\xff\x3f\0"
    lossless = b"VP8L" + struct.pack("<I", 5) + b"\x2f\xff\xff\xff\x0f" + bytes(7)
    return {
        "a PNG of 100,000 x 100,000": png_bomb(100_000, 100_000),
        "a PNG of 2^31 - 1 x 1": png_bomb(2**31 - 1, 1),
        "a PNG of no pixels": png_bomb(0, 0),
        "a PNG of 9,000 x 9,000": png_bomb(9_000, 9_000),
        "a JPEG of 65,500 x 65,500": jpeg + bytes(100),
        "a WebP of 16,384 x 16,384": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "a lossless WebP of 16,384 x 16,384": b"RIFF" + struct.pack("<I", len(lossless) + 4) + b"WEBP" + lossless,
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(%pipe%touch trap) (w) file\nshowpage\n",
        "a GIF of 65,535 x 65,535": b"GIF89a\xff\xff\xff\xff\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        "a TIFF": b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",
        "a bitmap of -1 x -1": b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + b"\xff" * 8 + b"\1\0\x18\0" + bytes(24),
        "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>",
    }


def picture_bomb(target: Target) -> tuple[str, Files]:
    what, data = target.pick(*bombs().items())
    return target.replaced(target.payload(), data, what)


def truncated_member(target: Target) -> tuple[str, Files]:
    number = target.place(len(target.members))
    data = target.members[number][1]
    return target.replaced(number, data[: target.place(len(data))], "cut off")
