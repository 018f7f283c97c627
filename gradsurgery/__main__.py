"""The command line: ``python -m gradsurgery COMMAND``, or ``gradsurgery COMMAND`` once installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import gradsurgery
from gradsurgery.cli import comparing, demo, diagnosing, explaining, listing

# Each has NAME, HELP, `arguments(parser)` and `run(args)`, which returns the exit code.
COMMANDS = (demo, listing, explaining, diagnosing, comparing)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words behind the program's name; those of the process by default.

    Returns:
        The exit code: 0 if all went well, 1 if there is no answer, 2 for arguments or an installation that do not do,
        130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="gradsurgery", description=gradsurgery.__doc__, epilog="`gradsurgery COMMAND --help` says more."
    )
    parser.add_argument("--version", action="version", version=f"gradsurgery {gradsurgery.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.arguments(own)
        own.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
