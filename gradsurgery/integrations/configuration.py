"""Methods by name, for configuration files."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

import gradsurgery
from gradsurgery.optimizer import MultiLossOptimizer, options_of, unknown_options
from gradsurgery.surgery.base import Surgery
from gradsurgery.text import spelling, spellings, suggestion
from gradsurgery.weighting.base import Weighter


def methods() -> dict[str, type[MultiLossOptimizer]]:
    """All methods that :func:`create` knows.

    Returns:
        Classes by name, in the order of the alphabet.

    Example:
        >>> len(gradsurgery.methods()) > 50, gradsurgery.methods()["PCGrad"]
        (True, <class 'gradsurgery.surgery.pcgrad.PCGrad'>)
    """
    found = {name: getattr(gradsurgery, name) for name in gradsurgery.__all__}
    bases = (MultiLossOptimizer, Surgery, Weighter)
    return {
        name: value
        for name, value in sorted(found.items(), key=lambda item: item[0].casefold())
        if inspect.isclass(value) and issubclass(value, MultiLossOptimizer) and value not in bases
    }


def method(name: str) -> type[MultiLossOptimizer]:
    """The class of a method, for programs that want something to call.

    Args:
        name: Its name, as :func:`methods` has it. Case, hyphens and underscores do not matter, and "Weighter" at the
            end may be left out: "PCGrad", "pcgrad", "nash-mtl", "aligned_mtl", "grad_norm".

    Returns:
        The class. It is called with the optimizer first and options by name.

    Raises:
        TypeError: `name` is not text.
        ValueError: No method has this name; the error says which are near.

    Example:
        >>> gradsurgery.method("nash-mtl")
        <class 'gradsurgery.surgery.nash_mtl.NashMTL'>
    """
    return _found("method", name)


def create(name: str, optimizer: Optimizer, **options: Any) -> MultiLossOptimizer:
    """Wrap an optimizer in a method that is chosen by name.

    Args:
        name: Its name, as in :func:`method`.
        optimizer: The optimizer that makes the step; for a surgery it may be a weighter. The methods that are the
            optimizer themselves, such as MultiAdam, take the parameters here.
        **options: Arguments of the method, by name.

    Returns:
        The method around the optimizer.

    Raises:
        TypeError: `name` is not text, or an option is missing or not known; the error names the options of the class.
        ValueError: No method has this name, or an option is out of range.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> type(gradsurgery.create("cagrad", optimizer, c=0.5))
        <class 'gradsurgery.surgery.cagrad.CAGrad'>
    """
    cls = _found("create", name)
    own, needed = _own_options(cls)
    everyone = f"It takes {_listed(own)}, and what every {_kind(cls)} takes: {_listed(options_of(_base(cls)))}."
    unknown = {key: value for key, value in options.items() if key not in options_of(cls)}
    if unknown and isinstance(optimizer, Optimizer):
        raise TypeError(f"create: {cls.__name__}: {unknown_options(cls, unknown, optimizer)} {everyone}")
    missing = [key for key in needed if key not in options]
    if missing:
        raise TypeError(f"create: {cls.__name__} needs {_listed(missing)}. {everyone}")
    return cls(optimizer, **options)


def _found(asking: str, name: str) -> type[MultiLossOptimizer]:
    if not isinstance(name, str):
        raise TypeError(f"{asking}: `name` must be the name of a method, got {name!r}.")
    known = methods()
    folded = spellings(known)
    if spelling(name) not in folded:
        raise ValueError(
            f"{asking}: there is no method {name!r}.{suggestion(name, known)} gradsurgery.methods() has all of them."
        )
    return known[folded[spelling(name)]]


def _own_options(cls: type[MultiLossOptimizer]) -> tuple[list[str], list[str]]:
    """Options that not every method of the kind has, and those of them without a default."""
    given = inspect.signature(cls).parameters
    first = next(iter(given))  # the optimizer, or the parameters of a method that is one itself
    own = [key for key in options_of(cls) if key not in (first, *options_of(_base(cls)))]
    return own, [key for key in own if key in given and given[key].default is inspect.Parameter.empty]


def _base(cls: type[MultiLossOptimizer]) -> type[MultiLossOptimizer]:
    return Surgery if issubclass(cls, Surgery) else Weighter


def _kind(cls: type[MultiLossOptimizer]) -> str:
    return "surgery" if issubclass(cls, Surgery) else "weighting"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no options of its own"
