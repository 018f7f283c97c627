"""Modules that have moved: the old names go on working, and say where to look."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType


class Moved(ModuleType):
    """A module whose contents are elsewhere. It can be imported without a file; what is read from it warns.

    Args:
        name: The name that it had.
        places: For each of its public names where that is now, as "module:name".
        removed_in: The version without the old name.
    """

    def __init__(self, name: str, places: Mapping[str, str], removed_in: str):
        super().__init__(name, f"Moved to {', '.join(sorted({place.partition(':')[0] for place in places.values()}))}.")
        self.__spec__ = ModuleSpec(name, None)
        self.places = dict(places)
        self.removed_in = removed_in

    def __getattr__(self, name: str) -> object:
        if name not in self.places:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        home, _, new = self.places[name].partition(":")
        warnings.warn(
            f"{self.__name__}.{name} is now {home}.{new}. The old name goes in version {self.removed_in}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(home), new)


def register(table: Mapping[str, Mapping[str, str]], removed_in: str) -> None:
    """Let modules be imported under the names that they had.

    Args:
        table: For each old module its public names, and where each is now, as "module:name".
        removed_in: The version without the old names.
    """
    for name, places in table.items():
        sys.modules[name] = module = Moved(name, places, removed_in)
        parent, _, short = name.rpartition(".")
        vars(sys.modules[parent]).setdefault(short, module)  # but functions of these names stay what they are
