"""Which variables travel, and how they are kept from others."""

import pytest

from ardiff.errors import UserError
from ardiff.launching.environment import collect, read_file

HERE = {
    "NCCL_DEBUG": "INFO",
    "OMP_NUM_THREADS": "4",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": "/lib",
    "PATH": "/bin",
    "HOME": "/root",
    "CUDA_VISIBLE_DEVICES": "3",
    "RANK": "1",
    "AWS_SECRET_ACCESS_KEY": "abc",
    "ARDIFF_SUPERVISOR": "1:2",
    "ARDIFF_JOB": "x",
    "SITE": "a b",
}


def write(folder, text, mode=0o600):
    path = folder / "variables"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_only_what_is_listed_travels():
    assert set(collect(HERE, [], None).values) == {"NCCL_DEBUG", "OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH"}
    given = collect(HERE, ["SITE", "AWS_SECRET_ACCESS_KEY"], None)
    assert given.values["SITE"] == "a b" and given.secret == {"AWS_SECRET_ACCESS_KEY"}
    assert "AWS_SECRET_ACCESS_KEY=***" in given.shown() and "SITE='a b'" in given.shown()


@pytest.mark.parametrize(
    ("named", "complaint"), [("OTHER", "OTHER: is not set here"), ("KEY=abc", "takes a name; values go into")]
)
def test_named_variables_have_to_be_there(named, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        collect(HERE, [named], None)
    assert "abc" not in str(caught.value)


def test_a_file_wins_and_is_hidden_where_it_is_private(tmp_path):
    path = write(tmp_path, "# site\n\nNCCL_DEBUG=WARN\nexport A='x y' \nB=1 # why\nC=\nD=\"a # b\"\nE=f=g\n")
    given = collect(HERE, [], path)
    assert read_file(path)[0] == {"NCCL_DEBUG": "WARN", "A": "x y", "B": "1", "C": "", "D": "a # b", "E": "f=g"}
    assert given.values["NCCL_DEBUG"] == "WARN" and "A=***" in given.shown() and "OMP_NUM_THREADS=4" in given.shown()
    path.chmod(0o644)
    assert "A='x y'" in collect(HERE, [], path).shown()


def test_secrets_that_others_can_read_are_refused(tmp_path):
    path = write(tmp_path, "A=1\nWANDB_API_KEY=abc\n", 0o644)
    with pytest.raises(UserError, match="line 2: WANDB_API_KEY can be read by others; chmod 600") as caught:
        read_file(path)
    assert "abc" not in str(caught.value)
    path.chmod(0o600)
    assert read_file(path) == ({"A": "1", "WANDB_API_KEY": "abc"}, True)


@pytest.mark.parametrize("line", ["secret words", "1A=2", "A B=2", "=x"])
def test_other_lines_are_mistakes_and_not_shown(tmp_path, line):
    with pytest.raises(UserError, match="line 2: is not of the form NAME=value") as caught:
        read_file(write(tmp_path, f"A=1\n{line}\n"))
    assert line not in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_file(tmp_path / "missing")
