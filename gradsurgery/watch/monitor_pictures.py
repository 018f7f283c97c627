"""The picture of a watched run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gradsurgery.watch.pictures import DARK, LIGHT, Palette, smooth, spread_out, style

if TYPE_CHECKING:
    from gradsurgery.watch.monitor import Monitor

#: Height of a line of labels, in inches.
LABEL = 0.14
Colours = dict[str, tuple[float, float, float]]


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
    # A label takes a tenth of the panel's height as long as there are few.
    height = max(5.6, 2 * (LABEL * len(names) + 0.8))
    with style(DARK if dark else LIGHT) as palette:
        figure = Figure(figsize=(8.6, height), layout="constrained")
        (losses, weights), (cosines, norms) = figure.subplots(2, 2)
        for axes, title in ((losses, "Losses"), (weights, "Weights"), (norms, "Gradient norms over their mean")):
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_xlim(*((steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)))
        if len(steps) == 1:
            for axes in (losses, weights, norms):
                axes.set_xticks(steps)
        colours = {name: _colour(i, palette) for i, name in enumerate(names)}
        _lines(losses, steps, {name: monitor.column("loss", name) for name in names}, colours)
        _bands(weights, steps, {name: monitor.column("weight", name) for name in names}, colours, palette)
        found = {name: monitor.column("norm", name) for name in names}
        known = np.stack(list(found.values()))
        counts = (~np.isnan(known)).sum(axis=0)
        total = np.nansum(known, axis=0)
        mean = np.divide(total, counts, out=np.full(len(steps), np.nan), where=(counts > 0) & (total > 0))
        if np.isnan(mean).all():
            _absent(norms, "No gradient norms were reported.", palette)
        else:
            norms.axhline(1.0, color=palette.grey, lw=0.8, ls=(0, (1, 2)), zorder=0)
            _lines(norms, steps, {name: norm / mean for name, norm in found.items()}, colours)
        _heat(cosines, monitor.cosines, names, palette)
        if path is not None:
            figure.savefig(path)
    return figure


def _colour(i: int, palette: Palette) -> tuple[float, float, float]:
    """The colours of the palette in turn, then the same nearer to the paper, then nearer to the ink."""
    turn, place = divmod(i, len(palette.lines))
    other, share = ((palette.paper, 0.0), (palette.paper, 0.4), (palette.ink, 0.45))[turn % 3]
    colour = np.array(to_rgb(palette.lines[place]))
    red, green, blue = colour + share * (np.array(to_rgb(other)) - colour)
    return float(red), float(green), float(blue)


def short(names: Sequence[str], most: int = 18) -> list[str]:
    """Take the middle out of long names, unless they could then be mistaken for each other.

    Args:
        names: The names.
        most: Number of characters that are not too many.

    Returns:
        As many names.
    """
    tail = (most - 1) // 2
    found = [name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}" for name in names]
    return found if len(set(found)) == len(found) or most > max(map(len, names)) else short(names, most + 4)


def _lines(axes: Axes, steps: np.ndarray, curves: dict[str, np.ndarray], colours: Colours) -> None:
    """Draw one curve per task, thin as recorded and thick as a running mean, with its name at the end."""
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve).any()}
    if not curves:
        axes.text(0.05, 0.9, "No finite value was recorded.", transform=axes.transAxes, va="center")
        return
    everything = np.concatenate(list(curves.values()))
    everything = everything[np.isfinite(everything)]
    # A factor of ten between the ends is more than a linear axis shows.
    logarithmic = everything.min() > 0 and everything.max() > 10 * everything.min()
    ends = []
    for name, curve in curves.items():
        there = np.isfinite(curve)
        axes.plot(steps[there], curve[there], color=colours[name], lw=0.6, alpha=0.4)
        mean = smooth(curve[there], max(1, int(there.sum()) // 32))
        alone = there.sum() == 1
        axes.plot(steps[there], mean, "o" if alone else "-", ms=5, color=colours[name], lw=1.6)
        ends.append(mean[-1])
    if logarithmic:
        axes.set_yscale("log")
        if everything.max() < 1000 * everything.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.autoscale_view()
    bounds = axes.get_ylim()
    low, high = np.log10(bounds) if logarithmic else bounds
    places = [(np.log10(end) if logarithmic else end) for end in ends]
    _name(axes, [(place - low) / (high - low) for place in places], list(curves), colours)


def _name(axes: Axes, heights: Sequence[float], names: Sequence[str], colours: Colours) -> None:
    """Write names to the right of a panel, at heights between 0 and 1, kept apart."""
    apart = min(0.09, 0.96 / len(names))
    places = spread_out(heights, apart, 0.02, 0.98)
    for name, label, height, place in zip(names, short(names), heights, places, strict=True):
        axes.plot([1, 1.03], [height, place], color=colours[name], lw=0.7, clip_on=False, transform=axes.transAxes)
        axes.text(1.04, place, label, color=colours[name], va="center", fontsize=8, transform=axes.transAxes)


def _bands(axes: Axes, steps: np.ndarray, curves: dict[str, np.ndarray], colours: Colours, palette: Palette) -> None:
    """Stack the weights, or draw them as lines if one is negative."""
    known = np.stack(list(curves.values()))
    if not np.isfinite(known).any():
        _absent(axes, "This method has no weights.", palette)
        return
    if np.nanmin(known) < 0:
        axes.axhline(0.0, color=palette.grey, lw=0.8, ls=(0, (1, 2)), zorder=0)
        _lines(axes, steps, curves, colours)
        return
    there = ~np.isnan(known).all(axis=0)
    # Without the running mean, thin bands of a method that jumps from step to step would look like noise.
    present = smooth(np.nan_to_num(known[:, there]).T, max(1, int(there.sum()) // 32)).T
    across = steps[there]
    if len(across) == 1:  # a band as wide as the panel
        across, present = across + np.array([-0.5, 0.5]), np.repeat(present, 2, axis=1)
    axes.stackplot(across, present, colors=[colours[name] for name in curves], alpha=0.85, lw=0)
    top = present.sum(axis=0).max()
    top = top if top > 0 else 1.0
    axes.set_ylim(0, top)
    ends = present[:, -1] / top
    _name(axes, list(np.cumsum(ends) - ends / 2), list(curves), colours)


def _heat(axes: Axes, cosines: np.ndarray, names: Sequence[str], palette: Palette) -> None:
    axes.set_title("Mean cosine between gradients")
    m = len(names)
    apart = cosines[~np.eye(m, dtype=bool)]
    if np.isnan(apart).all():
        _absent(axes, "No two gradients were compared.", palette)
        return
    shown = np.where(np.eye(m, dtype=bool), np.nan, cosines)
    colours = LinearSegmentedColormap.from_list("cosine", palette.diverging).with_extremes(bad=palette.paper)
    image = axes.imshow(shown, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    labels = short(names)
    upright = m > 10
    tilted = not upright and m * max(map(len, labels)) > 36
    axes.set_xticks(
        range(m), labels, rotation=90 if upright else 30 if tilted else 0, rotation_mode="anchor" if tilted else None,
        ha="right" if tilted else "center",
    )  # fmt: skip
    axes.set_yticks(range(m), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if m <= 10:
        for i in range(m):
            for j in range(m):
                if not np.isnan(shown[i, j]):
                    axes.text(
                        j, i, f"{shown[i, j]:+.2f}".replace("-", "−"), ha="center", va="center",
                        fontsize=8 if m < 7 else 6,
                        color=palette.ink if abs(shown[i, j]) < 0.6 else palette.paper,
                    )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], fraction=0.046, pad=0.03)
    bar.ax.set_yticklabels(["−1 oppose", "0", "1 agree"])
    bar.outline.set_visible(False)


def _absent(axes: Axes, why: str, palette: Palette) -> None:
    axes.set_axis_off()
    axes.text(0.0, 0.9, why, transform=axes.transAxes, va="center", color=palette.grey)
