"""Finding videos in folders and lists, and what is known about them from there."""

import re
from pathlib import Path

import pytest

from ardiff.errors import UserError
from data_tools.scanning.inputs import Source, find_sources
from data_tools.scanning.lists import read_classes


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Empty files: nothing is opened here."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    names = ("b/v.mp4", "a/x/2.AVI", "a/x/10.avi", "top.webm", "clip/1.png", "clip/2.PNG", "clip/notes.txt")
    names += ("a/frames_2/0.jpg", "a/.hidden/v.mp4", "a/.v.mp4", "b/poster.jpg", "README.md", "preview.png")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "b" / "loop").symlink_to(root)
    return root


def found(sources: list[Source], root: Path) -> dict[str, str | None]:
    return {str(Path(source.path).relative_to(root)): source.label for source in sources}


def test_folders(root):
    sources = find_sources([Path("root")])
    assert list(found(sources, root).items()) == [
        ("a/frames_2", "a"),
        ("a/x/10.avi", "a"),
        ("a/x/2.AVI", "a"),
        ("b/v.mp4", "b"),
        ("clip", None),
        ("top.webm", None),
    ]
    assert all(Path(source.path).is_absolute() and not source.missing for source in sources)
    assert found(find_sources([root / "clip", root / "b" / "v.mp4", root / "a" / "x"]), root) == {
        "a/x/10.avi": None,
        "a/x/2.AVI": None,
        "b/v.mp4": None,
        "clip": None,
    }
    (root / "clip" / "small").mkdir()
    (root / "clip" / "small" / "1.png").touch()
    assert set(found(find_sources([root / "clip"]), root)) == {"clip", "clip/small"}
    (root / "clip" / "2.PNG").unlink()
    assert set(found(find_sources([root / "clip"]), root)) == {"clip/small"}  # a single picture is a preview


def test_lists(root, tmp_path):
    (tmp_path / "l.csv").write_text("path,label,caption\nroot/b/v.mp4,x,\nroot/clip,,moves\nroot/gone.mp4,y,\n")
    (root / "l.txt").write_text("a cat||top.webm\na/x/2.AVI\na/x/10.avi 3\nclip 2\n")
    sources = {Path(source.path).name: source for source in find_sources([Path("l.csv"), root / "l.txt"])}
    assert set(sources) == {"v.mp4", "clip", "gone.mp4", "top.webm", "2.AVI", "10.avi"}
    assert (sources["v.mp4"].label, sources["v.mp4"].caption, sources["v.mp4"].missing) == ("x", None, False)
    assert (sources["clip"].label, sources["clip"].caption) == ("2", "moves")  # from both lists
    assert (sources["gone.mp4"].label, sources["gone.mp4"].missing) == ("y", True)
    assert (sources["top.webm"].label, sources["top.webm"].caption) == (None, "a cat")
    assert (sources["2.AVI"].label, sources["10.avi"].label) == ("a", "a")
    assert sources["2.AVI"].origin == f"{root / 'l.txt'}, line 2"


def test_the_root_of_lists(root, tmp_path):
    (tmp_path / "l.txt").write_text("b/v.mp4\n../other/w.mp4\n")
    sources = find_sources([tmp_path / "l.txt"], root=Path("root"))
    assert [(source.path, source.label, source.missing) for source in sources] == [
        (str(tmp_path / "other" / "w.mp4"), None, True),
        (str(root / "b" / "v.mp4"), "b", False),
    ]
    with pytest.raises(UserError, match=r"none of the 2 listed videos exists; .*b/v\.mp4 \(.*line 1\); --root says"):
        find_sources([tmp_path / "l.txt"])


def test_class_numbers_without_a_class_list_are_told(root, capsys):
    Path("l.txt").write_text("b/v.mp4 3\ntop.webm\n")
    sources = find_sources([Path("l.txt")], root)
    assert found(sources, root) == {"b/v.mp4": "b", "top.webm": None}
    said = capsys.readouterr().err
    assert said.startswith("l.txt: has 1 class number, but there is no --labels; ") and said.count("\n") == 1
    Path("l.txt").write_text("gone.mp4\n")
    with pytest.raises(UserError, match=r"gone\.mp4 \(l\.txt, line 1\): the only listed video does not exist"):
        find_sources([Path("l.txt")], root)


def test_lists_add_to_folders_and_must_agree(root, tmp_path):
    (tmp_path / "one.csv").write_text("path,split,caption\nroot/b/v.mp4,test,first\nroot/b/v.mp4,,second\n")
    for order in (["root", "one.csv"], ["one.csv", "root"]):
        sources = {Path(source.path).name: source for source in find_sources([Path(name) for name in order])}
        assert len(sources) == 6
        merged = sources["v.mp4"]
        assert (merged.label, merged.split, merged.caption) == ("b", "test", "first")
    (tmp_path / "two.csv").write_text("path,split\nroot/top.webm,\nroot/b/v.mp4,train\n")
    message = r"v\.mp4: has split 'test' in one\.csv, line 2, but 'train' in two\.csv, line 3"
    with pytest.raises(UserError, match=message):
        find_sources([Path("one.csv"), Path("two.csv")])


def test_class_lists(root, tmp_path):
    (tmp_path / "classes.txt").write_text("1 a\n2 b\n3 c\n")
    classes = read_classes(tmp_path / "classes.txt")
    (tmp_path / "l.txt").write_text("a/x/2.AVI 1\ntop.webm 3\nb/v.mp4\n")
    sources = find_sources([tmp_path / "l.txt"], root, classes)
    assert found(sources, root) == {"a/x/2.AVI": "a", "b/v.mp4": "b", "top.webm": "c"}
    mistakes = {
        "a/x/2.AVI 2\n": "l.txt, line 1: class 2 is 'b' in --labels classes.txt, but the video lies in 'a'",
        "b/v.mp4\ntop.webm 4\n": "l.txt, line 2: class 4 is not in --labels classes.txt, which has 1 to 3",
        "clip/1.png\n": "--labels classes.txt: has no class 'clip' (nearest: 'c')",
    }
    for text, message in mistakes.items():
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            find_sources([Path("l.txt")], root, read_classes(Path("classes.txt")))


def test_inputs_that_are_none(root, tmp_path):
    for given, message in (
        ("nothing", "nothing: no such file or folder"),
        ("nothing.csv", r"nothing\.csv: no such file or folder"),
        ("root/preview.png", "is a single picture; give the folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources([Path(given)])
    with pytest.raises(UserError, match=r"--root nope: no such folder"):
        find_sources([Path("root")], Path("nope"))
    with pytest.raises(UserError, match=r"--root root: is for the paths in lists, and none of the inputs is a list"):
        find_sources([Path("root")], Path("root"))
    assert find_sources([Path("root/b/loop/b/loop/a/.hidden")]) != []  # asked for by name
