"""The commands of the command line, one a file, and what they write with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


def complain(command: str, message: str) -> int:
    """Say on standard error why a command cannot do what it was asked for.

    Args:
        command: Its name.
        message: What is wrong, and what to do.

    Returns:
        The exit code for that, 2.
    """
    sys.stderr.write(f"gradsurgery {command}: {message}\n")
    return 2


def whole(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers, for ``add_argument(type=...)``.

    Args:
        least: The smallest number that is taken.

    Returns:
        A function of a text.
    """

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return read


def say(text: str) -> None:
    """Write to standard output. There is no colour in it, so that a pipe gets what a terminal shows.

    Args:
        text: What to write.
    """
    sys.stdout.write(text)


def say_json(value: Any) -> None:
    """Write JSON to standard output.

    Args:
        value: Plain values.
    """
    say(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def no_pictures(command: str, error: ModuleNotFoundError) -> int:
    """Say that matplotlib is missing.

    Args:
        command: The command's name.
        error: What was raised. If another module is missing it is raised again.

    Returns:
        The exit code.

    Raises:
        ModuleNotFoundError: Another module is missing.
    """
    if error.name is None or error.name.partition(".")[0] != "matplotlib":
        raise error
    return complain(command, "a picture needs matplotlib. Install it: pip install matplotlib")
