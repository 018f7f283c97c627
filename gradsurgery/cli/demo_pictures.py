"""The pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gradsurgery.problems.digits import PIXELS, Scenes
from gradsurgery.watch.pictures import COLOURS, LIGHT, smooth, spread_out, style

if TYPE_CHECKING:
    from gradsurgery.cli.demo import Row, Settings

_GREY, _FAINT = LIGHT.grey, LIGHT.faint
_POINTS: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": _GREY}


def draw(table: Sequence[Row], scenes: Scenes, settings: Settings, folder: Path) -> None:
    """Draw the pictures: losses.png, cosines.png and predictions.png.

    Args:
        table: The rows of the table.
        scenes: The test images that the predictions belong to.
        settings: What the trainings had in common.
        folder: An existing folder.
    """
    with style():
        for name, figure in (
            ("losses", _losses(table)),
            ("cosines", _cosines(table, settings)),
            ("predictions", _predictions(table, scenes)),
        ):
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def _colours(table: Sequence[Row]) -> list[str]:
    return [COLOURS[position % len(COLOURS)] for position in range(len(table))]


def _losses(table: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(8.6, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = []
    for row in table:
        losses = np.stack([run.losses.numpy() for run in row.runs]).mean(axis=0)
        curves.append(smooth(losses, max(1, len(losses) // 32)))
    _lines(left, [curve[:, 0] for curve in curves], table, low=0.0, high=2.6)
    left.set_title("Which digit: cross-entropy")
    left.axhline(np.log(10), color=_GREY, lw=0.8, ls=(0, (1, 2)), zorder=0)
    left.annotate("guessing", (1, np.log(10)), (-2, 3), **_POINTS, xycoords=left.get_yaxis_transform(), ha="right")
    boxes = [np.log10(curve[:, 1]) for curve in curves]
    low, high = min(curve.min() for curve in boxes) - 0.1, max(curve.max() for curve in boxes) + 0.1
    _lines(right, boxes, table, low, high)
    right.set_title("Where: squared error, square pixels")
    powers = np.arange(np.floor(low), np.ceil(high) + 1)
    major = [power for power in powers if low <= power <= high]
    minor = [power + np.log10(digit) for power in powers for digit in range(2, 10)]
    right.set_yticks(major, [f"10{_superscript(int(power))}" for power in major])
    right.set_yticks([place for place in minor if low <= place <= high], minor=True)
    return figure


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def _lines(axes: Axes, curves: Sequence[np.ndarray], table: Sequence[Row], low: float, high: float) -> None:
    steps = len(curves[0])
    for curve, colour in zip(curves, _colours(table), strict=True):
        axes.plot(np.arange(1, steps + 1), curve, color=colour, lw=1.4)
    places = spread_out([curve[-1] for curve in curves], 0.065 * (high - low), low, high)
    for place, curve, row, colour in zip(places, curves, table, _colours(table), strict=True):
        axes.plot([steps, 1.05 * steps], [curve[-1], place], color=colour, lw=0.7, clip_on=False)
        axes.text(1.06 * steps, place, row.name, color=colour, va="center", fontsize=8)
    axes.set_xlim(0, steps)
    axes.set_ylim(low, high)
    axes.set_xlabel("training step")


def _cosines(table: Sequence[Row], settings: Settings) -> Figure:
    across = min(4, len(table))
    down = -(-len(table) // across)
    figure = Figure(figsize=(8.6, 0.7 + 1.7 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, row, colour in zip(panels, table, _colours(table), strict=False):
        cosines = np.stack([run.cosines.numpy() for run in row.runs])
        steps = settings.probe_every * np.arange(cosines.shape[1])
        panel.axhspan(-1, 0, color=_FAINT, alpha=0.5, lw=0)
        panel.plot(steps, cosines.T, ".", color=colour, ms=2.5, alpha=0.45, mew=0)
        panel.plot(steps, smooth(cosines.mean(axis=0), max(1, len(steps) // 8)), color=colour, lw=1.6)
        panel.set_title(row.name, color=colour)
        panel.text(0.97, 0.05, f"conflict {row.conflict_rate:.0%}", transform=panel.transAxes, ha="right", fontsize=8)
        panel.set_xlim(0, settings.steps)
        panel.set_xticks([0, settings.steps // 2, settings.steps])
        panel.set_ylim(-0.5, 0.5)
        panel.set_yticks([-0.4, 0, 0.4])
    for panel in panels[len(table) :]:
        panel.set_visible(False)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("cosine of the two gradients", fontsize=9)
    return figure


def _predictions(table: Sequence[Row], scenes: Scenes) -> Figure:
    count = 7
    height = 0.97 * len(table) + 0.3
    figure = Figure(figsize=(8.6, height))
    panels = figure.subplots(len(table), count, squeeze=False)
    figure.subplots_adjust(left=0.2, right=0.995, top=1 - 0.04 / height, bottom=0.26 / height, wspace=0.04, hspace=0.04)
    figure.text(
        0.2, 0.07 / height, "The first test images. Dashed: the true box. Black tag: the digit is read wrong.",
        fontsize=8, color=_GREY,
    )  # fmt: skip
    for line, row, colour in zip(panels, table, _colours(table), strict=True):
        run = row.runs[0]
        for number, axes in enumerate(line):
            axes.imshow(scenes.images[number, 0].numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, PIXELS, PIXELS, 0))
            _box(axes, scenes.boxes[number].tolist(), color="white", lw=1.0, ls=(0, (2, 2)))
            _box(axes, run.boxes[number].tolist(), color=colour, lw=1.6)
            read, true = int(run.digits[number]), int(scenes.labels[number])
            x, y = _free_corner(scenes.boxes[number].tolist())
            axes.text(
                0.04 + 0.92 * x, 0.96 - 0.92 * y, f"{read}" if read == true else f"{read}?", transform=axes.transAxes,
                ha="right" if x else "left", va="bottom" if y else "top", fontsize=9, fontweight="bold", color="white",
                bbox={"fc": colour if read == true else "black", "ec": colour, "pad": 1.6},
            )  # fmt: skip
            axes.set_axis_off()
        mean = row.mean
        line[0].text(
            -0.08, 0.62, row.name, transform=line[0].transAxes, ha="right", color=colour, fontweight="bold"
        )  # fmt: skip
        line[0].text(
            -0.08, 0.3, f"digit right {mean.accuracy:.0%}\nbox IoU {mean.iou:.0%}", transform=line[0].transAxes,
            ha="right", va="center", fontsize=8, linespacing=1.3,
        )  # fmt: skip
    return figure


def _box(axes: Axes, box: Sequence[float], **style: object) -> None:
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))  # type: ignore[arg-type]


def _free_corner(box: Sequence[float]) -> tuple[int, int]:
    """The corner of the image that is farthest from a box: 0 for left and top, 1 for right and bottom."""
    left, top, right, bottom = box
    return int(left + right < PIXELS), int(top + bottom < PIXELS)
