"""What the lower rooms ask of the upper ones, whose classes they do not know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradsurgery.batch import Batch, Layout
from gradsurgery.gradients.gram import Row
from gradsurgery.settings import Settings
from gradsurgery.solve import Problem
from gradsurgery.transaction import Transaction


class Losses(Protocol):
    """What is asked of the losses of a call before they are differentiated."""

    graph: Any
    comm: Any
    owned: list[Tensor]
    accumulated: Any

    @property
    def seeds(self) -> list[Tensor]: ...
    @property
    def roots(self) -> list[Any]: ...


class Wrapper(Protocol):
    """What is asked of an optimizer whose use is watched."""

    base: torch.optim.Optimizer
    transaction: Transaction

    @property
    def display_name(self) -> str: ...
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Rule(Protocol):
    """What is asked of a method; :class:`gradsurgery.surgery.base.Surgery` has all of it."""

    settings: Settings
    observes: bool
    rows_repeat_tasks: bool
    preference_scales_rows: bool
    degree: float | None

    @property
    def display_name(self) -> str: ...
    @property
    def is_alone(self) -> bool: ...
    @property
    def adds_rows(self) -> bool: ...
    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray: ...
    def smoothed(self, weights: np.ndarray) -> np.ndarray: ...
    def preferences(self) -> np.ndarray: ...
    def require_positive(self, losses: np.ndarray, why: str) -> None: ...
    def asked(self, problem: Problem) -> AbstractContextManager[object]: ...


class Inner(Protocol):
    """What is asked of a weighter inside a surgery."""

    def measure(self, batch: Batch) -> Tensor | None: ...


class Method(Rule, Protocol):
    """What else is asked of a surgery method, apart from its weights."""

    transaction: Transaction
    has_weights: bool
    moves_unreached: bool
    acts_on_private: bool
    sparse_refused: str
    streaming: bool
    lengthens: bool

    @property
    def inner(self) -> Inner | None: ...
    @property
    def undecided(self) -> bool: ...
    @property
    def needs_gram_only(self) -> bool: ...
    def promises(self, count: int) -> bool: ...
    def visiting_order(self) -> list[int]: ...
    def parts(self, shared: Sequence[Tensor], layout: Layout) -> dict[str, list[int]]: ...
    def part(self, name: str) -> AbstractContextManager[None]: ...
    def factors(self, values: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray: ...
    def seen(self, values: np.ndarray, factors: np.ndarray | None) -> np.ndarray: ...
    def observing(self, early: np.ndarray | None) -> AbstractContextManager[None]: ...
    def observe(self, rows: list[Row], losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Row]: ...
    def sent(self) -> Tensor | None: ...
    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None: ...
