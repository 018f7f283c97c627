"""A page that begins with what matters and one picture, and a second one that has its tables."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from gradsurgery.watch.pictures import COLOURS, LIGHT, style

#: What an answer was, and the colour of its square.
OUTCOMES = {"right": COLOURS[4], "wrong": COLOURS[0], "error": "#aa4499", "not offered": LIGHT.faint}


def beside(path: Path) -> Path:
    """The second page, of the tables."""
    return path.with_name(f"{path.stem}-tables.md")


def picture(path: Path) -> Path:
    """The picture of a page."""
    return path.parent / "_static" / path.stem / f"{path.stem}.png"


def save(path: Path, first: str, tables: str, figure: Figure) -> None:
    """Write both pages and the picture.

    Args:
        path: The first page.
        first: Its text.
        tables: The text of the second page.
        figure: The picture, drawn in :func:`gradsurgery.watch.pictures.style`.
    """
    picture(path).parent.mkdir(parents=True, exist_ok=True)
    with style(LIGHT):
        figure.savefig(picture(path), dpi=200, facecolor="white")
    path.write_text(first, encoding="utf-8")
    beside(path).write_text(tables, encoding="utf-8")


def squares(rows: list[str], columns: list[str], outcomes: dict[tuple[str, str], str]) -> Figure:
    """A square for each answer.

    Args:
        rows: Who was asked, from the top.
        columns: What was asked.
        outcomes: A key of :data:`OUTCOMES` by row and column.
    """
    with style(LIGHT):
        figure = Figure(figsize=(7.4, 0.9 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            for outcome, colour in OUTCOMES.items():
                at = [x for x, column in enumerate(columns) if outcomes[row, column] == outcome]
                axes.plot(at, [y] * len(at), "s", color=colour, ms=4.3, label=outcome if y == 0 else None)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xticks=[], xlim=(-1, len(columns)), ylim=(len(rows) - 0.4, -0.6), xlabel=f"{len(columns)} cases")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.legend(loc="outside upper right", ncols=len(OUTCOMES), frameon=False, handletextpad=0.2)
    return figure


def dots(values: dict[str, list[float]], title: str, label: str) -> Figure:
    """A line of dots for each name, on a logarithmic axis, with 1 marked.

    Args:
        values: By name, from the top.
        title: Of the picture.
        label: Of the axis.
    """
    with style(LIGHT):
        figure = Figure(figsize=(6.6, 1.0 + 0.17 * len(values)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1.0, color=COLOURS[0], lw=1.0, zorder=0)
        for y, found in enumerate(values.values()):
            axes.plot(found, [y] * len(found), "o", color=COLOURS[3], ms=3.2, alpha=0.7)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(values)), list(values), fontsize=7.5)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=LIGHT.faint, lw=0.5, zorder=-1)
        axes.set_title(title)
        axes.set_xlabel(label)
    return figure
