"""Warnings that point at the user's line, and what may have been meant by a name that is not known."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable
from types import FrameType


def spelling(name: str) -> str:
    """A name without what people write differently.

    Args:
        name: The name.

    Returns:
        Small letters, without hyphens and underscores.
    """
    return name.lower().replace("-", "").replace("_", "")


def spellings(known: Iterable[str]) -> dict[str, str]:
    """Under what names may be looked up: by their small letters, "Weighter" at the end or not.

    Args:
        known: The names.

    Returns:
        Spellings to names.
    """
    names = list(known)
    return {spelling(name): name for name in names} | {spelling(name).removesuffix("weighter"): name for name in names}


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known.

    Args:
        name: The name.
        known: Those that there are.

    Returns:
        A sentence with a blank before it; empty if nothing is near.
    """
    folded, wanted = spellings(known), spelling(name)
    near = [wanted] if wanted in folded else difflib.get_close_matches(wanted, folded, n=3)
    names = dict.fromkeys(folded[key] for key in near)
    return f" Did you mean {' or '.join(names)}?" if names else ""


def calling_frame(levels: int) -> FrameType:
    """A frame of Python's stack.

    Args:
        levels: How far up: 0 for the function that asks, 1 for the one that called it.

    Returns:
        The frame.
    """
    frame = inspect.currentframe()
    for _ in range(levels + 1):
        assert frame is not None
        frame = frame.f_back
    assert frame is not None
    return frame


def warn(message: str) -> None:
    """Warn at the user's line, however many calls within this library and torch have led from there to here.

    Args:
        message: What to say.
    """
    frame, level = calling_frame(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_PASSED_OVER = ("gradsurgery", "torch")
