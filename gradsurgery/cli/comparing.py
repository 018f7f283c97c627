"""Let methods walk on a toy problem with a known Pareto set, and compare where they get.

A toy says how a method moves, not which one trains your model best; `gradsurgery diagnose` looks at that.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import problems
from gradsurgery.cli import catalogue, complain, no_pictures, say, say_json, whole
from gradsurgery.problems import Problem
from gradsurgery.text import grid, number, terminal_width, wrapped

NAME = "compare"
HELP = "let methods walk on a toy problem, and compare where they get"


@dataclass(frozen=True)
class Setting:
    """A problem, and how to walk on it.

    Args:
        build: Makes the problem.
        base: The torch optimizer.
        lr: Its learning rate.
        steps: Number of steps.
        says: What the problem is, in a line.
    """

    build: Callable[[], Problem]
    base: type[Optimizer]
    lr: float
    steps: int
    says: str


PROBLEMS = {
    "quadratics": Setting(problems.quadratics, torch.optim.SGD, 0.1, 400, "two tilted bowls"),
    "concave": Setting(problems.fonseca_fleming, torch.optim.SGD, 0.05, 400, "Fonseca-Fleming: a concave front"),
    "basin": Setting(problems.cagrad_basin, torch.optim.Adam, 0.05, 600, "CAGrad's landscape: valleys above a basin"),
    "valleys": Setting(problems.pcgrad_valleys, torch.optim.Adam, 0.02, 1500, "PCGrad's landscape: two steep valleys"),
}
#: Losses that could be this much lower at once, relative to their spread along the front, count as Pareto optimal.
NEAR = 0.01


@dataclass(frozen=True)
class Walk:
    """How one method went from all starts.

    Args:
        method: Its name.
        ends: Where it got, a point a start.
        losses: Mean of each loss there.
        gap: Mean of how much lower all losses could be at once.
        near: Number of ends that are Pareto optimal, but for one hundredth of the losses' range along the front.
        milliseconds: Time of a step.
        error: Why it did not get there, or empty.
    """

    method: str
    ends: list[list[float]]
    losses: list[float]
    gap: float | None
    near: int
    milliseconds: float | None
    error: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: Where to.
    """
    about = "; ".join(f"{name}: {setting.says}" for name, setting in PROBLEMS.items())
    parser.add_argument("problem", metavar="PROBLEM", choices=tuple(PROBLEMS), help=about)
    parser.add_argument(
        "--methods",
        default="PCGrad,MGDA,CAGrad",
        metavar="A,B",
        help="names with commas between, or all (%(default)s); the plain sum always comes first",
    )
    parser.add_argument("--steps", type=whole(1), metavar="N", help="number of steps (depends on the problem)")
    parser.add_argument("--lr", type=_rate, help="learning rate (depends on the problem)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the paths into this file")
    parser.add_argument("--dark", action="store_true", help="draw on dark paper")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return rate


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        The exit code: 1 if a method failed.
    """
    setting = PROBLEMS[args.problem]
    steps = setting.steps if args.steps is None else args.steps
    lr = setting.lr if args.lr is None else args.lr
    try:
        names = _named(args.methods)
    except ValueError as error:
        return complain(NAME, str(error))
    if args.plot is not None:
        try:
            from gradsurgery.cli import method_pictures
        except ModuleNotFoundError as error:
            return no_pictures(NAME, error)
    problem = setting.build()
    walks, paths = _walked(problem, [catalogue.SUM, *names], setting.base, lr, steps)
    if args.plot is not None:
        try:
            method_pictures.draw_paths(problem, paths, args.plot, dark=args.dark)
        except (OSError, ValueError) as error:
            return complain(NAME, f"cannot draw into {args.plot}: {error}.")
    if args.json:
        say_json({"problem": args.problem, "steps": steps, "lr": lr, "methods": [asdict(walk) for walk in walks]})
    else:
        _show(problem, setting, walks, steps, lr)
        if args.plot is not None:
            say(f"The paths are in {args.plot}.\n")
    return 1 if any(walk.error for walk in walks) else 0


def _walked(
    problem: Problem, names: Sequence[str], base: type[Optimizer], lr: float, steps: int
) -> tuple[list[Walk], dict[str, list[Tensor]]]:
    """Let each method walk once, and say on a terminal which one does."""
    walks, paths = [], {}
    for name in dict.fromkeys(names):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{name:<40}")
        walk, path = walk_from_all(problem, name, base, lr, steps)
        walks.append(walk)
        if path:
            paths[name] = path
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{'':40}\r")
    return walks, paths


def _named(methods: str) -> list[str]:
    if methods.strip().lower() == "all":
        return list(catalogue.facts())
    return [catalogue.find(name.strip()).name for name in methods.split(",") if name.strip()]


def walk_from_all(
    problem: Problem, name: str, base: type[Optimizer], lr: float, steps: int
) -> tuple[Walk, list[Tensor]]:
    """Let one method walk from every start.

    Args:
        problem: The problem.
        name: The method, or "plain sum".
        base: The torch optimizer.
        lr: Its learning rate.
        steps: Number of steps.

    Returns:
        The outcome, and the paths, (steps + 1, n) each; none if it failed.
    """

    def build(parameters: list[torch.nn.Parameter]) -> Optimizer:
        optimizer = base(parameters, lr=lr)  # type: ignore[call-arg]
        return optimizer if name == catalogue.SUM else catalogue.built(name, optimizer)

    try:
        problem.trajectory(problem.starts[0], build, 1)  # what is loaded in the first step is not the method's time
        began = time.perf_counter()
        paths = [problem.trajectory(start, build, steps) for start in problem.starts]
    except (RuntimeError, ValueError, TypeError) as error:
        return Walk(name, [], [], None, 0, None, str(error)), []
    seconds = time.perf_counter() - began
    ends = [path[-1] for path in paths]
    gaps = [problem.gap(end) for end in ends]
    values = torch.stack([torch.stack(problem.losses(end)) for end in ends]).mean(dim=0)
    near = NEAR * problem.breadth()
    walk = Walk(
        name,
        [end.tolist() for end in ends],
        values.tolist(),
        sum(gaps) / len(gaps),
        sum(gap <= near for gap in gaps),
        1e3 * seconds / (steps * len(ends)),
    )
    return walk, paths


def _show(problem: Problem, setting: Setting, walks: Sequence[Walk], steps: int, lr: float) -> None:
    count = len(problem.starts)
    rows = [
        (
            walk.method,
            *(number(value) for value in walk.losses),
            number(walk.gap),
            f"{walk.near}/{count}",
            number(walk.milliseconds),
        )
        for walk in walks
        if walk.gap is not None and walk.milliseconds is not None
    ]
    tasks = len(problem.losses(problem.starts[0]))
    starts = f"{count} start{'s' if count > 1 else ''}"
    say(f"{problem.name}: {starts}, {steps} steps of {setting.base.__name__} at {lr:g}\n\n")
    width = terminal_width()
    say(grid(("method", *(f"loss {i + 1}" for i in range(tasks)), "gap", "optimal", "ms per step"), rows, width=width))
    for walk in walks:
        if walk.error:
            say(wrapped(f"{walk.method} cannot walk here: {walk.error}", width))
    say(
        "\n"
        + wrapped(
            "Losses and gap at the ends, means over the starts. Gap: by how much all losses could be lower at once. "
            "Optimal: the gap is below one hundredth of the losses' range along the Pareto front.",
            width,
        )
    )
