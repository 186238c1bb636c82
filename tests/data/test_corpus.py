"""corpus.jsonl: what is written reads back, and mistakes made by hand are named."""

import json
import re
from dataclasses import replace

import pytest

from ardiff.data.corpus import CorpusEntry, classes, format_entry, read_corpus, usable, write_corpus
from ardiff.errors import UserError

GOOD = CorpusEntry("000000", "/v.mp4", "ok", "h264", 64, 48, "30000/1001", 0, 9, "a", "b", "train", "0" * 64)


def test_corpus_file_reads_back(tmp_path):
    entries = [GOOD, CorpusEntry("000001", "sub/\u2028odd\udcff.mp4", "broken"), replace(GOOD, id="2", caption="ü\n")]
    write_corpus(tmp_path / "c.jsonl", entries)
    read = read_corpus(tmp_path / "c.jsonl")
    assert read == [GOOD, replace(entries[1], path=str(tmp_path / entries[1].path)), entries[2]]
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])["fps"] == "30000/1001"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a.b"}, "field 'id' must be digits"),
        ({"id": "000001"}, 'id "000001" was already used in line 1'),
        ({"fps": 25}, "field 'fps' must be str | null, found 25"),
        ({"fps": "25"}, "field 'fps' must be a fraction"),
        ({"num_frames": 0}, "field 'num_frames' must be at least 1"),
        ({"num_frames": True}, "field 'num_frames' must be int"),
        ({"split": "tset"}, "field 'split' must be one of train, validation, test"),
        ({"sha256": None}, "field 'sha256' must be the hex digest"),
        ({"status": ""}, "field 'status' is missing"),
        ({"captoin": "x"}, "unknown field 'captoin'"),
        ({"class_index": "3"}, "field 'class_index' must be int | null, found \"3\""),
        ({"class_index": -1}, "field 'class_index' must belong to a label and be at least 0, found -1"),
        ({"class_index": 3, "label": None}, "field 'class_index' must belong to a label"),
        ({"duplicate_of": "a"}, "field 'duplicate_of' must be digits"),
        ({"perceptual_hash": 7}, "field 'perceptual_hash' must be str | null"),
    ],
)
def test_malformed_lines_are_named(tmp_path, change, message):
    first = format_entry(replace(GOOD, id="000001"))
    second = json.dumps({**json.loads(format_entry(GOOD)), **change})
    (tmp_path / "c.jsonl").write_text(f"{first}\n\n{second}\n")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_corpus(tmp_path / "c.jsonl")
    assert "c.jsonl, line 3: " in str(caught.value)


def test_other_malformed_corpora(tmp_path):
    for text, message in (("", "lists no videos"), ("[1]", "line 1: must be a JSON object"), ("{", "line 1: not JSON")):
        (tmp_path / "c.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_corpus(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl: not found; it is made by data_tools\.scan_videos"):
        read_corpus(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_corpus(tmp_path)


def test_new_fields_and_corpora_without_them(tmp_path):
    full = replace(GOOD, split="test", class_index=4, duplicate_of="000003", perceptual_hash="0f" * 64)
    scene = replace(GOOD, id="000001", first_frame=9, num_frames=20, class_index=4, split="test")
    write_corpus(tmp_path / "c.jsonl", [full, scene])
    assert read_corpus(tmp_path / "c.jsonl") == [full, scene]
    old = json.loads(format_entry(GOOD))
    for name in ("class_index", "duplicate_of", "perceptual_hash"):
        del old[name]
    (tmp_path / "old.jsonl").write_text(json.dumps(old))
    assert read_corpus(tmp_path / "old.jsonl") == [GOOD]


def labelled(*labels: tuple[str | None, int | None], status: str = "ok") -> list[CorpusEntry]:
    return [
        replace(GOOD, id=str(number), status=status, label=label, class_index=index)
        for number, (label, index) in enumerate(labels)
    ]


def test_classes():
    assert classes(labelled(("b", None), ("a", None), (None, None), ("b", None))) == ["a", "b"]
    assert classes(labelled(("a", 3), ("b", 0), (None, None), ("a", 3))) == ["b", "class 1", "class 2", "a"]
    assert classes(labelled(("a", None), status="broken")) == []
    assert classes(labelled(("a", 1)) + labelled(("z", 5), status="broken")) == ["class 0", "a"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([("a", 1), ("b", 2), ("a", 3)], "label 'a' has class_index 1 and 3 (id 2)"),
        ([("a", 1), ("a", None)], "label 'a' has class_index 1 and null (id 1)"),
        ([("a", 1), ("b", 1)], "class_index 1 is that of 'a' and of 'b' (id 1)"),
        ([("a", 1), ("b", None)], "label 'b' has no class_index, but others have"),
    ],
)
def test_contradicting_classes(tmp_path, labels, message):
    write_corpus(tmp_path / "c.jsonl", labelled(*labels))
    with pytest.raises(UserError, match=re.escape(message)):
        read_corpus(tmp_path / "c.jsonl")
    write_corpus(tmp_path / "c.jsonl", labelled(*labels, status="broken"))  # what is not used may contradict
    assert len(read_corpus(tmp_path / "c.jsonl")) == len(labels)


def test_usable(tmp_path):
    entries = [GOOD, replace(GOOD, id="1", split="test"), replace(GOOD, id="2", status="broken", split=None)]
    assert usable(tmp_path, entries) == entries[:2]
    assert usable(tmp_path, entries, "test") == entries[1:2]
    assert usable(tmp_path, entries, "validation") == []
    with pytest.raises(UserError, match="none of its 1 videos is usable"):
        usable(tmp_path, entries[2:])
