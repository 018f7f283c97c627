"""Plain tables for a terminal, a pipe or a file: no colour, no package needed."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), width: int = 0) -> str:
    """Set a table in columns.

    Args:
        headings: One a column.
        rows: Cells, as many as headings.
        left: Columns that are aligned to the left; all others are to the right.
        width: Characters of a line, 0 for no limit. If there are more, the last column is wrapped.

    Returns:
        Lines, each with its line break.
    """
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max(24, width - indent) if width else 0
    lines = []
    for number, row in enumerate(table):
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        if room and len(cells[-1]) > room:
            first, *rest = textwrap.wrap(row[-1], room) or [""]
            lines.append("  ".join([*cells[:-1], first]).rstrip())
            lines += [" " * indent + more for more in rest]
        else:
            lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append(
                "  ".join("-" * (min(w, room) if room and i == len(widths) - 1 else w) for i, w in enumerate(widths))
            )
    return "".join(f"{line}\n" for line in lines)


def terminal_width() -> int:
    """How wide a line may be: that of the terminal, or 0 (no limit) for a file or a pipe.

    Returns:
        Number of characters.
    """
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 0


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
