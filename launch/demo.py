"""The whole system on one machine in minutes: videos, auto-encoder, latents, ZeRO-2 training, samples.

    python launch/demo.py --out runs/demo [--videos DIR]

`make demo` calls this. Every stage is one of the ordinary programs, its command is printed, and a stage that is
complete is not run again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that is not installed

import torch

from ardiff import cli
from ardiff.data.corpus import classes, read_corpus
from ardiff.errors import UserError
from ardiff.files import sha256, write_json
from ardiff.monitor.writers import METRICS, VALIDATION
from ardiff.ports import free_port
from ardiff.training.run_dir import read_exit

SIZE = 64  # pixels
CLIPS = 160  # procedural videos
HELD_OUT = "0.2"  # share of the videos that the distances are measured on
# A shorter run of arvae_tiny, of a corpus that has videos enough not to need more pictures of each.
SHORT = "[{steps: 1900, lr: 2.0e-3}, {steps: 800, lr: 4.0e-4}, {steps: 500, lr: 1.0e-4}]"
HELD_OUT_LOSS = f"{VALIDATION}loss"
VIDEOS, FRAMES = 12, 16  # sampled at the end; training clips are half as long


@dataclass
class Stage:
    """One program of the pipeline."""

    name: str
    command: list[str]
    result: Path  # exists when it has run

    def finished(self) -> bool:
        """Whether its result is there and, of a training, says that it ended by itself."""
        if self.result.name != "exit.json":
            return self.result.exists()
        ended = read_exit(self.result.parent)
        return ended is not None and ended["reason"] == "finished"


class Demo:
    """Runs stages in order and remembers which are complete."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.record_file = out / "stages.json"
        self.record: dict[str, Any] = {}
        if self.record_file.is_file():
            try:
                self.record = json.loads(self.record_file.read_text(encoding="utf-8"))
            except ValueError:
                self.record = {}  # half a file of a killed run: everything is checked again
        self.table: list[tuple[str, float, str]] = []
        self.fresh = False  # from the first stage that had to run, all later ones run too

    def check_source(self, corpus: Path) -> None:
        """Refuse a folder whose results come from other videos. Raises UserError."""
        digest = sha256(corpus)
        if self.record.setdefault("corpus", digest) != digest:
            raise UserError(
                f"{self.out}: holds a demo of other videos (or they have changed); choose another folder, as in "
                "make demo OUT=runs/other, or delete this one"
            )
        write_json(self.record_file, self.record)

    def run(self, stage: Stage, always: bool = False) -> None:
        """Run a stage unless it is complete. Raises UserError when its program fails or was stopped."""
        done = self.record.get(stage.name, {})
        if not always and not self.fresh and done.get("command") == stage.command and stage.finished():
            self.table.append((stage.name, float(done["seconds"]), "reused"))
            return
        self.fresh = self.fresh or not always
        command = [str(free_port()) if word == "PORT" else word for word in stage.command]
        shown = " ".join(shlex.quote(_shorten(word)) for word in command)
        print(f"\n=== {stage.name}\n$ {shown}", flush=True)
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=_environment())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the program got it as well and writes its checkpoint: wait for that
            process.wait()
            raise
        seconds = time.perf_counter() - begin
        if code or not stage.finished():
            raise UserError(f"stage '{stage.name}' did not finish (exit code {code}); run the demo again to go on")
        self.record[stage.name] = {"command": stage.command, "seconds": seconds}
        write_json(self.record_file, self.record)
        self.table.append((stage.name, seconds, ""))


def stages_of_videos(out: Path, videos: Path | None) -> list[Stage]:
    """From nothing, or a folder of videos, to a list of the usable ones."""
    python, corpus = sys.executable, out / "corpus.jsonl"
    stages = []
    source = videos
    if source is None:
        source = out / "videos"
        made = source / "settings.json"
        make = [python, "-m", "data_tools.make_demo_corpus", "--out", str(source), "--num_videos", str(CLIPS)]
        stages.append(Stage("make videos", make, made))
    scan = [python, "-m", "data_tools.scan_videos", str(source), "--out", str(corpus)]
    scan += ["--validation_fraction", HELD_OUT]
    return [*stages, Stage("scan videos", scan, corpus)]


def stages_before_training(out: Path) -> list[Stage]:
    """From the corpus to latent shards."""
    python, corpus = sys.executable, out / "corpus.jsonl"
    shard = [python, "-m", "data_tools.shard_videos", "--corpus", str(corpus), "--size", str(SIZE)]
    shard += ["--shard_mb", "4"]  # several shards, so that every core has one to write
    # Two processes with a thread each are faster than one with two: the frames are small.
    launcher = [str(Path(python).with_name("torchrun")), "--nproc_per_node", str(num_ranks()), "--master_port", "PORT"]
    vae = [*launcher, "launch/train_vae.py", "--config", "arvae_tiny", "--train.micro_batch_size", "8"]
    vae += ["--train.phases", SHORT, "--data.crop_scale", "1", "--data.flip_probability", "0"]
    extract = [python, "-m", "data_tools.extract_latents", "--corpus", str(corpus)]
    return [
        Stage("frame shards", [*shard, "--out", str(out / "frames")], out / "frames" / "manifest.json"),
        Stage(
            "train AR-VAE",
            [*vae, "--data.shards", str(out / "frames"), "--run_dir", str(out / "arvae")],
            out / "arvae" / "exit.json",
        ),
        Stage(
            "extract latents",
            [*extract, "--arvae", str(out / "arvae"), "--out", str(out / "latents")],
            out / "latents" / "manifest.json",
        ),
    ]


def stages_from_training(out: Path, num_classes: int) -> list[Stage]:
    """From latent shards to samples and their measure."""
    python, run = sys.executable, out / "dit"
    ds_config = "ds_configs/zero2.json" if torch.cuda.is_available() else "ds_configs/zero2_cpu.json"
    launcher = [str(Path(python).with_name("deepspeed")), "--num_gpus", str(num_ranks())]
    train = [*launcher, "--master_port", "PORT", "launch/train.py", "--config", "tiny", "--ds_config", ds_config]
    guidance = ["--guidance", "1.5"] if num_classes else []
    data = ["--data", str(out / "latents" / "validation"), "--train_data", str(out / "latents")]
    return [
        Stage(
            "train DiT",
            [
                *train,
                *("--data.shards", str(out / "latents"), "--run_dir", str(run)),
                *("--model.num_classes", str(num_classes)),
            ],
            run / "exit.json",
        ),
        Stage(
            "sample",
            [
                *(python, "launch/sample.py", "--run", str(run), *guidance),
                *("--num_videos", str(VIDEOS), "--num_frames", str(FRAMES), "--out", str(out / "samples")),
            ],
            out / "samples" / "contact_sheet.png",
        ),
        Stage(
            "evaluate",
            [
                *(python, "launch/evaluate.py", "--run", str(run), "--guidance", "1", *data),
                *("--num_videos", "32", "--seed", "1", "--out", str(out / "evaluation.json")),
            ],
            out / "evaluation.json",
        ),
    ]


def num_ranks() -> int:
    """Two, on CPUs as well; one where there is a single GPU."""
    return min(2, torch.cuda.device_count() or 2)


def _environment() -> dict[str, str]:
    """What the programs of the pipeline see: this interpreter's folder first, output at once."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "DS_ACCELERATOR": accelerator, "PATH": path, "PYTHONUNBUFFERED": "1"}


def _shorten(word: str) -> str:
    """Paths inside the clone as one would type them there."""
    path = Path(word)
    if path.is_absolute() and path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return word


def losses(run: Path) -> tuple[float, float]:
    """Loss of the first report of a run, and the mean over the last tenth (single batches are noisy)."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    values = [float(json.loads(line)["loss"]) for line in lines]
    last = values[-max(1, len(values) // 10) :]
    return values[0], sum(last) / len(last)


def held_out_losses(run: Path) -> list[float]:
    """Losses of a run on held-out videos, in the order of the steps."""
    found = (json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines())
    return [float(line[HELD_OUT_LOSS]) for line in found if HELD_OUT_LOSS in line]


def summary(demo: Demo, num_videos: int) -> str:
    """What was made, the losses, the distances, and how to look at it."""
    out = demo.out
    lines = ["", "stage                seconds"]
    lines += [f"{name:18s} {seconds:8.1f}  {note}".rstrip() for name, seconds, note in demo.table]
    spent = sum(seconds for _, seconds, note in demo.table if not note)
    lines += [f"{'this run':18s} {spent:8.1f}", ""]
    lines += [f"made {VIDEOS} videos of {FRAMES} frames from {num_videos} training videos:"]
    lines += [f"  {_shorten(str(out / 'samples'))}/video_*.mp4 and contact_sheet.png (a row per video)", ""]
    for what, run in (("AR-VAE", out / "arvae"), ("DiT", out / "dit")):
        first, last = losses(run)
        lines.append(f"{what:7s} loss {first:.4f} -> {last:.4f} ({first / last:.1f} times smaller)")
    held_out = held_out_losses(out / "dit")
    lines += [f"{'':7s} loss {held_out[0]:.4f} -> {held_out[-1]:.4f} on held-out videos"] if held_out else []
    distances = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["frechet"]
    lines += ["", "Frechet distance to held-out latents (smaller is better):"]
    lines += [f"  {name:18s} {distance:10.4f}" for name, distance in distances.items()]
    lines += [f"  samples are {distances['noise'] / distances['samples']:.1f} times closer than noise"]
    lines += ["", f"look at the training: .venv/bin/tensorboard --logdir {_shorten(str(out))}"]
    return "\n".join(lines)


def main() -> int:
    """The program."""
    example = "python launch/demo.py --out runs/demo --videos clips"
    parser = cli.parser("Run the whole system on a small scale.", example)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", metavar="DIR")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="a folder of videos (default: procedural clips)")
    options = parser.parse_args()
    if options.videos is not None and not options.videos.exists():
        raise UserError(f"--videos {options.videos}: no such folder")
    demo = Demo(options.out.resolve())
    *making, scan = stages_of_videos(demo.out, options.videos.resolve() if options.videos else None)
    for stage in making:
        demo.run(stage)
    demo.run(scan, always=True)  # quick for known files, and finds new ones
    demo.check_source(demo.out / "corpus.jsonl")
    corpus = read_corpus(demo.out / "corpus.jsonl")
    splits = {entry.split for entry in corpus if entry.ok}
    if splits != {"train", "validation"}:
        raise UserError(f"{options.videos}: at least 2 usable videos are needed, one of them to be held out")
    for stage in stages_before_training(demo.out):
        demo.run(stage)
    found = classes(corpus)
    for stage in stages_from_training(demo.out, len(found) if len(found) > 1 else 0):
        demo.run(stage)
    print(summary(demo, sum(entry.ok and entry.split == "train" for entry in corpus)))
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
