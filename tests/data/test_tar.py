import io
import os
import tarfile
import time

import pytest

from ardiff.data import tar as tar_module
from ardiff.data.tar import BLOCK, Member, ShardError, read_member, read_members

FILES = (("000001.json", b"{}"), ("000001.latents.npy", b"x" * 700), ("2.00000.jpg", b""), ("2.json", b"y" * 512))


def tar_bytes(files=FILES, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members_of(path):
    with path.open("rb") as stream:
        return list(read_members(stream, path))


def header(name=b"0.json", size=b"00000000002\0", kind=b"0", prefix=b""):
    """A tar header with a right checksum, whatever it says."""
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265], block[345 : 345 + len(prefix)] = b"ustar\00000", prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_finds_what_tarfile_finds(tmp_path, form):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(format=form))
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    found = members_of(path)
    assert [(member.name, member.offset, member.size) for member in found] == expected
    assert found[1] == Member("000001", "latents.npy", 3 * BLOCK, 700)


@pytest.mark.parametrize("cut", [1, 100, BLOCK, BLOCK + 1, 3 * BLOCK + 10, 4 * BLOCK, 5 * BLOCK, 8 * BLOCK + 512])
def test_a_cut_anywhere_is_seen(tmp_path, cut):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes()[:cut])
    with pytest.raises(ShardError, match=r"ends|more than the file"):
        members_of(path)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (header(name=b"../../0.json"), "not KEY.EXTENSION"),
        (header(name=b"/0.json"), "not KEY.EXTENSION"),
        (header(name=b"0.json", prefix=b"etc"), "not KEY.EXTENSION"),
        (header(name=b"a\0b.json"), "not KEY.EXTENSION"),
        (header(name=b"\xff.json"), "not KEY.EXTENSION"),
        (header(kind=b"2"), "not a regular file"),  # a symbolic link
        (header(kind=b"1"), "not a regular file"),
        (header(kind=b"x"), "not a regular file"),  # an extended header, which may be of any size
        (header(kind=b"L"), "not a regular file"),
        (header(size=b"77777777777\0"), "more than the file"),
        (header(size=b"\x80" + b"\xff" * 11), "no sensible size"),  # base 256: exabytes
        (header(size=b"\xff" * 12), "no sensible size"),  # base 256: negative, at which tarfile ran in circles
        (header(size=b"-0000000512\0"), "no sensible size"),
        (header(size=b""), "no sensible size"),
        (header()[:300] + b"!" + header()[301:], "checksum"),
        (b"\x01" * BLOCK, "checksum"),
    ],
)
def test_hostile_headers_are_named_and_nothing_large_is_read(tmp_path, block, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(FILES[:1])[: 2 * BLOCK] + block + b"{}".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    started = time.perf_counter()
    with pytest.raises(ShardError, match=reason) as caught:
        members_of(path)
    assert time.perf_counter() - started < 1
    assert 2 * BLOCK <= caught.value.offset <= 3 * BLOCK


def test_nothing_may_follow_the_end(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes() + tar_bytes())
    with pytest.raises(ShardError, match="follows the end mark"):
        members_of(path)


def test_members_are_read_within_limits(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes())
    member = members_of(path)[1]
    with path.open("rb", buffering=0) as stream:
        assert read_member(stream, member, path) == b"x" * 700
        os.truncate(path, member.offset + 600)  # it shrinks while it is read
        with pytest.raises(ShardError, match=r"byte 1536: the file ends inside 000001\.latents\.npy"):
            read_member(stream, member, path)
        monkeypatch.setattr(tar_module, "MAX_READ", 699)
        with pytest.raises(ShardError, match=r"has 700 bytes, more than the 699 that are read at once"):
            read_member(stream, member, path)
