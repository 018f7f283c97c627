"""Name the methods, with what they need, what a step costs, and what they promise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gradsurgery.cli import catalogue, say, say_json, whole
from gradsurgery.cli.catalogue import Facts
from gradsurgery.text import grid, terminal_width, wrapped

NAME = "list"
HELP = "name the methods, with needs, costs and guarantees"

_TITLES = {
    "surgery": "SURGERY combines the gradients of the losses",
    "weighting": "WEIGHTING multiplies the losses",
}
_LEGEND = (
    "needs: values of the losses; norms of their gradients, inner products or entries of them; rows (gradients) kept "
    "between steps or of more batches. cost: backward passes per step for m losses. common descent: no loss rises, to "
    "first order, in the shared parameters. scale: sum keeps the learning rate of the plain sum. "
    "`gradsurgery explain METHOD` says more."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: Where to.
    """
    parser.add_argument("--kind", choices=("surgery", "weighting"), help="surgery of gradients, or weights of losses")
    parser.add_argument(
        "--needs",
        metavar="WHAT",
        type=_needs,
        help=f"only those that need nothing else than WHAT, with commas between: {', '.join(catalogue.NEEDS)}",
    )
    parser.add_argument("--one-pass", action="store_true", help="only those with one backward pass per step")
    parser.add_argument(
        "--common-descent",
        nargs="?",
        const=0,
        type=whole(2),
        metavar="M",
        help="only those with which no loss rises, to first order, for M losses (any number if M is left out)",
    )
    parser.add_argument("--scale", choices=("sum", "paper", "priority"), help="by what m equal gradients give")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")


def _needs(text: str) -> frozenset[str]:
    words = [word.strip().replace("-", " ") for word in text.split(",") if word.strip()]
    for word in words:
        if word not in catalogue.NEEDS:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(catalogue.NEEDS)}")
    return frozenset(words)


def chosen(args: argparse.Namespace) -> list[Facts]:
    """Filter the methods.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        Those that are left.
    """
    return [
        facts
        for facts in catalogue.facts().values()
        if args.kind in (None, facts.kind)
        and (args.needs is None or set(facts.needs) <= args.needs)
        and (not args.one_pass or facts.cost.startswith("1 pass"))
        and (args.common_descent is None or facts.common_descent(args.common_descent or None))
        and args.scale in (None, facts.scale[0])
    ]


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        The exit code: 1 if no method is left.
    """
    methods = chosen(args)
    if args.json:
        say_json([facts.as_dict() for facts in methods])
        return 0 if methods else 1
    if not methods:
        say("No method is like that.\n")
        return 1
    for kind, title in _TITLES.items():
        own = [facts for facts in methods if facts.kind == kind]
        if own:
            say(f"{title}\n\n{_table(own)}\n")
    say(wrapped(f"{len(methods)} of {len(catalogue.facts())} methods. {_LEGEND}", terminal_width()))
    return 0


def _table(methods: Sequence[Facts]) -> str:
    cells = [
        {
            "method": facts.name,
            "needs": ", ".join(facts.needs) or "nothing",
            "cost": facts.cost,
            "common descent": facts.no_loss_rises.split(";")[0],
            "scale": facts.scale[0],
        }
        for facts in methods
    ]
    if methods[0].kind == "weighting":  # weights of positive losses promise nothing of the kind
        for row in cells:
            del row["common descent"]
    return grid(
        list(cells[0]), [list(row.values()) for row in cells], left=range(len(cells[0])), width=terminal_width()
    )
