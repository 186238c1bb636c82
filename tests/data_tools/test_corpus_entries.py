"""Captions that were written into a corpus by hand, when the corpus is made again."""

import shutil
from dataclasses import replace

from ardiff.data.corpus import CorpusEntry, read_corpus, write_corpus
from data_tools import make_demo_corpus, scan_videos
from data_tools.scanning.corpus_entries import keep_captions


def entry(path: str, caption: str | None = None, sha256: str | None = "a", first: int = 0) -> CorpusEntry:
    return CorpusEntry("0", path, "ok", first_frame=first, num_frames=9, caption=caption, sha256=sha256)


def captions(entries: list[CorpusEntry], earlier: list[CorpusEntry]) -> tuple[list[str | None], int]:
    kept, lost = keep_captions(entries, earlier)
    assert [replace(one, caption=None) for one in kept] == [replace(one, caption=None) for one in entries]
    return [one.caption for one in kept], lost


def test_a_moved_file_keeps_the_captions_of_its_scenes():
    earlier = [entry("/a/v.mp4", "one"), entry("/a/v.mp4", "two", first=9)]
    assert captions([entry("/b/w.mp4"), entry("/b/w.mp4", first=9)], earlier) == (["one", "two"], 0)


def test_of_equal_files_the_path_says_which():
    earlier = [entry("/a/x/v.mp4", "one"), entry("/a/y/v.mp4", "two"), entry("/a/z.mp4")]
    assert captions([replace(one, caption=None) for one in earlier], earlier) == (["one", "two", None], 0)
    moved = [entry("/b/y/v.mp4"), entry("/b/x/v.mp4"), entry("/b/z.mp4")]
    assert captions(moved, earlier) == (["two", "one", None], 0)
    assert captions([entry("/b/renamed.mp4")], earlier) == (["one"], 1)


def test_every_caption_that_has_no_place_is_counted():
    earlier = [entry("/a.mp4", "one"), entry("/b.mp4", "two", "b"), entry("/c.mp4", None, "c")]
    assert captions([entry("/c.mp4", None, "c")], earlier) == ([None], 2)  # not among the inputs
    assert captions([entry("/a.mp4", None, "d"), entry("/b.mp4", None, None)], earlier) == ([None, None], 2)  # changed
    assert captions([entry("/a.mp4", "of a list"), entry("/b.mp4", None, "b")], earlier) == (["of a list", "two"], 1)
    # The same words for other frames of the video are not lost.
    assert captions([entry("/a.mp4", "one", first=3), entry("/b.mp4", None, "b")], earlier) == (["one", "two"], 0)


def test_no_earlier_corpus_is_overwritten(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "c.jsonl"
    make_demo_corpus.main(["--out", str(videos), "--num_videos", "6", "--num_frames", "8", "--size", "32"])
    folders = sorted(path for path in videos.iterdir() if path.is_dir())
    one, other = folders[0], folders[1]

    def scan(*inputs: object) -> list[CorpusEntry]:
        assert scan_videos.main([*map(str, inputs), "--out", str(out), "--workers", "1"]) == 0
        return read_corpus(out)

    def write(caption: str) -> list[CorpusEntry]:
        typed = [replace(entry, caption=f"{caption} {entry.id}") for entry in read_corpus(out)]
        write_corpus(out, typed)
        return typed

    scan(one, other)
    first = write("first")
    scan(one)  # as if a disk were not mounted
    said = capsys.readouterr().err
    assert "1 caption belongs to a scene that is not in the corpus any more" in said
    assert said.endswith(f"{out}.previous\n")
    second = write("second")
    scan(other)
    assert capsys.readouterr().err.endswith(f"{out}.previous.1\n")
    write_corpus(out, second)  # killed before it wrote the corpus
    scan(other)
    assert capsys.readouterr().err.endswith(f"{out}.previous.1\n")
    assert read_corpus(tmp_path / "c.jsonl.previous") == first
    assert read_corpus(tmp_path / "c.jsonl.previous.1") == second
    third = write("third")
    shutil.move(other, tmp_path / "moved")
    assert [entry.caption for entry in scan(tmp_path / "moved")] == [entry.caption for entry in third]
    assert not (tmp_path / "c.jsonl.previous.2").exists() and capsys.readouterr().err == ""
