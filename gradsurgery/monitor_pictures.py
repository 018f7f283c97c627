"""The picture of a watched run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from gradsurgery.pictures import DARK, LIGHT, Palette, smooth, spread_out, style

if TYPE_CHECKING:
    from gradsurgery.monitor import Monitor


def draw(monitor: Monitor, path: str | Path | None, dark: bool) -> Figure:
    """Draw four panels: losses, weights, mean cosines, norms.

    Args:
        monitor: The run.
        path: A file to save to, or None.
        dark: Light lines on dark paper.

    Returns:
        The figure.
    """
    names = monitor.names
    steps = np.array(monitor.steps)
    with style(DARK if dark else LIGHT) as palette:
        figure = Figure(figsize=(8.6, 5.6), layout="constrained")
        (losses, weights), (cosines, norms) = figure.subplots(2, 2)
        for axes, title in ((losses, "Losses"), (weights, "Weights"), (norms, "Gradient norms over their mean")):
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        colours = {name: palette.lines[i % len(palette.lines)] for i, name in enumerate(names)}
        _lines(losses, steps, {name: monitor.column("loss", name) for name in names}, colours)
        _bands(weights, steps, {name: monitor.column("weight", name) for name in names}, colours, palette)
        found = {name: monitor.column("norm", name) for name in names}
        known = np.stack(list(found.values()))
        counts = (~np.isnan(known)).sum(axis=0)
        total = np.nansum(known, axis=0)
        mean = np.divide(total, counts, out=np.full(len(steps), np.nan), where=(counts > 0) & (total > 0))
        if np.isnan(mean).all():
            _absent(norms, "this method reports no gradient norms", palette)
        else:
            norms.axhline(1.0, color=palette.grey, lw=0.8, ls=(0, (1, 2)), zorder=0)
            _lines(norms, steps, {name: norm / mean for name, norm in found.items()}, colours)
        _heat(cosines, monitor.cosines, names, palette)
        if path is not None:
            figure.savefig(path)
    return figure


def _lines(axes: Axes, steps: np.ndarray, curves: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Draw a curve a task, thin as recorded and thick as a running mean, with its name at the end."""
    curves = {name: curve for name, curve in curves.items() if not np.isnan(curve).all()}
    everything = np.concatenate(list(curves.values()))
    everything = everything[~np.isnan(everything)]
    # A factor of ten between the ends is more than a linear axis shows.
    logarithmic = everything.min() > 0 and everything.max() > 10 * everything.min()
    ends = []
    for name, curve in curves.items():
        there = ~np.isnan(curve)
        axes.plot(steps[there], curve[there], color=colours[name], lw=0.6, alpha=0.4)
        mean = smooth(curve[there], max(1, int(there.sum()) // 32))
        axes.plot(steps[there], mean, color=colours[name], lw=1.6)
        ends.append(mean[-1])
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.autoscale_view()
    bounds = axes.get_ylim()
    low, high = np.log10(bounds) if logarithmic else bounds
    places = [(np.log10(end) if logarithmic else end) for end in ends]
    _name(axes, [(place - low) / (high - low) for place in places], list(curves), colours)


def _name(axes: Axes, heights: Sequence[float], names: Sequence[str], colours: dict[str, str]) -> None:
    """Write names to the right of a panel, at heights between 0 and 1, kept apart."""
    for name, height, place in zip(names, heights, spread_out(heights, 0.09, 0.02, 0.98), strict=True):
        axes.plot([1, 1.03], [height, place], color=colours[name], lw=0.7, clip_on=False, transform=axes.transAxes)
        axes.text(1.04, place, name, color=colours[name], va="center", fontsize=8, transform=axes.transAxes)


def _bands(
    axes: Axes, steps: np.ndarray, curves: dict[str, np.ndarray], colours: dict[str, str], palette: Palette
) -> None:
    """Stack the weights, or draw them as lines if one is negative."""
    known = np.stack(list(curves.values()))
    if np.isnan(known).all():
        _absent(axes, "this method has no weights", palette)
        return
    if np.nanmin(known) < 0:
        axes.axhline(0.0, color=palette.grey, lw=0.8, ls=(0, (1, 2)), zorder=0)
        _lines(axes, steps, curves, colours)
        return
    there = ~np.isnan(known).all(axis=0)
    # Without the running mean, thin bands of a method that jumps from step to step would look like noise.
    present = smooth(np.nan_to_num(known[:, there]).T, max(1, int(there.sum()) // 32)).T
    axes.stackplot(steps[there], present, colors=[colours[name] for name in curves], alpha=0.85, lw=0)
    top = present.sum(axis=0).max()
    axes.set_ylim(0, top)
    ends = present[:, -1] / top
    _name(axes, list(np.cumsum(ends) - ends / 2), list(curves), colours)


def _heat(axes: Axes, cosines: np.ndarray, names: Sequence[str], palette: Palette) -> None:
    axes.set_title("Mean cosine between gradients")
    m = len(names)
    apart = cosines[~np.eye(m, dtype=bool)]
    if np.isnan(apart).all():
        _absent(axes, "no two gradients were compared", palette)
        return
    shown = np.where(np.eye(m, dtype=bool), np.nan, cosines)
    colours = LinearSegmentedColormap.from_list("cosine", palette.diverging).with_extremes(bad=palette.paper)
    image = axes.imshow(shown, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(m), names, rotation=30 if m > 4 else 0, ha="right" if m > 4 else "center")
    axes.set_yticks(range(m), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if m <= 10:
        for i in range(m):
            for j in range(m):
                if not np.isnan(shown[i, j]):
                    axes.text(
                        j, i, f"{shown[i, j]:+.2f}".replace("-", "−"), ha="center", va="center", fontsize=8,
                        color=palette.ink if abs(shown[i, j]) < 0.6 else palette.paper,
                    )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], fraction=0.046, pad=0.03)
    bar.ax.set_yticklabels(["−1 oppose", "0", "1 agree"])
    bar.outline.set_visible(False)


def _absent(axes: Axes, why: str, palette: Palette) -> None:
    axes.set_axis_off()
    axes.set_title(axes.get_title(loc="left"))
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=palette.grey)
