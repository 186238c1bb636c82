"""Make small videos of simple motions, in one folder per class, to try every other program on.

    python -m data_tools.make_demo_corpus --out demo/videos

Anti-aliased shapes in a few colours move smoothly before a plain gradient. Each motion has a period or a
constant speed, so two or three frames tell how it goes on. A clip depends on the seed and its number only.
Started again, the program keeps the clips that are complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ardiff import cli
from ardiff.errors import UserError
from ardiff.files import remove_leftovers
from ardiff.video import VideoError, check, write_mp4
from data_tools.common import alone, claim_folder, output_folder, plural, require

FPS = 8
CRF = 12
SHAPE_COLORS = ((250, 220, 60), (240, 80, 70), (80, 200, 240), (240, 240, 240))
BACKGROUNDS = (((28, 38, 92), (60, 92, 150)), ((24, 74, 62), (70, 130, 96)), ((78, 34, 84), (132, 76, 110)))

# Distances to a shape's edge are in frame sides (positive outside), times in frames.
Distance = np.ndarray
Grid = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator, Grid, np.ndarray], Distance]


def bounce(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """A ball that flies straight and is thrown back by the walls."""
    radius = rng.uniform(0.17, 0.21)
    speed, angle = rng.uniform(0.06, 0.09), rng.uniform(0, 2 * np.pi)
    place = rng.uniform(0, 2, 2)[:, None] + speed * np.stack([np.cos(angle), np.sin(angle)])[:, None] * time
    x, y = radius + (1 - 2 * radius) * (1 - np.abs(1 - place % 2))
    return _disc(grid, x, y, radius)


def orbit(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """A disc on a circle around the centre."""
    turn = _phase(rng, time, 12, 18) * rng.choice((-1, 1))
    x, y = 0.5 + 0.28 * np.cos(turn), 0.5 + 0.28 * np.sin(turn)
    return _disc(grid, x, y, rng.uniform(0.16, 0.19))


def drift(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """A square that glides straight on; what leaves on one side comes in on the other."""
    half = rng.uniform(0.15, 0.19)
    speed, angle = rng.uniform(0.03, 0.05), rng.uniform(0, 2 * np.pi)
    x, y = (
        rng.uniform(0, 1) + speed * np.cos(angle) * time,
        rng.uniform(0, 1) + speed * np.sin(angle) * time,
    )
    along, down = _wrapped(grid[0] - _column(x)), _wrapped(grid[1] - _column(y))
    return np.maximum(np.abs(along), np.abs(down)) - half


def pulse(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """A ring that grows and shrinks."""
    radius = 0.26 + 0.12 * np.sin(_phase(rng, time, 10, 16))
    x, y = rng.uniform(0.44, 0.56, 2)
    return np.abs(np.hypot(grid[0] - x, grid[1] - y) - _column(radius)) - 0.065


def pendulum(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """A bob on a rod that swings from the middle of the upper edge."""
    angle = rng.uniform(0.5, 0.75) * np.sin(_phase(rng, time, 14, 20))
    x, y = 0.5 + 0.62 * np.sin(angle), 0.06 + 0.62 * np.cos(angle)
    to_x, to_y = _column(x - 0.5), _column(y - 0.06)
    from_x, from_y = grid[0] - 0.5, grid[1] - 0.06
    share = np.clip((from_x * to_x + from_y * to_y) / 0.62**2, 0, 1)  # nearest point of the rod
    rod = np.hypot(from_x - share * to_x, from_y - share * to_y) - 0.03
    return np.minimum(rod, _disc(grid, x, y, rng.uniform(0.16, 0.19)))


def stripes(rng: np.random.Generator, grid: Grid, time: np.ndarray) -> Distance:
    """Stripes that scroll across the frame."""
    angle = rng.integers(8) * np.pi / 4
    width = rng.uniform(0.36, 0.44)
    way = grid[0] * np.cos(angle) + grid[1] * np.sin(angle) - _column(rng.uniform(0.03, 0.05) * time)
    return np.abs((way + rng.uniform(0, 1)) % width - width / 2) - width / 4


CLASSES: dict[str, Draw] = {draw.__name__: draw for draw in (bounce, orbit, drift, pulse, pendulum, stripes)}


def make_clip(seed: int, number: int, size: int, num_frames: int) -> np.ndarray:
    """Clip `number` of the corpus: uint8 [num_frames, size, size, 3]; its class is CLASSES[number % 6]."""
    rng = np.random.default_rng([seed, number])
    draw = list(CLASSES.values())[number % len(CLASSES)]
    color = np.array(SHAPE_COLORS[rng.integers(len(SHAPE_COLORS))], dtype=np.float64)
    start, end = np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], dtype=np.float64)
    centres = (np.arange(size) + 0.5) / size
    grid = (centres[None, None, :], centres[None, :, None])
    distance = draw(rng, grid, np.arange(num_frames, dtype=np.float64))
    coverage = np.clip(0.5 - distance * size, 0, 1)[..., None]  # the share of a pixel that the shape covers
    background = start + (end - start) * centres[:, None, None]
    frames = background + (color - background) * coverage
    return np.broadcast_to(frames, (num_frames, size, size, 3)).round().astype(np.uint8)


def _disc(grid: Grid, x: np.ndarray, y: np.ndarray, radius: float) -> Distance:
    return np.hypot(grid[0] - _column(x), grid[1] - _column(y)) - radius


def _column(values: np.ndarray) -> np.ndarray:
    """One value per frame, to be combined with the grid of pixels."""
    return values[:, None, None]


def _phase(rng: np.random.Generator, time: np.ndarray, shortest: float, longest: float) -> np.ndarray:
    """The angle of an oscillation whose period is that many frames."""
    return 2 * np.pi * (time / rng.uniform(shortest, longest) + rng.uniform(0, 1))


def _wrapped(difference: np.ndarray) -> np.ndarray:
    """The shortest way between two places when opposite sides of the frame touch."""
    return (difference + 0.5) % 1 - 0.5


def _is_complete(path: Path, num_frames: int) -> bool:
    try:
        return path.is_file() and check(path).num_frames == num_frames
    except VideoError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = cli.parser(
        "Make small videos of simple motions in one folder per class.",
        "python -m data_tools.make_demo_corpus --out demo/videos",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the class folders")
    parser.add_argument("--num_videos", type=int, default=72, metavar="N", help="how many (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="other ones give other videos (default %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=64, metavar="N", help="side of a frame in pixels (default %(default)s)"
    )
    parser.add_argument("--num_frames", type=int, default=32, metavar="N", help="per video (default %(default)s)")
    options = parser.parse_args(arguments)
    require("--num_videos", options.num_videos, 1, 100_000)
    require("--seed", options.seed, 0)
    require("--size", options.size, 16, 1024)
    require("--num_frames", options.num_frames, 2, 10_000)
    if options.size % 2:
        raise UserError(f"--size {options.size}: must be even, as H.264 needs it")
    with alone(options.out):
        return _make(options)


def _make(options: Any) -> int:
    out = output_folder(options.out)
    for name in CLASSES:
        remove_leftovers(out / name, own=True)
    names = [f"{list(CLASSES)[number % len(CLASSES)]}/{number:05d}.mp4" for number in range(options.num_videos)]
    strangers = {str(path.relative_to(out)) for path in out.rglob("*.mp4")} - set(names)
    if strangers:
        raise UserError(
            f"--out {out}: holds videos that are not part of this corpus ({min(strangers)}); choose another --out"
        )
    settings = {"seed": options.seed, "size": options.size, "num_frames": options.num_frames}
    claim_folder(out, settings, results="**/*.mp4")
    made = 0
    for number, name in enumerate(tqdm(names, unit="videos", disable=None)):
        path = out / name
        if not _is_complete(path, options.num_frames):
            write_mp4(path, make_clip(number=number, **settings), FPS, crf=CRF)
            made += 1
    classes = min(len(names), len(CLASSES))
    print(f"{out}: {plural(len(names), 'video')} of {classes} class{'es' * (classes > 1)}, {made} newly made")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
