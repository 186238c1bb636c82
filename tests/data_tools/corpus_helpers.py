"""Small corpora for the tools that read one, made without the other tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ardiff.data.corpus import CorpusEntry, write_corpus
from ardiff.data.shards import Sample, read_samples
from ardiff.video import fingerprint, write_mp4

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 48, 40
LABELS = ("walk", "run", "jump")


def make_video(path: Path, num_frames: int, seed: int, fps: int = 8) -> Path:
    """Frames that differ from one another: a bright square wanders over coloured noise."""
    rng = np.random.default_rng(seed)
    frames = np.broadcast_to(rng.integers(0, 128, (HEIGHT, WIDTH, 3), dtype=np.uint8), (num_frames, HEIGHT, WIDTH, 3))
    frames = frames.copy()
    for number, frame in enumerate(frames):
        left, top = (3 * number + seed) % (WIDTH - 12), (2 * number + 5 * seed) % (HEIGHT - 12)
        frame[top : top + 12, left : left + 12] = (255, 255 - 9 * number % 200, 5 * seed % 256)
    write_mp4(path, frames, fps)
    return path


def entry(number: int, path: Path, num_frames: int, **changes: object) -> CorpusEntry:
    values = {
        "id": f"{number:06d}",
        "path": str(path),
        "status": "ok",
        "codec": "h264",
        "width": WIDTH,
        "height": HEIGHT,
        "fps": "8/1",
        "num_frames": num_frames,
        "label": LABELS[number % len(LABELS)],
        "split": "train",
        "sha256": fingerprint(path),
    }
    return CorpusEntry(**{**values, **changes})  # type: ignore[arg-type]


def make_corpus(folder: Path, lengths: tuple[int, ...] = (9, 14, 5, 12, 7, 10, 21, 6, 8)) -> Path:
    """One video per length; numbers 3 and 4 are for validation, 5 is for testing; a tenth file has three scenes."""
    splits = {3: "validation", 4: "validation", 5: "test"}
    entries = [
        entry(number, make_video(folder / f"{number}.mp4", length, number), length, split=splits.get(number, "train"))
        for number, length in enumerate(lengths)
    ]
    scenes = make_video(folder / "scenes.mp4", 30, 99)
    for number, (first, length) in enumerate(((0, 11), (11, 5), (18, 12)), len(lengths)):
        entries.append(entry(number, scenes, length, first_frame=first, label=None, caption=f"scene from {first}"))
    write_corpus(folder / "corpus.jsonl", entries)
    return folder / "corpus.jsonl"


def samples_in(folder: Path) -> Iterator[Sample]:
    """The samples of all shards right in a folder."""
    for tar in sorted(folder.glob("*.tar")):
        yield from read_samples(tar)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SABOTAGE = """
import os, signal, time
import ardiff.video
from pathlib import Path

whole = ardiff.video.fingerprint

def fingerprint(path):
    if Path(path).name == "crash.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    if Path(path).name == "hang.mp4":
        time.sleep(1000)
    return whole(path)

ardiff.video.fingerprint = fingerprint
"""


def run_sabotaged(folder: Path, module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program whose decoding processes die of crash.mp4 and never come back from hang.mp4."""
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
