"""What people read: plain tables for a terminal, a pipe or a file, without colour or a package."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Sequence
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
