"""Measure on your own model, without training, whether its losses need help, which, and at what price.

FUNCTION takes no argument and returns what gradsurgery.diagnose takes: (model or optimizer, loss_fn, batches). The file
is run as by an import, so that what trains belongs under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradsurgery.cli import complain, say, say_json, whole
from gradsurgery.watch.diagnose import diagnose

NAME = "diagnose"
HELP = "measure on your own model whether its losses need help"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: Where to.
    """
    parser.add_argument("target", metavar="SCRIPT.py:FUNCTION", help="a Python file and a function in it")
    parser.add_argument("--batches", type=whole(1), default=20, metavar="N", help="look at N batches (%(default)s)")
    parser.add_argument("--features", action="store_true", help="loss_fn returns (losses, shared representation)")
    parser.add_argument("--no-cost", action="store_true", help="do not measure time and memory")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: As :func:`arguments` declares them.

    Returns:
        The exit code.

    Raises:
        Exception: Whatever the user's own code raises comes out as it is.
    """
    try:
        function = load(args.target)
    except ValueError as error:
        return complain(NAME, str(error))
    given = function()
    if (
        not isinstance(given, tuple)
        or len(given) != 3
        or not isinstance(given[0], (nn.Module, Optimizer))
        or not callable(given[1])
    ):
        types = [type(part).__name__ for part in given] if isinstance(given, tuple) else [type(given).__name__]
        return complain(
            NAME, f"{args.target} must return (model or optimizer, loss_fn, batches), got {', '.join(types)}."
        )
    try:
        found = diagnose(*given, limit=args.batches, features=args.features, cost=not args.no_cost)
    except (TypeError, ValueError, RuntimeError) as error:
        # What is wrong with the losses or batches is said in a line. Where the user's code fails, its lines matter.
        where, _, what = str(error).partition(": ")
        if where.split(".")[0] != NAME:
            raise
        return complain(NAME, what)
    if args.json:
        say_json(found.as_dict())
    else:
        say(str(found))
    return 0


def load(target: str) -> Callable[[], Any]:
    """Import a function from a file.

    Args:
        target: ``path/to/script.py:function``.

    Returns:
        The function.

    Raises:
        ValueError: There is no such file or function.
    """
    path_text, colon, name = target.rpartition(":")
    path = Path(path_text)
    if not colon or not name.isidentifier():
        raise ValueError(f"write SCRIPT.py:FUNCTION, got {target!r}.")
    if not path.is_file():
        raise ValueError(f"there is no file {path_text}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path_text} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # As when a script is run: it finds the files beside it, and pickle finds the module.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path_text} has no function {name!r}.")
    return function
