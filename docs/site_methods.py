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
from gradsurgery.cli import catalogue
from gradsurgery.cli.catalogue import Facts

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
# What the base classes document once for all methods, and attributes that only authors set.
INHERITED = (
    "weights, scalarize, scale, stateful, has_weights, observe, observes, measure, direct, coefficients, roll, "
    "version, needs_losses, preference_refused, preference_scales_rows, rows_repeat_tasks, uses_features, "
    "around, acts_on_private, sparse_refused, betas_wanted, prepared, divisors, degree"
)

HOW_TO_READ = """\
Every method gets the same gradients: two of different length that oppose each other, and three of which two oppose the
longest. The orange arrow is the method's direction, the dashed line that of the plain sum; the optimizer steps the
opposite way. Along any arrow in the green fan all losses fall, to first order. A gradient is violet if its loss rises.

Each drawing is made by the method itself, with its defaults, in its first step: of those that keep averages it shows
how they begin, and of those that draw at random, one draw. The losses are 1, 2 and 1.5; the first is the primary one.
"""

HOW_TO_READ_WEIGHTS = """\
They multiply each loss by a number and make one full backward pass for the sum. In the first step most of these numbers
are equal. So each is drawn, in the frame of the [surgery methods](surgery.md), after the same run of 60 steps: loss 1
falls from 1 to 0.1, loss 2 from 2 to 1.8, loss 3 from 1.5 to 0.75, and their gradients stay what they are.

Below the drawing are the weights that the method has by then, with its defaults; ÷ 5 says that the arrow is drawn at a
fifth of its length. None of them looks at the angles between gradients: whether a loss rises is chance. [Toy
problems](../toy-problems.md#gradnorms-regressions) show what one of them does over a real run.
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
    after = "" if facts.kind == "surgery" else ", after a run in which the losses fell at different paces"
    said = f"What {facts.name} does with two and with three conflicting gradients{after}"
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
        "common descent": facts.no_loss_rises if facts.kind == "surgery" else "",
        "scale": "; ".join(facts.scale),
        "what else holds": facts.holds,
        "papers": ", ".join(f"[{name}]({url})" for name, url in facts.papers),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return (
        f"# {facts.name}\n\n{facts.summary}\n\n"
        + f"{drawing(facts)}\n\n*[How to read this drawing]({facts.kind}.md)*\n\n"
        + f"| | |\n| --- | --- |\n{table}\n\n"
        + "[What these words mean](../methods.md)\n\n"
        + f"```{{eval-rst}}\n.. autoclass:: gradsurgery.{facts.name}\n   :members:\n"
        + f"   :exclude-members: {INHERITED}\n```\n"
    )


def contents(methods: Iterable[Facts]) -> str:
    return "```{toctree}\n:hidden:\n\n" + "\n".join(facts.name for facts in methods) + "\n```\n"


def gallery(methods: list[Facts], label: str, title: str, introduction: str) -> str:
    """The drawings of one kind of method side by side."""
    parts = [f"({label})=\n\n# {title}\n", introduction, "Click a drawing for the method's page.\n"]
    for section, own in by_section(methods).items():
        parts.append(f"## {section}\n\n:::::{{container}} gallery")
        for facts in own:
            pictures = "".join(
                f"[![{facts.name}](pictures/{facts.name}-{shade}.svg){{.only-{shade}}}]({facts.name}.md)"
                for shade in ("light", "dark")
            )
            parts.append(
                f"::::{{container}} card\n{pictures}\n\n[**{facts.name}**]({facts.name}.md) {facts.when}\n::::"
            )
        parts.append(":::::\n")
    return "\n".join([*parts, contents(methods)])


def pages() -> dict[str, str]:
    """All generated pages, by name."""
    found = {facts.name: page(facts) for facts in catalogue.facts().values()}
    return {
        **found,
        "surgery": gallery(surgeries(), "drawn", "Surgery methods, drawn", HOW_TO_READ),
        "weighting": gallery(weightings(), "weightings", "Weighting methods, drawn", HOW_TO_READ_WEIGHTS),
    }


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
    """Draw all methods into a folder, on light and on dark paper."""
    import matplotlib as mpl

    from gradsurgery.cli import method_pictures

    folder.mkdir(parents=True, exist_ok=True)
    package = Path(gradsurgery.__file__).parent
    changed = max(path.stat().st_mtime for path in package.rglob("*.py"))
    for facts in [*surgeries(), *weightings()]:
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
