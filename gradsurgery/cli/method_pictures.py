"""Drawings of what methods do: their direction between conflicting gradients, and their paths on toy problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor

from gradsurgery.cli import catalogue
from gradsurgery.problems import Problem
from gradsurgery.watch.pictures import DARK, LIGHT, Palette, style
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.igb import IGBWeighter
from gradsurgery.weighting.ntk import NTKWeighter

#: What every method is drawn on: two gradients of different length that oppose each other, and three of which two
#: oppose the longest. The plain sum makes the shortest gradient's loss rise in both.
EXAMPLES = (
    np.array([[2.0, 0.35], [-0.85, 0.5]]),
    np.array([[2.2, 0.0], [-0.3, 1.05], [-0.7, 0.4]]),
)
#: Values of the losses, for the methods that read them.
LOSSES = (1.0, 2.0, 1.5)
#: What becomes of them in the run that a weighting is drawn after: so many steps, ten to an epoch, in which each falls
#: evenly to this share of its value, while the gradients stay what they are.
STEPS, EPOCH, LEFT = 60, 10, (0.1, 0.9, 0.5)
#: Half the width of the frame.
REACH = 2.6
#: Longer arrows are shortened, and say by how much.
LONGEST = 2.05


def direction(name: str, rows: np.ndarray) -> np.ndarray | None:
    """What a method gives for some gradients: minus the update of SGD at a learning rate of 1.

    The gradients are those of linear losses of one parameter, so that every method sees what it asks for. A surgery is
    asked in its first step, a weighting in the last step of a short run.

    Args:
        name: The method, or "plain sum".
        rows: Gradients, (m, n).

    Returns:
        (n,), or None if the method needs something that linear losses do not have.
    """
    if name == catalogue.SUM:
        return rows.sum(axis=0)
    if catalogue.find(name).kind == "weighting":
        return weights_after_a_run(name, rows) @ rows
    theta = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    base = torch.optim.SGD([theta], lr=1.0)
    try:
        optimizer = catalogue.built(name, base, len(rows))
        optimizer.backward(_linear(theta, rows, LOSSES))
        optimizer.step()
    except (ValueError, TypeError, RuntimeError):
        return None
    return -theta.detach().numpy()


def weights_after_a_run(name: str, rows: np.ndarray) -> np.ndarray:
    """The weights that a weighting has after losses have fallen at different paces, their gradients staying the same.

    Args:
        name: The method.
        rows: Gradients, (m, n), m at most 3.

    Returns:
        (m,).
    """
    theta = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    optimizer = catalogue.built(name, torch.optim.SGD([theta], lr=0.1), len(rows))
    weights: dict[str, float] | None = None
    for step in range(STEPS):
        values = [value * left ** (step / (STEPS - 1)) for value, left in zip(LOSSES, LEFT, strict=True)]
        losses = _linear(theta, rows, values)
        more: dict[str, Any] = {}
        if isinstance(optimizer, NTKWeighter):
            more["residuals"] = {key: (loss - loss.detach())[None] for key, loss in losses.items()}
        optimizer.zero_grad()
        weights = optimizer.backward(losses, **more).weights
        optimizer.step()
        with torch.no_grad():
            theta.zero_()
        if isinstance(optimizer, (DWAWeighter, IGBWeighter)) and (step + 1) % EPOCH == 0:
            optimizer.epoch_end()
    assert weights is not None
    return np.array(list(weights.values()))


def _linear(theta: Tensor, rows: np.ndarray, values: Sequence[float]) -> dict[str, Tensor]:
    """Losses with these gradients and, at theta = 0, these values."""
    return {
        f"l{i + 1}": (torch.from_numpy(row) * theta).sum() + value
        for i, (row, value) in enumerate(zip(rows, values, strict=False))
    }


def draw(name: str, path: str | Path | None = None, *, dark: bool = False) -> Figure:
    """Draw a method's direction for two and for three gradients, in the same frame for every method.

    A surgery is drawn in its first step, a weighting after a run in which losses fall at different paces.

    Args:
        name: The method.
        path: A file to save to, or None.
        dark: Light lines on dark paper.

    Returns:
        The figure.
    """
    with style(DARK if dark else LIGHT) as palette:
        figure = Figure(figsize=(5.0, 1.62))
        for axes, rows in zip(figure.subplots(1, 2), EXAMPLES, strict=True):
            _fan(axes, name, rows, palette)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=0.99, wspace=0)
        if path is not None:
            figure.savefig(path)
    return figure


def _fan(axes: Axes, name: str, rows: np.ndarray, palette: Palette) -> None:
    axes.set(xlim=(-REACH, REACH), ylim=(-0.62, 2.45), aspect="equal")
    axes.set_axis_off()
    axes.text(-REACH + 0.1, 2.4, f"{('two', 'three')[len(rows) - 2]} gradients", color=palette.grey, va="top")
    # Descent along d lowers all losses where ⟨gᵢ, d⟩ ≥ 0 for all i: between the perpendiculars of the outermost rows.
    angles = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    low, high = angles.max() - 90, angles.min() + 90
    axes.add_patch(Wedge((0, 0), 2.15, low, high, color=palette.diverging[2], alpha=0.16, lw=0))
    middle = math.radians((low + high) / 2)
    axes.text(
        2.3 * math.cos(middle), 2.3 * math.sin(middle), "all losses fall", color=palette.diverging[2], fontsize=7.5,
        ha="center", va="center",
    )  # fmt: skip
    found = direction(name, rows)
    length = 0.0 if found is None else float(np.linalg.norm(found))
    for i, row in enumerate(rows):
        # To first order: a step along the direction changes loss i by −⟨gᵢ, d⟩.
        rises = found is not None and float(row @ found) < -1e-9 * length * float(np.linalg.norm(row))
        colour = palette.diverging[0] if rises else palette.grey
        _arrow(axes, row, colour, 1.6)
        _name(axes, row, found, f"g{'₁₂₃'[i]}" + (": loss rises" if rises else ""), colour)
    total = rows.sum(axis=0)
    axes.plot([0, total[0]], [0, total[1]], color=palette.ink, lw=1.0, ls=(0, (2, 2)))
    axes.plot(*total, "o", color=palette.paper, mec=palette.ink, ms=4, mew=1.0)
    axes.text(total[0] + 0.1, total[1] + 0.06, "sum", color=palette.ink, fontsize=8, va="bottom")
    said: dict[str, Any] = {
        "color": palette.lines[0],
        "ha": "center",
        "va": "center",
        "fontweight": "bold",
        "fontsize": 9,
    }
    if found is None:
        axes.text(0, -0.43, f"{name} needs more than these gradients", color=palette.grey, ha="center", va="center")
        return
    if length < 1e-9:
        axes.plot(0, 0, "o", color=palette.lines[0], ms=8)
        axes.text(0, -0.43, f"{name}: zero", **said)
        return
    shrunk = max(1.0, length / LONGEST)
    _arrow(axes, found / shrunk, palette.lines[0], 2.6)
    if name != catalogue.SUM and catalogue.find(name).kind == "weighting":
        axes.text(0, -0.43, _sum(weights_after_a_run(name, rows), shrunk), **{**said, "fontsize": 7.5})
        return
    note = " is the sum here" if np.allclose(found, total) else f", {shrunk:.1f} times as long" if shrunk > 1 else ""
    axes.text(0, -0.43, name + note, **said)


def _sum(weights: np.ndarray, shrunk: float) -> str:
    """The weighted sum of gradients in symbols, and by what its arrow was divided."""
    if np.allclose(weights, 1.0):
        return "all weights are 1: the sum"
    terms = " + ".join(f"{round(float(w), 2 if abs(w) < 10 else 1):g} g{'₁₂₃'[i]}" for i, w in enumerate(weights))
    return terms.replace("+ -", "− ").replace("-", "−") + (f", ÷ {shrunk:.1f}" if shrunk > 1.05 else "")


def _arrow(axes: Axes, tip: np.ndarray, colour: str, width: float) -> None:
    axes.annotate(
        "", tuple(tip.tolist()), (0, 0), annotation_clip=False,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip


def _name(axes: Axes, tip: np.ndarray, found: np.ndarray | None, label: str, colour: str) -> None:
    length = np.linalg.norm(tip)
    x, y = tip * (1 + 0.2 / length)
    reach = 0.0 if found is None else float(np.linalg.norm(found))
    if found is not None and found @ tip > 0.97 * reach * length and min(reach, LONGEST) > length:
        # The method's arrow goes through there, or nearly: beside the tip, on the other side.
        side = -np.sign(tip[0] * found[1] - tip[1] * found[0]) or 1.0
        x, y = tip + side * 0.25 * np.array([-tip[1], tip[0]]) / length
    if len(label) > 3 and x > 1.9:
        x, y, across = REACH - 0.05, y + 0.24, "right"  # above the tip: the frame ends beside it
    else:
        across = "center" if len(label) < 4 else "right" if x < 0 else "left"
    axes.text(x, y, label, color=colour, ha=across, va="center", fontsize=9 if len(label) < 4 else 8)


def draw_paths(problem: Problem, paths: Mapping[str, Sequence[Tensor]], path: Path, *, dark: bool = False) -> Figure:
    """Draw where methods walk on a problem in the plane, and where that is among the losses.

    Args:
        problem: The problem; of more than two coordinates the first two are drawn.
        paths: For each method its paths, (steps + 1, n).
        path: A file to save to.
        dark: Light lines on dark paper.

    Returns:
        The figure.
    """
    with style(DARK if dark else LIGHT) as palette:
        across = min(3, len(paths) + 1) if len(paths) < 9 else 6
        down = -(-(len(paths) + 1) // across)
        figure = Figure(figsize=(0.3 + 2.75 * across, 2.8 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        frame = problem.frame or (-1.5, 1.5, -1.5, 1.5)
        front = torch.stack(problem.losses(problem.pareto_set()), dim=-1).numpy()
        last = panels[len(paths)]
        last.plot(*front.T, color=palette.grey, alpha=0.45, lw=5, solid_capstyle="round")
        for panel, (name, own), colour in zip(panels, paths.items(), cycle(palette.lines), strict=False):
            _landscape(panel, problem, frame, palette)
            for walk in own:
                panel.plot(*walk[:, :2].numpy().T, color=colour, lw=1.3)
                panel.plot(*walk[0, :2].numpy(), "o", color=palette.paper, mec=palette.ink, mew=1.0, ms=4.5)
                panel.plot(*walk[-1, :2].numpy(), "o", color=colour, mec=palette.paper, mew=0.7, ms=6, zorder=5)
                values = torch.stack(problem.losses(walk[-1])).numpy()
                last.plot(*values, "o", color=colour, mec=palette.paper, mew=0.7, ms=6, zorder=3, alpha=0.9)
            panel.set(xlim=frame[:2], ylim=frame[2:])
            panel.set_title(name, color=colour)
        low, high = front.min(axis=0), front.max(axis=0)
        room = 4 * np.where(high > low, high - low, 1.0)  # one method that diverges would make a point of the front
        ends = np.array([[float(loss) for loss in problem.losses(walk[-1])] for own in paths.values() for walk in own])
        outside = int((~(ends <= high + room).all(axis=1)).sum())
        top = np.minimum(np.fmax(high, np.where(np.isfinite(ends), ends, high).max(axis=0)), high + room)
        last.set(
            xlim=(low[0] - 0.05 * (top - low)[0], low[0] + 1.05 * (top - low)[0]),
            ylim=(low[1] - 0.05 * (top - low)[1], low[1] + 1.05 * (top - low)[1]),
        )
        last.set_title("losses at the ends" + (f", {outside} beyond" if outside else ""))
        last.set_xlabel("loss 1 (grey: Pareto front)", labelpad=1)
        last.set_ylabel("loss 2", labelpad=1)
        for panel in panels[len(paths) + 1 :]:
            panel.set_visible(False)
        figure.savefig(path)
    return figure


def _landscape(axes: Axes, problem: Problem, frame: Sequence[float], palette: Palette) -> None:
    x, y = np.meshgrid(np.linspace(frame[0], frame[1], 241), np.linspace(frame[2], frame[3], 241))
    if problem.frame is not None:
        values = sum(problem.losses(torch.from_numpy(np.stack([x, y], axis=-1)))).numpy()  # type: ignore[union-attr]
        axes.contour(x, y, values, levels=14, colors=palette.faint, linewidths=0.7, linestyles="solid")
    points = problem.pareto_set()[:, :2].numpy()
    axes.plot(*points.T, color=palette.grey, alpha=0.45, lw=5, solid_capstyle="round")
