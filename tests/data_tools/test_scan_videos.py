"""scan_videos and the corpus file it writes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from ardiff.data.corpus import CorpusEntry, classes, format_entry, read_corpus, usable, write_corpus
from ardiff.errors import UserError
from ardiff.files import sha256
from data_tools import make_demo_corpus, scan_videos
from data_tools.scan_videos import assign_splits

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_VIDEOS = REPOSITORY.parent / "shared" / "data" / "videos"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """18 demo videos, 3 unusable files, a copy under another name, and files that are none."""
    folder = tmp_path_factory.mktemp("scan") / "videos"
    make_demo_corpus.main(["--out", str(folder), "--num_videos", "18", "--num_frames", "8", "--size", "32"])
    data = bytearray((folder / "orbit" / "00001.mp4").read_bytes())
    (folder / "orbit" / "cut.mp4").write_bytes(data[: len(data) // 2])
    media = data.find(b"mdat") + 4
    data[media + 720 : media + 1200] = bytes(byte ^ 0x55 for byte in data[media + 720 : media + 1200])
    (folder / "pulse" / "damaged.mp4").write_bytes(data)
    (folder / "empty.MP4").touch()
    shutil.copy(folder / "drift" / "00002.mp4", folder / "bounce" / "copy.mp4")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "drift" / ".hidden.mp4").write_text("not looked at")
    (folder / "stripes" / "loop").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scan") / "new" / "corpus.jsonl"
    assert scan_videos.main([str(videos), "--out", str(out), "--workers", "2", "--validation_fraction", "0.3"]) == 0
    return out


def test_every_video_is_listed_with_what_it_is(videos, corpus):
    entries = read_corpus(corpus)
    assert [entry.path for entry in entries] == sorted(str(path) for path in videos.rglob("[!.]*.[mM][pP]4"))
    assert [entry.id for entry in entries] == [f"{number:06d}" for number in range(22)]
    good = [entry for entry in entries if entry.ok]
    assert len(good) == 19
    for entry in good:
        assert (entry.codec, entry.width, entry.height, entry.fps) == ("h264", 32, 32, "8/1")
        assert (entry.first_frame, entry.num_frames, entry.caption) == (0, 8, None)
        assert Fraction(entry.fps) == 8
        assert entry.label == Path(entry.path).parent.name
        assert entry.sha256 == sha256(Path(entry.path))
    assert classes(entries) == ["bounce", "drift", "orbit", "pendulum", "pulse", "stripes"]
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus.jsonl"]


def test_unusable_videos_are_named_with_a_reason(corpus):
    bad = {Path(entry.path).name: entry for entry in read_corpus(corpus) if not entry.ok}
    assert set(bad) == {"cut.mp4", "damaged.mp4", "empty.MP4"}
    assert "cannot be opened as a video" in bad["cut.mp4"].status
    assert re.fullmatch(r"frame \d+ (cannot be decoded \(.*\)|is damaged)", bad["damaged.mp4"].status)
    assert all(entry.split is None for entry in bad.values())


def test_the_split_follows_the_content(corpus):
    good = usable(corpus, read_corpus(corpus))
    of_content: dict[str, set] = {}
    for entry in good:
        of_content.setdefault(entry.sha256, set()).add(entry.split)
    assert len(of_content) == 18  # the copy is the 19th video
    assert all(len(splits) == 1 for splits in of_content.values())
    validation = usable(corpus, good, "validation")
    assert 1 <= len(validation) <= 12
    assert len(validation) + len(usable(corpus, good, "train")) == 19


def test_split_sizes():
    digests = [f"{i * 2654435761 % 2**32:08x}" * 8 for i in range(1, 1001)]
    entries = [CorpusEntry(str(i), f"/{i}", "ok", sha256=digest) for i, digest in enumerate(digests)]

    def count(entries, fraction):
        return sum(entry.split == "validation" for entry in assign_splits(entries, fraction))

    assert 60 < count(entries, 0.1) < 140
    assert (count(entries, 0), count(entries, 1)) == (0, 1000)
    assert count(entries[:2], 1e-9) == count(entries[:2], 0.999999) == 1  # neither split is empty
    assert count(entries[:1], 1e-9) == 0
    assert count([replace(entry, status="broken") for entry in entries], 0.5) == 0
    few = {entry.path: entry.split for entry in assign_splits(entries[:500], 0.1)}
    many = {entry.path: entry.split for entry in assign_splits(entries, 0.1)}
    assert all(many[path] == split for path, split in few.items())  # more videos move none of the earlier


def test_number_of_processes_does_not_matter(videos, corpus, tmp_path):
    arguments = [str(videos), "--out", str(tmp_path / "c.jsonl"), "--workers", "1", "--validation_fraction", "0.3"]
    scan_videos.main(arguments)
    assert (tmp_path / "c.jsonl").read_bytes() == corpus.read_bytes()


def test_a_killed_scan_goes_on(videos, corpus, tmp_path, capsys):
    """Half of the results lie in the .partial file, the last line of which is torn."""
    entries = read_corpus(corpus)
    captioned = replace(entries[0], caption="a ball")
    lines = [format_entry(replace(entry, id="0", split="train")) for entry in [captioned, *entries[1:9]] if entry.ok]
    (tmp_path / "c.jsonl.partial").write_text("\n".join(lines)[:-20])
    arguments = [str(videos), "--out", str(tmp_path / "c.jsonl"), "--workers", "1", "--validation_fraction", "0.3"]
    scan_videos.main(arguments)
    assert read_corpus(tmp_path / "c.jsonl") == [captioned, *entries[1:]]  # and known results were used
    first = (tmp_path / "c.jsonl").read_bytes()
    capsys.readouterr()
    scan_videos.main(arguments)
    output = capsys.readouterr()
    assert (tmp_path / "c.jsonl").read_bytes() == first
    assert "19 ok" in output.out and "3 rejected" in output.out
    assert output.err.count("rejected ") == 3 and "cut.mp4: cannot be opened" in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_known_results_are_used_only_for_the_same_content(videos, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_text("no video at all")
    known = CorpusEntry("7", str(path), "ok", "h264", 32, 32, "8/1", 0, 8, sha256=sha256(path))
    found = []
    scan_videos.examine((str(path), known), found.append)
    path.write_text("changed since")
    scan_videos.examine((str(path), known), found.append)
    assert found[0].ok and found[0].num_frames == 8  # it was not decoded
    assert not found[1].ok


def test_single_files_short_videos_and_labels(videos, tmp_path, capsys):
    out = tmp_path / "c.jsonl"
    files = [str(videos / "drift" / "00002.mp4"), str(videos / "orbit"), str(videos / "drift" / "00002.mp4")]
    assert scan_videos.main([*files, "--out", str(out), "--workers", "1"]) == 0
    entries = read_corpus(out)
    assert [Path(entry.path).name for entry in entries] == [
        "00002.mp4",
        "00001.mp4",
        "00007.mp4",
        "00013.mp4",
        "cut.mp4",
    ]
    assert {entry.label for entry in entries} == {None}
    with pytest.raises(UserError, match="none of the 5 videos is usable"):
        scan_videos.main([*files, "--out", str(out), "--workers", "1", "--min_frames", "9"])
    assert "00002.mp4: has 8 frames, fewer than --min_frames 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of its 5 videos is usable"):
        usable(out, read_corpus(out))
    assert scan_videos.main([*files, "--out", str(out), "--workers", "1", "--min_frames", "8"]) == 0


def test_mistakes_are_one_line_and_exit_code_2(videos, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "c.jsonl").write_text("not a corpus\n")
    mistakes = {
        "no such file or folder": [tmp_path / "missing", "--out", tmp_path / "x.jsonl"],
        "no videos found": [tmp_path / "nothing", "--out", tmp_path / "x.jsonl"],
        "c.jsonl, line 1: not JSON": [videos, "--out", tmp_path / "c.jsonl"],
        "is a folder": [videos, "--out", tmp_path],
        "must be between 0 and 1": [videos, "--out", tmp_path / "x.jsonl", "--validation_fraction", "2"],
    }
    for expected, arguments in mistakes.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            scan_videos.main([str(argument) for argument in arguments])
    command = [sys.executable, "-m", "data_tools.scan_videos", *map(str, mistakes["no videos found"])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


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
        ({"split": "test"}, "field 'split' must be one of train, validation"),
        ({"sha256": None}, "field 'sha256' must be the hex digest"),
        ({"status": ""}, "field 'status' is missing"),
        ({"captoin": "x"}, "unknown field 'captoin'"),
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


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason="real videos are not part of the repository")
def test_real_videos(tmp_path, capsys):
    assert scan_videos.main([str(REAL_VIDEOS), "--out", str(tmp_path / "c.jsonl"), "--workers", "2"]) == 0
    entries = read_corpus(tmp_path / "c.jsonl")
    assert [Path(entry.path).name for entry in entries if not entry.ok] == ["corrupted.mp4"]
    assert len(entries) == 10
    by_name = {Path(entry.path).name: entry for entry in entries}
    assert by_name["carphone_pristine.mp4"].fps == "30000/1001"
    assert by_name["pancake.mkv"].num_frames == 310
    assert "corrupted.mp4: frame " in capsys.readouterr().err
