"""What people read: plain tables for a terminal, a pipe or a file, without colour or a package, and warnings."""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), width: int = 0) -> str:
    """Set a table in columns.

    Args:
        headings: One a column.
        rows: Cells, as many as headings.
        left: Columns that are aligned to the left; all others are to the right.
        width: Characters of a line, 0 for no limit. If there are more, the widest columns are wrapped between words;
            a word is never broken, so that lines of long words are longer.

    Returns:
        Lines, each with its line break.
    """
    table = [list(headings), *map(list, rows)]
    widths = _fitted(table, width)
    lines = []
    for number, row in enumerate(table):
        cells = [textwrap.wrap(cell, w, **_WHOLE_WORDS) or [""] for cell, w in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            columns = enumerate(zip(parts, widths, strict=True))
            lines.append("  ".join(part.ljust(w) if i in left else part.rjust(w) for i, (part, w) in columns).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "".join(f"{line}\n" for line in lines)


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _fitted(table: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of columns that make lines of a width, as far as words allow: the widest gives way first."""
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    while width and sum(widths) + 2 * (len(widths) - 1) > width:
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def spelling(name: str) -> str:
    """A name without what people write differently.

    Args:
        name: The name.

    Returns:
        Small letters, without hyphens and underscores.
    """
    return name.lower().replace("-", "").replace("_", "")


def spellings(known: Iterable[str]) -> dict[str, str]:
    """Under what names may be looked up: by their small letters, "Weighter" at the end or not.

    Args:
        known: The names.

    Returns:
        Spellings to names.
    """
    names = list(known)
    return {spelling(name): name for name in names} | {spelling(name).removesuffix("weighter"): name for name in names}


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known.

    Args:
        name: The name.
        known: Those that there are.

    Returns:
        A sentence with a blank before it; empty if nothing is near.
    """
    folded, wanted = spellings(known), spelling(name)
    near = [wanted] if wanted in folded else difflib.get_close_matches(wanted, folded, n=3)
    names = dict.fromkeys(folded[key] for key in near)
    return f" Did you mean {' or '.join(names)}?" if names else ""


def calling_frame(levels: int) -> FrameType:
    """A frame of Python's stack.

    Args:
        levels: How far up: 0 for the function that asks, 1 for the one that called it.

    Returns:
        The frame.
    """
    frame = inspect.currentframe()
    for _ in range(levels + 1):
        assert frame is not None
        frame = frame.f_back
    assert frame is not None
    return frame


def warn(message: str) -> None:
    """Warn at the user's line, however many calls within this library and torch have led from there to here.

    Args:
        message: What to say.
    """
    frame, level = calling_frame(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_PASSED_OVER = ("gradsurgery", "torch")


def moved(module: str, places: Mapping[str, str], removed_in: str) -> Callable[[str], object]:
    """Make a ``__getattr__`` for a module whose contents have moved.

    Args:
        module: The module.
        places: For each name where it is now, as "module:name".
        removed_in: The version without the old place.

    Returns:
        The function. It finds what is asked for, and warns.

    Raises:
        AttributeError: By the function, for a name that the module never had.
    """

    def find(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = places[name].partition(":")
        warnings.warn(
            f"{module}.{name} is now {home}.{new}. The old name goes in version {removed_in}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(home), new)

    return find


def terminal_width() -> int:
    """How wide a line may be: as wide as the terminal, or 100 characters in a file or a pipe.

    Returns:
        Number of characters. The environment variable ``COLUMNS`` overrules it.
    """
    return shutil.get_terminal_size((100, 24)).columns


def wrapped(text: str, width: int) -> str:
    """Break the lines of a text. Paragraphs and indented lines stay what they are.

    Args:
        text: The text; an empty line ends a paragraph.
        width: Characters of a line.

    Returns:
        Lines, each with its line break.
    """
    parts = []
    for paragraph in text.strip("\n").split("\n\n"):
        kept = paragraph.startswith(" ") or width <= 0
        parts.append(paragraph if kept else textwrap.fill(" ".join(paragraph.split()), max(width, 24)))
    return "\n\n".join(parts) + "\n"


def number(value: float, digits: int = 3) -> str:
    """Write a number with a few digits and a proper minus sign.

    Args:
        value: The number.
        digits: Significant digits.

    Returns:
        Text.
    """
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{float(f'{value:.{digits}g}'):,g}"
