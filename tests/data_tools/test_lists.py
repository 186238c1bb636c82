"""Lists of videos and of classes: every form that is accepted, and what is said about the rest."""

import re
from pathlib import Path

import pytest

from ardiff.errors import UserError
from data_tools.scanning.lists import Row, read_classes, read_list


def listed(tmp_path: Path, name: str, text: str) -> list[Row]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_list(tmp_path / name)


def test_csv(tmp_path):
    text = '\ufeffVideo,label,prompt,split,views\r\na b.mp4,cat,"a cat, asleep",val,7\r\n\r\n"x""y.mp4",,,,\r\n'
    assert listed(tmp_path, "l.csv", text) == [
        Row(2, "a b.mp4", "cat", "a cat, asleep", "validation", has_label_column=True),
        Row(4, 'x"y.mp4', has_label_column=True),
    ]
    assert listed(tmp_path, "l.csv", "file\na.mp4") == [Row(2, "a.mp4")]


def test_jsonl(tmp_path):
    text = '{"path": "a.mp4", "text": "zwei\\nZeilen", "label": 3}\n\n{"video": "b.mp4", "split": "Test", "x": []}'
    assert listed(tmp_path, "l.jsonl", text) == [
        Row(1, "a.mp4", "3", "zwei\nZeilen", has_label_column=True),
        Row(3, "b.mp4", split="test"),
    ]


def test_txt(tmp_path):
    text = "A dog || runs||videos/a 1.mp4\n||b.mp4\nc d.avi 12\nframes/0001 3\nframes/7\ntake 2.mp4\n a.v2.x 3 \n"
    assert listed(tmp_path, "l.txt", text) == [
        Row(1, "videos/a 1.mp4", caption="A dog || runs"),
        Row(2, "b.mp4"),
        Row(3, "c d.avi", number=12),
        Row(4, "frames/0001", number=3),
        Row(5, "frames/7"),
        Row(6, "take 2.mp4"),
        Row(7, "a.v2.x 3"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "name,label\na,b", "l.csv, line 1: none of path, video, file is there; found name, label"),
        ("l.csv", "path,video\na,b", "l.csv, line 1: both 'path' and 'video' are a path"),
        ("l.csv", "path,caption\na.mp4,one, two", "l.csv, line 2: has 3 fields, but the header has 2"),
        ("l.csv", 'path\n"a.mp4', "l.csv, line 2: is not csv"),
        ("l.csv", "path,split\na.mp4,trian", "l.csv, line 2: split 'trian' is none of train, validation, test"),
        ("l.csv", "path,label\n,b", "l.csv, line 2: the path is empty"),
        ("l.csv", "path,label\n", "l.csv: lists no videos"),
        ("l.jsonl", '{"path": "a"}\n{"path": 3}', "l.jsonl, line 2: 'path' must be text, found 3"),
        ("l.jsonl", '{"path": "a", "caption": ["b"]}', "line 1: 'caption' must be text, found [\"b\"]"),
        ("l.jsonl", '{"path": "a"', "l.jsonl, line 1: not JSON"),
        ("l.jsonl", '["a"]', "l.jsonl, line 1: must be a JSON object"),
        ("l.jsonl", '{"label": "a"}', "l.jsonl, line 1: none of path, video, file"),
        ("l.txt", "a.mp4\na prompt||\n", "l.txt, line 2: the path is empty"),
        ("l.txt", "\n", "l.txt: lists no videos"),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path, name, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        listed(tmp_path, name, text)
    assert "\n" not in str(caught.value)


def test_lists_that_cannot_be_read(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"l\.txt: cannot be read as a list \(is not UTF-8 text\)"):
        read_list(tmp_path / "l.txt")
    with pytest.raises(UserError, match="No such file"):
        read_classes(tmp_path / "missing.txt")


def test_classes(tmp_path):
    file = tmp_path / "classInd.txt"
    file.write_text("1 ApplyEyeMakeup\r\n2 Apply Lipstick\r\n4 Archery\r\n\r\n")
    found = read_classes(file)
    assert found.names == {1: "ApplyEyeMakeup", 2: "Apply Lipstick", 4: "Archery"}
    assert found.index == {"ApplyEyeMakeup": 0, "Apply Lipstick": 1, "Archery": 3}
    file.write_text("0 a\n1 b\n")
    assert read_classes(file).index == {"a": 0, "b": 1}
    file.write_text("running\n2 steps\njumping\n")  # not all lines have a number: they are names
    assert read_classes(file).index == {"running": 0, "2 steps": 1, "jumping": 2}
    found.require(["Archery"])
    with pytest.raises(UserError, match=r"has no class 'Apply_Lipstick' \(nearest: 'Apply Lipstick'\), 'archery'"):
        found.require(["archery", "Apply_Lipstick", "Archery"])
    with pytest.raises(UserError, match=r"and 3 more$"):
        found.require([f"Archery{i}" for i in range(8)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a\n1 b\n", "line 2: class '1 b' is there twice"),
        ("1 a\n2 a\n", "line 2: class '2 a' is there twice"),
        ("7 a\n8 b\n", "the numbers of the classes begin with 7, not with 0 or 1"),
        ("\n", "lists no classes"),
    ],
)
def test_what_is_wrong_with_classes(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes.txt")
