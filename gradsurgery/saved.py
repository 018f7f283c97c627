"""What a saved memory must look like, so that one that was cut off or changed is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

#: Steps are a word of the key of the random stream.
MOST_STEPS = 2**63 - 1


def listed(keys: Iterable[object], most: int = 5) -> str:
    """The first few of some keys.

    Args:
        keys: The keys.
        most: How many to show.

    Returns:
        Text.
    """
    shown = list(map(repr, keys))
    return ", ".join([*shown[:most], *(["…"] if len(shown) > most else [])]) or "none"


def wrong_entry(entry: object) -> str:
    """What is wrong with the entry of this library in the state of an optimizer, its memory's contents aside.

    Args:
        entry: The entry.

    Returns:
        The end of a sentence; empty if all is well.
    """
    if not isinstance(entry, Mapping):
        return f"is a {type(entry).__name__}"
    if missing := [key for key in ("class", "version", "memory", "inner") if key not in entry]:
        return f"lacks {', '.join(missing)}"
    if not isinstance(entry["memory"], Mapping):
        return f"has a {type(entry['memory']).__name__} as its 'memory'"
    return "" if "step" in entry["memory"] else "lacks memory['step']"


def wrong_memory(memory: Mapping[Any, Any], known: bool) -> str:
    """What is wrong with the contents of a memory.

    Args:
        memory: The memory of a method, or of one part of the parameters.
        known: It is that of a method of this library, whose every entry is known.

    Returns:
        The end of a sentence; empty if all is well.
    """
    for key, value in memory.items():
        if isinstance(key, str) and key.startswith(("group ", "parameter ")) and isinstance(value, Mapping):
            if wrong := wrong_memory(value, known):
                return wrong
            continue
        kind = KINDS.get(key, "number by name" if known else "plain value")
        if not isinstance(key, str) or not _IS[kind](value):
            return f"has memory[{key!r}] = {_short(value)}, which is no {kind}"
    return ""


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:56]}…"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_row(value: object) -> bool:
    return _by(_is_count, lambda g: isinstance(g, Tensor))(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _by(key: Callable[[object], bool], entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(key, value)) and all(map(entry, value.values()))


def _each(entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(entry, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_name, value)) and len(set(value)) == len(value)


_IS: dict[str, Callable[[object], bool]] = {
    "number by name": _by(_is_name, _is_number),
    f"whole number from 0 to {MOST_STEPS}": _is_count,
    "list of different names": _are_names,
    "list of names": _each(_is_name),
    "list of places": _each(_is_count),
    "list of places by name": _by(_is_name, _each(_is_count)),
    "list of numbers by name": _by(_is_name, _each(_is_number)),
    "table of numbers by name": _by(_is_name, _by(_is_name, _is_number)),
    "row by name": _by(_is_name, _is_row),
    "row": _is_row,
    "plain value": _is_plain,
}
_COUNT = f"whole number from 0 to {MOST_STEPS}"

#: Entries that are no number for each loss.
KINDS = {
    "step": _COUNT,
    "tasks": "list of different names",
    "order": "list of different names",
    "last_private": "list of places",
    "nonzero": "list of places by name",
    "reached": "list of places by name",
    "updates": _COUNT,
    "seen": _COUNT,
    "tracked": "row by name",
    "average": "row by name",
    "momentum": "row by name",
    "last": "row by name",
    "roots": "row by name",
    "pseudo": "row",
    "second": "row",
    "targets": "table of numbers by name",
    "winners": "list of names",
    "window": "list of numbers by name",
    "fresh": "list of different names",
    "failed": "list of different names",
}
