"""A profile as one picture: where a step goes, the sweep, the model of scaling."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ardiff.profiling.timeline import PARTS

WIDTH, HEIGHT, EDGE = 1400, 1220, 70
BAR = (172, 252)  # from top to bottom
INK, FAINT, PAPER = (34, 34, 34), (205, 205, 205), (255, 255, 255)
COLOURS = dict(
    zip(
        PARTS,
        (
            (230, 159, 0),  # data wait; the colours of Okabe and Ito, told apart by everybody, and two greys
            (170, 170, 170),
            (86, 180, 233),
            (0, 114, 178),
            (213, 94, 0),
            (0, 158, 115),
            (204, 121, 167),
            (120, 190, 90),
            (240, 228, 66),
            (110, 110, 110),
        ),
        strict=True,
    )
)
LINES = ((0, 114, 178), (213, 94, 0))


class _Sheet:
    """A picture with text of several sizes."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self._fonts: dict[int, Any] = {}

    def font(self, size: int) -> Any:
        """The font that comes with Pillow."""
        if size not in self._fonts:
            try:
                self._fonts[size] = ImageFont.load_default(size)
            except TypeError:  # Pillow 10.0 has one size only
                self._fonts[size] = ImageFont.load_default()
        return self._fonts[size]

    def text(self, at: tuple[float, float], words: str, size: int = 20, anchor: str = "la", fill: Any = INK) -> None:
        """Words at a place; anchor as in Pillow."""
        self.draw.text(at, words, font=self.font(size), anchor=anchor, fill=fill)

    def width(self, words: str, size: int) -> float:
        """Pixels."""
        return self.draw.textlength(words, font=self.font(size))

    def turned(self, at: tuple[float, float], words: str, size: int = 20) -> None:
        """Words from bottom to top, their middle at a place."""
        length = int(self.width(words, size)) + 4
        strip = Image.new("RGB", (length, size + 8), PAPER)
        ImageDraw.Draw(strip).text((2, 2), words, font=self.font(size), fill=INK)
        strip = strip.rotate(90, expand=True)
        self.image.paste(strip, (int(at[0]) - strip.width // 2, int(at[1]) - strip.height // 2))


def picture(profile: dict[str, Any]) -> Image.Image:
    """The whole profile, 1400 x 1220 pixels."""
    sheet = _Sheet()
    machine, setting, rates = profile["machine"], profile["setting"], profile["rates"]
    sheet.text((EDGE, 24), "Training throughput", 34)
    mfu = f", MFU {rates['mfu']:.1%}" if rates["mfu"] else ""
    sheet.text(
        (EDGE, 68),
        f"{machine['ranks']} x {machine['device']}, {setting['model']['parameters'] / 1e6:.1f} M parameters, "
        f"{setting['precision']}, ZeRO-{setting['zero_stage']}: {rates['clips_per_s']:.1f} clips/s, "
        f"{rates['tflops_per_device']:.3g} TFLOP/s per device{mfu}",
        21,
    )
    _breakdown(sheet, profile["step"], (EDGE, 128, WIDTH - EDGE, 400))
    _sweep(sheet, profile["sweep"], (EDGE + 60, 430, WIDTH - EDGE, 740))
    _scaling(sheet, profile["scaling"], (EDGE + 60, 860, WIDTH - EDGE, 1140))
    return sheet.image


def _breakdown(sheet: _Sheet, step: dict[str, Any], box: tuple[int, int, int, int]) -> None:
    left, top, right, _ = box
    parts, total = {name: step["parts_ms"][name] for name in PARTS}, step["parts_ms_sum"]
    sheet.text((left, top), f"A step by part: {total:.1f} ms", 24)
    bar_top, bar_bottom = BAR
    position = float(left)
    for name, ms in parts.items():
        wide = (right - left) * ms / total
        sheet.draw.rectangle((position, bar_top, position + wide, bar_bottom), fill=COLOURS[name])
        label = f"{ms / total:.0%}"
        if wide > sheet.width(label, 20) + 10:
            dark = sum(COLOURS[name]) < 420
            middle = (position + wide / 2, (bar_top + bar_bottom) / 2)
            sheet.text(middle, label, 20, "mm", PAPER if dark else INK)
        position += wide
    unit = _nice(total / 8)
    for tick in range(int(total / unit) + 1):
        x = left + (right - left) * tick * unit / total
        sheet.draw.line((x, bar_bottom, x, bar_bottom + 7), fill=INK)
        if x < right - 150:
            sheet.text((x, bar_bottom + 10), f"{tick * unit:g}", 18, "ma")
    sheet.text((right, bar_bottom + 10), "milliseconds", 18, "ra")
    for number, (name, ms) in enumerate(parts.items()):
        x, y = left + (number % 5) * (right - left) / 5, bar_bottom + 48 + 34 * (number // 5)
        sheet.draw.rectangle((x, y, x + 18, y + 18), fill=COLOURS[name])
        sheet.text((x + 26, y - 3), f"{name} {ms:.3g} ms", 19)


def _sweep(sheet: _Sheet, sweep: dict[str, Any], box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = map(float, box)
    sheet.text((EDGE, top - 20), "Sweep: clips/s by micro-batch", 24)
    found = sweep["candidates"]
    if not found:
        sheet.text(((left + right) / 2, (top + bottom) / 2), "not swept", 22, "mm")
        return
    sizes = sorted({one["micro_batch_size"] for one in found})
    modes = sorted({one["activation_checkpointing"] for one in found})
    for mode in modes:
        x = right - 330 * (len(modes) - modes.index(mode)) + 30
        sheet.draw.rectangle((x, top - 14, x + 18, top + 4), fill=LINES[int(mode)])
        sheet.text((x + 26, top - 17), f"activation checkpointing {'on' if mode else 'off'}", 19)
    top += 40
    greatest = max((one["clips_per_s"] or 0.0 for one in found), default=0.0) or 1.0
    limit = _axes(sheet, (left, top, right, bottom), greatest, "clips/s")
    room = (right - left) / len(sizes)
    wide = min(90.0, room * 0.8 / len(modes))
    for place, size in enumerate(sizes):
        middle = left + room * (place + 0.5)
        sheet.text((middle, bottom + 8), str(size), 20, "ma")
        for one in (one for one in found if one["micro_batch_size"] == size):
            number = modes.index(one["activation_checkpointing"])
            x = middle + wide * (number - len(modes) / 2)
            rate = one["clips_per_s"]
            if rate is None:
                words = "no memory" if "memory" in one["note"] else "left out"
                sheet.text((x + wide / 2, bottom - 6), words, 15, "ms", (150, 0, 0))
                continue
            height = (bottom - top) * rate / limit
            sheet.draw.rectangle(
                (x + 3, bottom - height, x + wide - 3, bottom), fill=LINES[int(one["activation_checkpointing"])]
            )
            is_best = one == sweep["best"]
            sheet.text((x + wide / 2, bottom - height - 4), f"{rate:.3g}" + (" best" if is_best else ""), 17, "ms")
    sheet.text(((left + right) / 2, bottom + 34), "micro-batch (clips)", 20, "ma")


def _scaling(sheet: _Sheet, scaling: dict[str, Any], box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = map(float, box)
    sheet.text((EDGE, top - 20), "Scaling by the model: clips/s per GPU", 24)
    curves = {"weak": "as many clips per GPU", "strong": "the same global batch"}
    drawn = [name for name in curves if scaling[name]]
    if not drawn:
        sheet.text(((left + right) / 2, (top + bottom) / 2), "no numbers of GPUs asked for", 22, "mm")
        return
    for number, name in enumerate(drawn):
        x = right - 290 * (len(drawn) - number) + 20
        sheet.draw.line((x, top - 4, x + 24, top - 4), fill=LINES[number], width=4)
        sheet.text((x + 32, top - 17), curves[name], 19)
    top += 40
    bases = dict.fromkeys(scaling[name][0]["ranks"] for name in drawn)  # the curves may begin at different numbers
    share = f"share of that on {', '.join(map(str, bases))}"
    limit = _axes(sheet, (left, top, right, bottom), 1.0, share, percent=True)
    numbers = sorted({one["ranks"] for name in drawn for one in scaling[name]})
    low, high = math.log2(numbers[0]), math.log2(max(numbers[-1], 2 * numbers[0]))

    def at(ranks: int, share: float) -> tuple[float, float]:
        along = (math.log2(ranks) - low) / (high - low)
        return left + 40 + (right - left - 80) * along, bottom - (bottom - top) * min(share, limit) / limit

    for ranks in numbers:
        x, _ = at(ranks, 0.0)
        sheet.draw.line((x, bottom, x, bottom + 6), fill=INK)
        sheet.text((x, bottom + 8), str(ranks), 20, "ma")
    for number, name in enumerate(drawn):
        points = [at(one["ranks"], one["efficiency"]) for one in scaling[name]]
        sheet.draw.line(points, fill=LINES[number], width=4)
        for (x, y), one in zip(points, scaling[name], strict=True):
            sheet.draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=LINES[number])
            above = number == 0
            words = f"{one['efficiency']:.1%}"
            sheet.text((x, y - 12 if above else y + 12), words, 17, "ms" if above else "ma", LINES[number])
    sheet.text(((left + right) / 2, bottom + 34), "GPUs", 20, "ma")


def _axes(
    sheet: _Sheet, box: tuple[float, float, float, float], greatest: float, name: str, percent: bool = False
) -> float:
    """The frame of a diagram whose values begin at 0; returns the value at its top."""
    left, top, right, bottom = box
    unit = 0.25 if percent else _nice(greatest / 4)
    limit = max(1, math.ceil(greatest * 1.1 / unit)) * unit
    for tick in range(round(limit / unit) + 1):
        y = bottom - (bottom - top) * tick * unit / limit
        sheet.draw.line((left, y, right, y), fill=INK if tick == 0 else FAINT)
        sheet.text((left - 10, y), f"{tick * unit:.0%}" if percent else f"{tick * unit:g}", 18, "rm")
    sheet.draw.line((left, top, left, bottom), fill=INK)
    sheet.turned((left - 88, (top + bottom) / 2), name)
    return limit


def _nice(about: float) -> float:
    """1, 2 or 5 times a power of ten, at least `about`."""
    power = 10.0 ** math.floor(math.log10(max(about, 1e-9)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= about * 0.999)
