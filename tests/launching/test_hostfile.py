"""Lists of hosts: what is read, and every mistake in them."""

import pytest

from ardiff.errors import UserError
from ardiff.launching.hostfile import Host, in_place_of, read, read_spares


def write(folder, text):
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_comments_and_blank_lines_are_left_out(tmp_path):
    path = write(tmp_path, "# nodes\n\nnode1 slots=8\n  user@10.0.0.2   slots=4  # old\n\n")
    assert read(path) == [Host("node1", 8), Host("user@10.0.0.2", 4)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no hosts"),
        ("# nothing\n", "has no hosts"),
        ("node1\n", "line 1: 'node1' is not of the form 'name slots=N'"),
        ("node1 slots=8\nnode2 slots=\n", "line 2: 'node2 slots=' is not of the form"),
        ("node1 slots=two\n", "line 1: 'node1 slots=two' is not of the form"),
        ("node1 slots=8 max_slots=9\n", "line 1: "),
        ("node1 slots=0\n", "line 1: slots=0: must be at least 1"),
        ("node1 slots=1\n\nnode1 slots=1\n", "line 3: node1 is there twice"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x' is not the name of a host"),
        ("node[1-4] slots=1\n", "line 1: 'node[1-4]' is not the name of a host"),
        ("node1,node2 slots=1\n", "is not the name of a host"),
    ],
)
def test_mistakes_name_the_line(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and complaint in str(caught.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, complaint in (("missing", "No such file"), (".", "Is a directory"), ("binary", "is no text")):
        with pytest.raises(UserError, match=complaint):
            read(tmp_path / name)


def test_spares_are_names_or_a_file(tmp_path):
    hosts = [Host("node1", 8), Host("node2", 4)]
    assert read_spares("node8,node9,node8", hosts) == [Host("node8", 8), Host("node9", 8)]
    assert read_spares(str(write(tmp_path, "node9 slots=4\n")), hosts) == [Host("node9", 4)]
    with pytest.raises(UserError, match="node2 is one of the hosts"):
        read_spares("node2", hosts)
    with pytest.raises(UserError, match="no such file, and no list of hosts"):
        read_spares("missing/hosts", hosts)


def test_a_spare_has_to_have_as_many_slots():
    spares = [Host("small", 4), Host("large", 16)]
    assert in_place_of(Host("node1", 8), spares) == Host("large", 8)
    assert in_place_of(Host("node1", 2), spares) == Host("small", 2)
    assert in_place_of(Host("node1", 32), spares) is None
