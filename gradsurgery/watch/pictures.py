"""What all pictures have in common: colours, style, and labels that keep apart. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

# Okabe and Ito's palette, told apart with any kind of colour blindness, and a violet that shows on white and on black.
# Labels say it again.
COLOURS = ("#d55e00", "#8e6bd1", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#000000")


class Palette(NamedTuple):
    """The colours of a picture.

    Attributes:
        ink: Text and what matters most.
        grey: Axes and remarks.
        faint: Areas and grid lines.
        paper: What all is drawn on.
        lines: One a task or method, in turn.
        diverging: Below zero, zero, above zero.
    """

    ink: str
    grey: str
    faint: str
    paper: str
    lines: tuple[str, ...]
    diverging: tuple[str, str, str]


LIGHT = Palette("#222222", "#8c8c8c", "#dcdcdc", "#ffffff", COLOURS, ("#aa4499", "#f7f7f7", "#009e73"))
# The same hues, lighter where they would drown.
DARK = Palette(
    "#e6e9ee",
    "#98a2b3",
    "#3a414b",
    "#15181c",
    ("#f0742a", "#a98be0", "#e69f00", "#4aa3df", "#2bbd94", "#8fd0f5", "#e093bb", "#ffffff"),
    ("#d07fc4", "#23282f", "#2bbd94"),
)


@contextmanager
def style(palette: Palette = LIGHT) -> Iterator[Palette]:
    """Draw in the library's style.

    Args:
        palette: :data:`LIGHT` or :data:`DARK`.

    Yields:
        The palette.
    """
    settings: dict[str, Any] = {
        "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "savefig.dpi": 160,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": palette.grey,
        "axes.labelcolor": palette.ink,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": palette.ink,
        "xtick.color": palette.grey,
        "ytick.color": palette.grey,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        yield palette


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean along the first axis, over fewer values at the start.

    Args:
        values: (n, ...).
        window: Number of values.

    Returns:
        (n, ...).
    """
    sums = np.cumsum(np.concatenate([np.zeros((1, *values.shape[1:])), values]), axis=0)
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start).reshape(-1, *[1] * (values.ndim - 1))


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move labels apart until neighbours are a gap apart, in the same order, within the limits if they fit.

    Args:
        places: Where the labels should be.
        gap: Least distance.
        low: Lower limit.
        high: Upper limit.

    Returns:
        Where they go.
    """
    order = np.argsort(places)
    steps = gap * np.arange(len(places))
    ranked = np.asarray(places, dtype=float)[order] - steps
    # Pool adjacent violators: the non-decreasing sequence closest to the wished places.
    blocks: list[list[float]] = []
    for value in ranked:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [
                (blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count),
                blocks[-1][1] + count,
            ]
    fitted = np.concatenate([np.full(int(count), mean) for mean, count in blocks])
    fitted = np.clip(fitted, low, max(low, high - steps[-1])) + steps
    result = np.empty(len(places))
    result[order] = fitted
    return result
