"""The pictures of the page on evidence."""

from __future__ import annotations

import statistics as means
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.contenders import SUM, TUNED
from benchmarks.evidence.page import slug
from benchmarks.evidence.reading import Data, mean_score, ordered, single_task
from benchmarks.evidence.results import scores
from gradsurgery.watch.pictures import COLOURS, LIGHT, style

#: By kind, and the two baselines.
COLOUR = {"surgery": COLOURS[3], "weighting": COLOURS[4], "baseline": LIGHT.ink, SUM: COLOURS[0], TUNED: LIGHT.ink}
_ROW = 0.145  # inches for a contender
_WIDTH = 4.9  # inches: narrow, so that the names can still be read on a phone


def draw(data: Data, folder: Path) -> None:
    """Draw all pictures of the page.

    Args:
        data: The summary.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {row["name"]: row["kind"] for row in data["overall"]}
    with style():
        figures = {"overall": overall(data), "map": heat(data)}
        for problem in data["problems"]:
            if ordered(data, problem["name"]):
                figures[slug(problem["name"])] = one_problem(data, problem, kinds)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", metadata={"Software": None}, dpi=110)


def colour(name: str, kinds: dict[str, str]) -> str:
    """The colour of a contender."""
    return COLOUR.get(name, COLOUR[kinds.get(name, "baseline")])


def name_rows(axes: Axes, names: list[str], kinds: dict[str, str]) -> None:
    """Contenders down the left side, each in the colour of its kind."""
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colour(name, kinds))
        if name in (SUM, TUNED):
            label.set_weight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def kinds_key(figure: Figure) -> None:
    """Say below the picture what the colours mean."""
    from matplotlib.lines import Line2D

    shades = {"surgery": COLOUR["surgery"], "weighting": COLOUR["weighting"], "baseline": COLOUR["baseline"]}
    marks = [Line2D([], [], color=shade, marker="o", ms=3.6, lw=1.3, label=kind) for kind, shade in shades.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)


def plain_ticks(axes: Axes) -> None:
    """Numbers on a logarithmic axis as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def overall(data: Data) -> Figure:
    """Error relative to the plain sum, with intervals, for every contender."""
    rows = sorted((row for row in data["overall"] if "sum" in row), key=lambda row: row["sum"]["ratio"][0])
    kinds = {row["name"]: row["kind"] for row in rows}
    figure = Figure(figsize=(_WIDTH, 1.3 + _ROW * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color=COLOUR[SUM], lw=1.0, zorder=0)
    for y, row in enumerate(rows):
        value, low, high = row["sum"]["ratio"]
        shade = colour(row["name"], kinds)
        axes.plot([low, high], [y, y], color=shade, lw=1.3, solid_capstyle="butt")
        axes.plot(value, y, "o", color=shade, ms=3.6)
    axes.set_xscale("log")
    name_rows(axes, [row["name"] for row in rows], kinds)
    plain_ticks(axes)
    axes.grid(axis="x", color=LIGHT.faint, lw=0.5, zorder=-1)
    axes.set_title("Error / error of the plain sum")
    axes.set_xlabel("lower error  ←     →  higher error")
    kinds_key(figure)
    return figure


def heat(data: Data) -> Figure:
    """Error of each contender on each problem relative to the plain sum."""
    from matplotlib.colors import LinearSegmentedColormap

    names = [row["name"] for row in data["overall"] if row["name"] != SUM]
    kinds = {row["name"]: row["kind"] for row in data["overall"]}
    problems = [problem["name"] for problem in data["problems"] if mean_score(data, problem["name"], SUM)]
    table = np.full((len(names), len(problems)), np.nan)
    for j, problem in enumerate(problems):
        base = mean_score(data, problem, SUM)
        for i, name in enumerate(names):
            mine = mean_score(data, problem, name)
            if mine and base:
                table[i, j] = np.log2(mine / base)
    above, middle, below = LIGHT.diverging
    shades = LinearSegmentedColormap.from_list("better or worse", [below, middle, above])
    shades = shades.with_extremes(bad=LIGHT.paper)
    figure = Figure(figsize=(_WIDTH, 2.3 + _ROW * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap=shades, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    for i, j in zip(*np.nonzero(np.isnan(table)), strict=True):
        axes.text(j, i, "–", color=LIGHT.grey, ha="center", va="center", fontsize=6)
    name_rows(axes, names, kinds)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(problems)), problems, rotation=40, ha="left", fontsize=7.5)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=24, pad=0.02, ticks=[-1, 0, 1])
    bar.ax.set_xticklabels(["half the error\nor less", "as the\nplain sum", "twice the error\nor more"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def one_problem(data: Data, problem: Data, kinds: dict[str, str]) -> Figure:
    """All contenders on one problem, a dot for each seed."""
    name = problem["name"]
    here, order = data["results"][name], ordered(data, name)
    figure = Figure(figsize=(_WIDTH, 0.9 + _ROW * len(order)), layout="constrained")
    axes = figure.subplots()
    for baseline in (SUM, TUNED):
        mean = mean_score(data, name, baseline)
        if mean is not None:
            axes.axvline(mean, color=COLOUR[baseline], lw=0.9, zorder=0)
    alone = single_task(data, problem)
    if alone is not None:
        axes.axvline(alone, color=LIGHT.grey, lw=1.1, ls=(0, (1, 2)), zorder=0)
    for y, contender in enumerate(order):
        shade = colour(contender, kinds)
        by_seed = scores(here[contender])
        for seed, value in by_seed.items():
            failed = seed in here[contender]["failed"]
            axes.plot(
                value,
                y,
                "x" if failed else "o",
                color=shade,
                ms=4 if failed else 3,
                alpha=0.75,
                mew=1.0 if failed else 0,
            )
        mean = means.fmean(by_seed.values())
        axes.plot([mean, mean], [y - 0.36, y + 0.36], color=shade, lw=1.4)
    axes.set_xscale("log")
    name_rows(axes, order, kinds)
    plain_ticks(axes)
    axes.grid(axis="x", color=LIGHT.faint, lw=0.5, zorder=-1)
    axes.set_title(f"{name[0].upper()}{name[1:]}: mean test error")
    return figure
