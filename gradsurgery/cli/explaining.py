"""Explain one method: what it computes, what it needs and promises, its paper, and a drawing of its direction."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradsurgery.cli import catalogue, complain, no_pictures, say, say_json
from gradsurgery.cli.catalogue import Facts
from gradsurgery.text import terminal_width, wrapped

NAME = "explain"
HELP = "explain one method: formula, guarantees, paper, and a drawing"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: Where to.
    """
    parser.add_argument("method", metavar="METHOD", help="its name, such as PCGrad; capital letters do not matter")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw its direction for two and three gradients into this file"
    )
    parser.add_argument("--dark", action="store_true", help="draw on dark paper")
    parser.add_argument("--json", action="store_true", help="what is known, as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        The exit code.
    """
    try:
        facts = catalogue.find(args.method)
    except ValueError as error:
        return complain(NAME, str(error))
    if args.plot is not None:
        try:
            from gradsurgery.cli import method_pictures
        except ModuleNotFoundError as error:
            return no_pictures(NAME, error)
        try:
            method_pictures.draw(facts.name, args.plot, dark=args.dark)
        except (OSError, ValueError) as error:
            return complain(NAME, f"cannot draw into {args.plot}: {error}.")
    if args.json:
        say_json({**facts.as_dict(), "explanation": facts.explanation})
    else:
        say(text(facts, terminal_width()))
        if args.plot is not None:
            after = ", after a run in which losses fell at different paces" if facts.kind == "weighting" else ""
            say(f"\nThe drawing is in {args.plot}{after}.\n")
    return 0


def text(facts: Facts, width: int) -> str:
    """Write down what is known of a method.

    Args:
        facts: What is known.
        width: Characters of a line.

    Returns:
        Lines.
    """
    points = {
        "kind": facts.kind if facts.section.lower() == facts.kind else f"{facts.kind}: {facts.section.lower()}",
        "take it when": facts.when,
        "what holds": facts.holds,
        "common descent": facts.no_loss_rises,
        "needs": ", ".join(facts.needs) or "nothing",
        "cost": facts.cost,
        "scale": "; ".join(facts.scale),
        "papers": ", ".join(url for _, url in facts.papers),
    }
    indent = max(map(len, points)) + 2
    lines = [f"{facts.name}\n{'=' * len(facts.name)}\n", wrapped(facts.explanation, width)]
    for name, value in points.items():
        if value:
            first, *rest = wrapped(value, width - indent).splitlines()
            lines.append(f"{name:<{indent}}{first}\n" + "".join(f"{'':<{indent}}{line}\n" for line in rest))
    return "\n".join(lines[:2]) + "\n" + "".join(lines[2:])
