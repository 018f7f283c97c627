"""The switches of a method: what a user may pass, and what that means for a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

#: What a step does about weights: find new ones, take the last ones, or leave them at one.
Phase = Literal["solve", "reuse", "warmup"]


@dataclass(frozen=True)
class Settings:
    """The validated switches of one method.

    Attributes:
        reduction: See :class:`gradsurgery.optimizer.MultiLossOptimizer`, as for all up to `debug`.
        nonfinite: As there.
        every: As there.
        warmup: As there.
        preference: As there, by name.
        weight_momentum: As there.
        min_weight: As there; -inf for none.
        max_weight: As there; inf for none.
        seed: As there.
        distributed: As there.
        process_group: As there.
        debug: As there.
        shared_params: See :class:`gradsurgery.surgery.base.Surgery`, as for all that follow.
        normalize: As there.
        log_losses: As there.
        granularity: As there.
        engine: As there.
        row_dtype: As there.
        row_device: As there.
    """

    reduction: Literal["sum", "mean"] = "sum"
    nonfinite: Literal["raise", "skip", "drop", "defer"] = "raise"
    every: int = 1
    warmup: int = 0
    preference: dict[str, float] | None = None
    weight_momentum: float = 0.0
    min_weight: float = -math.inf
    max_weight: float = math.inf
    seed: int = 0
    distributed: bool = False
    process_group: dist.ProcessGroup | None = None
    debug: bool = False
    shared_params: frozenset[Tensor] | None = None
    normalize: Literal["none", "l2", "loss", "loss+"] = "none"
    log_losses: bool = False
    granularity: Literal["all", "group", "parameter"] = "all"
    engine: Literal["auto", "rows", "ghosts", "blocks"] = "auto"
    row_dtype: torch.dtype | None = None
    row_device: torch.device | None = None

    def phase(self, memory: Mapping[str, Any], names: Sequence[str]) -> Phase:
        """Which kind of step this is, by the number of committed steps and the last weights.

        Args:
            memory: The method's memory.
            names: The losses of this batch.

        Returns:
            The kind.
        """
        since = memory["step"] - self.warmup
        if since < 0:
            return "warmup"
        last = memory.get("last_weights")
        return "solve" if since % self.every == 0 or last is None or set(last) != set(names) else "reuse"

    def share(self, m: int) -> float:
        """What `reduction` multiplies everything by.

        Args:
            m: Number of losses.

        Returns:
            1 or 1/m.
        """
        return 1.0 / m if self.reduction == "mean" else 1.0

    # What follows from the switches is found once, since these never change: other switches are another object.

    @cached_property
    def has_cadence(self) -> bool:
        """Whether steps of different kinds follow each other.

        Returns:
            True if so.
        """
        return self.every > 1 or self.warmup > 0

    @cached_property
    def puts_rows_away(self) -> bool:
        """Whether rows wait for the others in another precision or on another device.

        Returns:
            True if so.
        """
        return self.row_dtype is not None or self.row_device is not None

    @cached_property
    def is_bounded(self) -> bool:
        """Whether weights have bounds.

        Returns:
            True if so.
        """
        return self.min_weight > -math.inf or self.max_weight < math.inf

    @cached_property
    def changes_weights(self) -> bool:
        """Whether anything is done to the weights that a method gives.

        Returns:
            True if so.
        """
        return self.weight_momentum != 0 or self.is_bounded

    def bounded(self, weights: np.ndarray) -> np.ndarray:
        """Apply the bounds.

        Args:
            weights: (m,).

        Returns:
            (m,).
        """
        return weights.clip(self.min_weight, self.max_weight) if self.is_bounded else weights


class Switch:
    """An attribute that reads and writes one of the settings of its object."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, method: Any, owner: type | None = None) -> Any:
        return self if method is None else getattr(method.settings, self.name)

    def __set__(self, method: Any, value: Any) -> None:
        method.assign(self.name, value)


class InOrder(dict[str, Any]):
    """What the user gave as a sequence, under "0", "1" and so on: in the order of the losses of the first call."""


class Checks:
    """Checks of arguments: each returns the value, or raises an error that names class, argument and value.

    Args:
        owner: The class that errors should name.

    Attributes:
        by_order: Something was given in the order of the losses, which the first call fixes.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.by_order = False

    def choice(self, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        """Take one of some values.

        Args:
            name: Name of the argument.
            value: What was given.
            allowed: What may be given.

        Returns:
            The value.

        Raises:
            ValueError: It is none of them.
        """
        if value not in allowed:
            raise ValueError(f"{self.owner}: `{name}` must be one of {allowed}, got {value!r}.")
        return value

    def count(self, name: str, value: Any, least: int, below: float = math.inf) -> int:
        """Take an integer.

        Args:
            name: Name of the argument.
            value: What was given.
            least: The smallest that is allowed.
            below: All are smaller.

        Returns:
            The value.

        Raises:
            ValueError: It is no such integer.
        """
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
            bound = f" and < {below}" if below < math.inf else ""
            raise ValueError(f"{self.owner}: `{name}` must be an integer >= {least}{bound}, got {value!r}.")
        return value

    def number(
        self,
        name: str,
        value: Any,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> float:
        """Take a finite number.

        Args:
            name: Name of the argument.
            value: What was given.
            least: The smallest that is allowed.
            above: All are larger.
            most: The largest that is allowed.
            below: All are smaller.

        Returns:
            The value.

        Raises:
            ValueError: It is no such number.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{self.owner}: `{name}` must be a finite number, got {value!r}.")
        bounds = {
            f">= {least:g}": value >= least,
            f"> {above:g}": value > above,
            f"<= {most:g}": value <= most,
            f"< {below:g}": value < below,
        }
        for bound, holds in bounds.items():
            if not holds:
                raise ValueError(f"{self.owner}: `{name}` must be {bound}, got {value!r}.")
        return float(value)

    def bound(self, name: str, value: Any, none: float) -> float:
        """Take a finite number, or none.

        Args:
            name: Name of the argument.
            value: What was given; None or `none` for none.
            none: What stands for none.

        Returns:
            The value.
        """
        return none if value is None or value == none else self.number(name, value)

    def entries(self, name: str, given: Any, what: str = "numbers") -> dict[str, Any]:
        """Take something for each loss, by name or in order.

        Args:
            name: Name of the argument.
            given: What was given.
            what: What it should be, for the error.

        Returns:
            By name; `InOrder` if it was given in order.

        Raises:
            ValueError: It is neither.
        """
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise ValueError(f"{self.owner}: `{name}` must be {what} by name or in order, got {given!r}.")
        if isinstance(given, InOrder):  # what an attribute gave back
            return InOrder(given)
        if isinstance(given, Mapping):
            return {str(key): value for key, value in given.items()}
        self.by_order = True
        return InOrder((str(i), value) for i, value in enumerate(given))

    def numbers(self, name: str, given: Any, **bounds: float) -> dict[str, float]:
        """Take a number for each loss, by name or in order.

        Args:
            name: Name of the argument.
            given: What was given.
            **bounds: As for :meth:`number`.

        Returns:
            By name; `InOrder` if they were given in order.

        Raises:
            ValueError: One is no such number.
        """
        named = self.entries(name, given)
        for key, value in named.items():
            plain = value.item() if isinstance(value, (Tensor, np.generic)) else value
            named[key] = self.number(f"{name}[{key!r}]", plain, **bounds)
        return named

    def one_or_each(self, name: str, given: Any) -> float | dict[str, float]:
        """Take one number for all losses, or one for each.

        Args:
            name: Name of the argument.
            given: What was given.

        Returns:
            The number, or the numbers by name.

        Raises:
            ValueError: One is no finite number.
        """
        each = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
        return self.numbers(name, given) if each else self.number(name, given)

    def params(self, given: Any) -> list[Tensor]:
        """Take the argument `shared_params`: a parameter, several, or a module.

        Args:
            given: What was given.

        Returns:
            The parameters, at least one.

        Raises:
            TypeError: There is none, or something is no parameter.
        """
        if isinstance(given, torch.nn.Module):
            given = given.parameters()
        found = [given] if isinstance(given, Tensor) or not isinstance(given, Iterable) else list(given)
        if found and all(isinstance(p, Tensor) for p in found):
            return found
        wrong = "nothing" if not found else shown(next(p for p in found if not isinstance(p, Tensor)))
        raise TypeError(
            f"{self.owner}: `shared_params` must be a parameter or an iterable of parameters, at least one, such "
            f"as model.trunk.parameters(), or a module, got {wrong}."
        )

    def primary(self, primary: str | None) -> str | None:
        """Take the name of a loss; None stands for the first loss of the first call.

        Args:
            primary: What was given.

        Returns:
            The name, or None.

        Raises:
            TypeError: It is no name.
        """
        if primary is None:
            self.by_order = True
        elif not isinstance(primary, str):
            raise TypeError(f"{self.owner}: `primary` must be the name of a loss or None, got {primary!r}.")
        return primary


def shown(value: object) -> str:
    """Say what something is.

    Args:
        value: Anything.

    Returns:
        The words.
    """
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"
