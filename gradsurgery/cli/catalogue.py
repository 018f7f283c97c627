"""What is known of each method, for programs: the tables of the page on methods, and what the classes say.

The page is the one place that says what a method needs, costs and promises; a test compares it with what the test suite
has tried. It is installed with the library.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

import gradsurgery
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.surgery.base import Surgery
from gradsurgery.text import spelling, spellings, suggestion
from gradsurgery.weighting.base import Weighter

#: What stands for no method at all, where methods are compared.
SUM = "plain sum"
#: The words for what a method may need, as the page explains them.
NEEDS = ("values", "norms", "products", "entries", "rows kept", "more batches", "labels", "residuals")
_HERE = Path(__file__).resolve().parent
# Beside the code where the library is installed, in its folder where it is worked on.
_PLACES = (_HERE / "methods.md", _HERE.parents[1] / "docs" / "methods.md")


class Entry(NamedTuple):
    """One row of a table of methods.

    Attributes:
        name: Name of the method.
        link: Where its name leads on the page.
        section: Heading above the table.
        cells: By heading of the column.
    """

    name: str
    link: str
    section: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """What is known of a method.

    Args:
        name: Its name.
        method: Its class.
        section: The family, as the page heads it.
        needs: Which of :data:`NEEDS`.
        cost: Backward passes per step and rows kept, for m losses.
        no_loss_rises: To first order: "always", "m = 2", "independent rows" or "no", as the page says it.
        scale: "sum", "paper" or "priority", first that of the defaults.
        holds: What else holds.
        when: When to take it.
        papers: Names and addresses.
    """

    name: str
    method: type[MultiLossOptimizer]
    section: str
    needs: tuple[str, ...]
    cost: str
    no_loss_rises: str
    scale: tuple[str, ...]
    holds: str
    when: str
    papers: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> Literal["surgery", "weighting"]:
        """Which of the two kinds it is."""
        return "surgery" if issubclass(self.method, Surgery) else "weighting"

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return plain(inspect.getdoc(self.method) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def explanation(self) -> str:
        """The docstring of the class without its last sections: arguments, errors and example."""
        text = plain(inspect.getdoc(self.method) or "")
        return re.split(r"\n\n(?:Args|Raises|Example|Attributes):\n", text)[0]

    def common_descent(self, tasks: int | None = None) -> bool:
        """Whether no loss rises, to first order, with the defaults.

        Args:
            tasks: For this number of losses; None for any number.

        Returns:
            Yes or no.
        """
        default = self.no_loss_rises.split(";")[0].strip()
        return default.startswith("always") or (tasks == 2 and default.startswith("m = 2")) or tasks == 1

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON.

        Returns:
            Names to values.
        """
        return {
            "name": self.name,
            "kind": self.kind,
            "family": self.section,
            "summary": self.summary,
            "needs": list(self.needs),
            "cost": self.cost,
            "no_loss_rises": self.no_loss_rises,
            "common_descent": self.common_descent(),
            "common_descent_of_two": self.common_descent(2),
            "scale": list(self.scale),
            "has_weights": self.method.has_weights,
            "keeps_state": self.method.stateful or getattr(self.method, "observes", False),
            "takes_preference": not self.method.preference_refused,
            "holds": self.holds,
            "when": self.when,
            "papers": [{"name": name, "url": url} for name, url in self.papers],
        }


def tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """Read the tables of a Markdown page.

    Args:
        text: The page.

    Returns:
        For each table the heading above it and its cells, the heads first, the line of dashes left out.

    Raises:
        ValueError: A table has no line of dashes.
    """
    found, section, block = [], "", list[str]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
            continue
        if block:
            cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in block]
            if len(cells) < 2 or set("".join(cells[1])) - set("-: "):
                raise ValueError(f"tables: the second line of a table is made of dashes, got {block[1:2]}.")
            found.append((section, [cells[0], *cells[2:]]))
            block = []
        if line.startswith("#"):
            section = line.lstrip("#").strip()
    return found


def entries(text: str) -> list[Entry]:
    """Read the rows of all tables of a page whose first column is called "method".

    Args:
        text: The page.

    Returns:
        The rows.

    Raises:
        ValueError: A row has too many or too few cells, or does not begin with a linked name.
    """
    found = []
    for section, (head, *rows) in tables(text):
        if head[0] != "method":
            continue
        for row in rows:
            if len(row) != len(head):
                raise ValueError(f"entries: a row has another number of cells than its head: {row[0]}.")
            first = re.match(r"\[`(\w+)`\]\(#([\w.]+)\)", row[0])
            if first is None:
                raise ValueError(
                    f"entries: the first cell must begin with [`Method`](#gradsurgery.Method), got {row[0]!r}."
                )
            found.append(Entry(first[1], first[2], section, dict(zip(head, row, strict=True))))
    return found


@cache
def facts() -> Mapping[str, Facts]:
    """What is known of every method.

    Returns:
        By name, in the order of the page.

    Raises:
        RuntimeError: The page is not there.
    """
    page = next((place for place in _PLACES if place.exists()), None)
    if page is None:
        raise RuntimeError(f"catalogue: {_PLACES[0]} is missing. Install the library anew.")
    return {entry.name: _facts(entry) for entry in entries(page.read_text(encoding="utf-8"))}


def find(name: str) -> Facts:
    """Look a method up, whatever the case of the letters; "Weighter" at the end may be left out.

    Args:
        name: Its name.

    Returns:
        What is known of it.

    Raises:
        ValueError: There is none; the error names those that are near.
    """
    known = facts()
    folded, wanted = spellings(known), spelling(name)
    if wanted in folded:
        return known[folded[wanted]]
    raise ValueError(f"there is no method {name!r}.{suggestion(name, known)} `gradsurgery list` names all.")


def built(name: str, optimizer: Optimizer, tasks: int = 2, **given: Any) -> MultiLossOptimizer:
    """Build a method with its defaults, and with the least of what its constructor asks for besides.

    Args:
        name: The method.
        optimizer: The torch optimizer that it goes around, or whose place it takes.
        tasks: Number of losses.
        **given: Arguments of its constructor that are known better.

    Returns:
        The method.
    """
    extra: dict[str, dict[str, Any]] = {
        "GradNormWeighter": {"shared_params": optimizer.param_groups[0]["params"]},
        "Krum": {"n_byzantine": 0},
        "PriorLossWeighter": {"priors": [1.0] * tasks},
        "SandMask": {"tau": 0.5},
    }
    return find(name).method.around(optimizer, **{**extra.get(name, {}), **given})


def _facts(entry: Entry) -> Facts:
    method = getattr(gradsurgery, entry.name)
    assert issubclass(method, (Surgery, Weighter))
    said = entry.cells["needs, cost"]
    # The cost begins with the number of passes; what stands before is needed.
    start = re.search(r"(?:\d+|\bm)(?: to \d?m)?(?: short)? (?:pass|passes)\b", said)
    assert start is not None
    needs, cost = said[: start.start()], said[start.start() :]
    remark, when = re.fullmatch(r"(.*?)\s*\*([^*]+)\*", entry.cells[list(entry.cells)[-1]], flags=re.DOTALL).groups()  # type: ignore[union-attr]
    return Facts(
        name=entry.name,
        method=method,
        section=entry.section,
        needs=tuple(
            word for word in NEEDS if word in needs or (word == "rows kept" and re.search(r"rows? kept", cost))
        ),
        cost=cost,
        no_loss_rises=entry.cells.get("common descent", "no"),
        scale=tuple(part.split()[0] for part in entry.cells["scale"].split(";")),
        holds=plain(remark),
        when=plain(when),
        papers=tuple(re.findall(r"\[([^\]`]+)\]\((https://[^)]+)\)", entry.cells["method"])),
    )


def plain(text: str) -> str:
    """Take the marks of Markdown and reStructuredText out of a text.

    Args:
        text: The text.

    Returns:
        Words that read well in a terminal.
    """
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.sub(r"(\*|`+)(\S(?:.*?\S)?)\1", r"\2", text)
