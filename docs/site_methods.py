"""Write a page for each method before Sphinx reads the pages, and have the library draw what it does.

Everything comes from the docstrings, from the tables of methods.md and from the methods themselves, so that there is
nothing to forget when a method changes. What is written goes into ``docs/reference``, which git ignores: other pages
link to labels, such as ``#drawn``, since a file would be missing where the pages are read without a build. Drawings are
made anew when any source of the library is newer than they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import gradsurgery
from gradsurgery import catalogue
from gradsurgery.catalogue import Facts

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
# What the base classes document once for all methods, and attributes that only authors set.
INHERITED = (
    "weights, scalarize, scale, stateful, has_weights, observe, observes, measure, direct, coefficients, roll, "
    "version, needs_losses, preference_refused, preference_scales_rows, rows_repeat_tasks, uses_features"
)

HOW_TO_READ = """\
Every method gets the same gradients: two of different length that oppose each other, and three of which two oppose the
longest. The orange arrow is the method's direction, the dashed line that of the plain sum; the optimizer steps the
opposite way. Along any arrow in the green fan all losses fall, to first order. A gradient is violet if its loss rises.

Each drawing is made by the method itself, with its defaults, in its first step: of those that keep averages it shows
how they begin, and of those that draw at random, one draw. The losses are 1, 2 and 1.5; the first is the primary one.
"""


def surgeries() -> list[Facts]:
    return [facts for facts in catalogue.facts().values() if facts.kind == "surgery"]


def weightings() -> list[Facts]:
    return [facts for facts in catalogue.facts().values() if facts.kind == "weighting"]


def by_section(methods: Iterable[Facts]) -> dict[str, list[Facts]]:
    found: dict[str, list[Facts]] = {}
    for facts in methods:
        found.setdefault(facts.section, []).append(facts)
    return found


def drawing(facts: Facts) -> str:
    said = f"What {facts.name} does with two and with three conflicting gradients"
    return "\n".join(
        f"```{{image}} pictures/{facts.name}-{shade}.svg\n:class: only-{shade}\n:alt: {said}\n```"
        for shade in ("light", "dark")
    )


def page(facts: Facts) -> str:
    """The page of one method."""
    rows = {
        "take it when": facts.when,
        "needs": ", ".join(facts.needs) or "nothing but the losses",
        "cost of a step": facts.cost,
        "no loss rises": facts.no_loss_rises if facts.kind == "surgery" else "",
        "scale": "; ".join(facts.scale),
        "what else holds": facts.holds,
        "papers": ", ".join(f"[{name}]({url})" for name, url in facts.papers),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return (
        f"# {facts.name}\n\n{facts.summary}\n\n"
        + (f"{drawing(facts)}\n\n*[How to read this drawing](surgery.md)*\n\n" if facts.kind == "surgery" else "")
        + f"| | |\n| --- | --- |\n{table}\n\n"
        + "[What these words mean](../methods.md)\n\n"
        + f"```{{eval-rst}}\n.. autoclass:: gradsurgery.{facts.name}\n   :members:\n"
        + f"   :exclude-members: {INHERITED}\n```\n"
    )


def contents(methods: Iterable[Facts]) -> str:
    return "```{toctree}\n:hidden:\n\n" + "\n".join(facts.name for facts in methods) + "\n```\n"


def gallery() -> str:
    """All drawings side by side."""
    parts = ["(drawn)=\n\n# Surgery methods, drawn\n", HOW_TO_READ, "Click a drawing for the method's page.\n"]
    for section, methods in by_section(surgeries()).items():
        parts.append(f"## {section}\n\n:::::{{container}} gallery")
        for facts in methods:
            pictures = "".join(
                f"[![{facts.name}](pictures/{facts.name}-{shade}.svg){{.only-{shade}}}]({facts.name}.md)"
                for shade in ("light", "dark")
            )
            parts.append(
                f"::::{{container}} card\n{pictures}\n\n[**{facts.name}**]({facts.name}.md) {facts.when}\n::::"
            )
        parts.append(":::::\n")
    return "\n".join([*parts, contents(surgeries())])


def weighting_list() -> str:
    """All weightings, a line each."""
    parts = [
        "(weightings)=\n\n# Weighting methods\n",
        "They multiply each loss by a number and make one full backward pass for the sum. In the first step most of"
        " these numbers are equal, so that a drawing would show the plain sum."
        " [Toy problems](../toy-problems.md#gradnorms-regressions) show what one of them does over a run.\n",
    ]
    for section, methods in by_section(weightings()).items():
        parts.append(f"## {section}\n\n| method | what it does |\n| --- | --- |")
        parts += [f"| [{facts.name}]({facts.name}.md) | {facts.summary} |" for facts in methods]
        parts.append("")
    return "\n".join([*parts, contents(weightings())])


def pages() -> dict[str, str]:
    """All generated pages, by name."""
    found = {facts.name: page(facts) for facts in catalogue.facts().values()}
    return {**found, "surgery": gallery(), "weighting": weighting_list()}


def write_if_new(path: Path, text: str) -> None:
    # Sphinx reads a page again when its time changes.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write(folder: Path) -> None:
    """Write all pages into a folder, and delete those of methods that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    found = pages()
    for name, text in found.items():
        write_if_new(folder / f"{name}.md", text)
    for old in folder.glob("*.md"):
        if old.stem not in found:
            old.unlink()


def draw(folder: Path) -> None:
    """Draw all surgery methods into a folder, on light and on dark paper."""
    import matplotlib as mpl

    from gradsurgery import method_pictures

    folder.mkdir(parents=True, exist_ok=True)
    package = Path(gradsurgery.__file__).parent
    changed = max(path.stat().st_mtime for path in package.rglob("*.py"))
    for facts in surgeries():
        for shade in ("light", "dark"):
            path = folder / f"{facts.name}-{shade}.svg"
            if path.exists() and path.stat().st_mtime > changed:
                continue
            # The paper is the page's own.
            figure = method_pictures.draw(facts.name, dark=shade == "dark")
            with mpl.rc_context({"svg.hashsalt": facts.name}):
                figure.savefig(path, transparent=True, metadata={"Date": None})


def generate(app: Sphinx) -> None:
    write(DOCS / "reference")
    draw(DOCS / "reference" / "pictures")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
