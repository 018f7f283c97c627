"""The one interface of all ways to hold the gradients of m losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradsurgery.communication import Communicator, shards
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.descent import Direction
from gradsurgery.gradients.gram import Gram, Row, Table
from gradsurgery.gradients.rows import Add as Add


class Source(Protocol):
    """What engines ask of a batch."""

    owner: str
    tasks: Any
    graph: Any
    values: Tensor
    retain: list[bool]
    retain_graph: bool
    comm: Communicator
    features: tuple[Tensor, ...]
    masks: dict[Tensor, int] | None
    accumulated: Any
    samples: Any
    per_sample: str
    unsampled: str

    @property
    def seeds(self) -> list[Tensor]: ...
    @property
    def loss_scale(self) -> Tensor: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def roots(self) -> list[Any]: ...
    @property
    def is_scaled(self) -> bool: ...
    def largest_weights(self) -> np.ndarray: ...
    def rows(self, params: Sequence[Tensor], order: Iterable[int] | None = None) -> Iterator[tuple[int, Row]]: ...
    def rows_at(self, params: Sequence[Tensor], whole: bool = ...) -> Iterator[list[Tensor | None]]: ...
    def one_pass(self, weights: np.ndarray, params: Sequence[Tensor], last: bool) -> list[Tensor | None]: ...


class Stream(NamedTuple):
    """What a method without rows needs to know while gradients arrive.

    Attributes:
        order: In which order the losses come.
        priorities: What multiplies each gradient, (m,).
        promises: No loss may rise along the direction of two.
        learns: Projections are made.
    """

    order: Sequence[int]
    priorities: np.ndarray
    promises: bool
    learns: bool


class Request(NamedTuple):
    """What a step wants to have of the gradients.

    Attributes:
        batch: The losses.
        m: Number of losses.
        shared: The parameters that the surgery acts on, as far as it is known.
        plain: All others, which get the plain gradients.
        solves: New weights are to be found.
        one_pass: The weights are known before, or come from the features: one or two passes do.
        engine: The user's choice.
        gram_only: The method sees nothing of the rows but their inner products.
        named: The user has said which parameters are shared.
        apart: Losses are multiplied later, so that their plain gradients are kept apart.
        doubtful: Places of the shared parameters where zeros decide which losses reach them.
        row_dtype: What rows are rounded to while they wait, or None.
        row_device: Where they wait, or None.
        puts_away: Whether they wait elsewhere.
        stand_in: What stands for a parameter before the method.
        stream: For a method without rows.
        share: What `reduction` multiplies everything by.
        failed: What has turned out to be impossible with this model; engines add to it.
        step: Number of committed steps.
        checked: Graphs of which it was checked that samples keep to themselves, by signature; engines change it.
    """

    batch: Source
    m: int
    shared: list[Tensor]
    plain: list[Tensor]
    solves: bool
    one_pass: bool
    engine: str
    gram_only: bool
    named: bool
    apart: bool
    doubtful: list[int]
    row_dtype: torch.dtype | None
    row_device: torch.device | None
    puts_away: bool
    stand_in: Callable[[Tensor], Tensor]
    stream: Stream | None
    share: float
    failed: set[str]
    step: int
    checked: dict[str, str]


class Private:
    """Gradients of the parameters that no surgery touches.

    Args:
        params: The parameters.
        m: Number of losses.
        apart: Keep the losses apart; otherwise their sum is enough.
        device: Where the losses are.

    Attributes:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor], m: int, apart: bool, device: torch.device) -> None:
        self.params = list(params)
        self._terms: list[list[tuple[int, Tensor]]] = [[] for _ in params]
        self._norms: list[list[Tensor]] = [[] for _ in range(m)]
        self._unlooked: list[list[Tensor]] = [[] for _ in range(m)]
        self._apart = apart
        self._device = device
        self._is_summed = False
        self._joined: rows_module.Joined | None = None

    def add(self, i: int, row: Row) -> None:
        """Take the gradients of one loss; they leave the row.

        Args:
            i: Which loss.
            row: The gradients, one entry per parameter.
        """
        there = [(j, g) for j, g in enumerate(row) if g is not None]
        entries = [g for _, g in there]
        if sum([g.numel() for g in entries]) <= rows_module.SMALL:  # all losses are looked at together then
            self._unlooked[i] = entries
        else:
            self._norms[i] = rows_module.largest(entries, self._device)
        for j, g in there:
            row[j], terms = None, self._terms[j]
            if terms and not self._apart:
                g = rows_module.total(terms.pop()[1], g)
                self._is_summed = True
            terms.append((i, g))

    def take(self, p: Tensor, terms: list[tuple[int, Tensor]]) -> None:
        """Take a parameter that turned out to be private.

        Args:
            p: The parameter.
            terms: Its gradients, by loss.
        """
        for i, g in terms:
            self._norms[i] += rows_module.largest([g], self._device)
        self.params.append(p)
        self._terms.append(terms)

    def peak(self, i: int) -> Tensor:
        """The largest entry of one loss, which is not finite if any is not.

        Args:
            i: The loss.

        Returns:
            A scalar, float64.
        """
        norms = self._looked()[i]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([norm.double() for norm in norms]).max()

    def peaks(self) -> Tensor:
        """The same of all losses.

        Returns:
            (m,), float64.
        """
        if not self._is_summed and not any(self._norms):
            self._joined = rows_module.Joined.of(self.params, self._terms)
        if self._joined is not None:
            self._unlooked = [[] for _ in self._unlooked]
            return torch.from_numpy(self._joined.peaks(len(self._norms)))
        found = self._looked()
        count, norms = len(found[0]), [norm for row in found for norm in row]
        if count and len({len(row) for row in found}) == 1:
            return torch.stack(norms).view(-1, count).amax(1).double()
        return torch.stack([self.peak(i) for i in range(len(found))])

    def _looked(self) -> list[list[Tensor]]:
        """What was found of each loss. Gradients that wait to be looked at are, in one call for all losses."""
        waiting, self._unlooked = self._unlooked, [[] for _ in self._unlooked]
        together = [g for row in waiting for g in row]
        norms = rows_module.largest(together, self._device)
        if len(norms) == len(together):
            found = iter(norms)
            for i, row in enumerate(waiting):
                self._norms[i] += [next(found) for _ in row]
        else:  # of several kinds
            for i, row in enumerate(waiting):
                self._norms[i] += rows_module.largest(row, self._device)
        return self._norms

    def combine(self, factors: np.ndarray, comm: Communicator) -> dict[Tensor, Tensor | None]:
        """Add up, after which nothing else can be asked.

        Args:
            factors: What multiplies each loss, (m,).
            comm: The processes that share the work.

        Returns:
            The sums by parameter, as pieces where it is spread.
        """
        if not self.params:
            return {}
        by = factors.tolist()
        found: list[Tensor | None]
        if self._joined is not None:
            found = self._joined.scaled(factors, self.params)
        else:
            found = rows_module.scaled_alone(self.params, self._terms, by)
            for j, (p, terms) in enumerate(zip(self.params, self._terms, strict=True)):
                if found[j] is None:
                    found[j] = rows_module.plain([(by[i], g) for i, g in terms], shards.empty(p))
                terms.clear()  # there are never more than the gradients and one parameter
        return dict(zip(self.params, comm.totals(found, self.params), strict=True))


class Marks(NamedTuple):
    """Which losses have a gradient where.

    Attributes:
        there: In which shared parameter, (m, P), on this process.
        signs: For each doubtful parameter, and last for all together, whether a gradient is not zero, (m, D + 1); None
            where nothing is in doubt.
        reached: In any parameter, (m,).
    """

    there: list[list[bool]]
    signs: Tensor | None
    reached: list[bool]


class Gradients(ABC):
    """The gradients of m losses, however they are held, until they are added up.

    Args:
        request: What is wanted.

    Attributes:
        engine: What the report calls it.
        comm: The processes that share the work.
        reason: Why gradients are held in this way, in words; empty where there was nothing to choose.
        shared: The parameters that the surgery acts on.
        private: Gradients of all others.
        marks: Which losses have a gradient where; None where sharing was settled before.
        reached: Whether each loss reaches any parameter, where that shows without marks, (m,).
        tables: The rows of each group of the shared parameters, as the mathematics sees them; without any, nothing is
            measured.
        parts: Places of the shared parameters in each group.
        solved: The weights, where they had to be found on the way, (m,).
        norms: Lengths of the gradients, where they are all that was measured, (m,).
        silent: Shared parameters that no loss has reached.
        flags: What the report should have.
    """

    engine = "rows"

    def __init__(self, request: Request) -> None:
        self.request = request
        self.comm = request.batch.comm
        self.reason = ""
        self.shared = list(request.shared)
        self.private = Private(request.plain, request.m, request.apart, request.batch.values.device)
        self.marks: Marks | None = None
        self.reached: list[bool] | None = None
        self.tables: list[Table] = []
        self.parts: list[list[int]] = []
        self.solved: np.ndarray | None = None
        self.norms: np.ndarray | None = None
        self.silent: set[Tensor] = set()
        self.flags: list[str] = []

    def settle(  # noqa: B027  # nothing to do where sharing was settled before
        self,
        there: Sequence[Sequence[int]],
        unreached: Sequence[tuple[int, int]],
        private: Sequence[int],
        idle: Sequence[int],
    ) -> None:
        """Learn what is shared, now that the gradients are there. One process asks only where something changes by it.

        Args:
            there: Which losses reach which of the shared parameters, on any process, (m, P).
            unreached: Losses and places of parameters that they do not reach after all, by zeros.
            private: Places of parameters that one loss alone reaches: they leave the rows.
            idle: Places of parameters that no loss reaches and that the method leaves alone: likewise.
        """

    def partition(self, parts: list[list[int]]) -> None:
        """Group the shared parameters.

        Args:
            parts: Places of the parameters in each group.
        """
        self.parts = parts

    def peaks(self) -> list[Tensor]:
        """The largest plain gradient of each loss, on the device.

        Returns:
            (m,), to be added up over the processes; nothing where plain gradients are still to come.
        """
        return [self.private.peaks()]

    def products(self) -> list[Tensor]:
        """Inner products within each group, on the device.

        Returns:
            What is to be added up over the processes, and handed to :meth:`grams`.
        """
        return [table.products() for table in self.tables]

    def grams(self, products: Sequence[np.ndarray], scale: float) -> list[Gram]:
        """Gram matrices of the groups.

        Args:
            products: What :meth:`products` gave, on the host.
            scale: The loss scale, which gradients still have.

        Returns:
            One for each group.
        """
        return [
            Gram.of(table, table.repaired(found.reshape(len(table.rows), -1)), scale)
            for table, found in zip(self.tables, products, strict=True)
        ]

    def reaching(self, k: int) -> list[bool] | None:
        """Which losses reach the parameters of a group.

        Args:
            k: The group.

        Returns:
            (m,), or None if all do.
        """
        return None

    @property
    def balances(self) -> bool:
        """Whether two losses reach the shared parameters, so that there is something to balance."""
        return bool(self.shared)

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> Direction | None:
        """Add up the rows of a group so that no loss rises, where rounding could make one rise.

        Args:
            k: The group.
            gram: Its inner products.
            weights: w, (m,).

        Returns:
            The direction; None if no rounding matters.
        """
        return None

    def inside(self, gram: Gram, weights: np.ndarray) -> tuple[Gradients, np.ndarray]:
        """Weights along which no loss rises by rounding, where rows are never formed; or the rows themselves.

        Args:
            gram: The inner products.
            weights: w, (m,).

        Returns:
            What to add up, and the weights.
        """
        return self, weights

    def largest_weights(self) -> np.ndarray | float:
        """What rows can be multiplied by.

        Returns:
            The largest number, or one for each.
        """
        return rows_module.largest_factor([*self.shared, *self.private.params])

    #: Rounding may make a loss rise, and rows that could be looked at are never formed.
    may_rise = False

    #: Finite results say nothing of inf and nan that were never looked at.
    is_unseen = False

    @abstractmethod
    def combine(
        self, weights: Sequence[np.ndarray], factors: np.ndarray, held: Sequence[Direction | None], add: Add
    ) -> dict[Tensor, Tensor | None]:
        """Add up everything. Rows are freed meanwhile, and nothing else can be asked afterwards.

        Args:
            weights: Of the rows of each group.
            factors: Of the plain gradients, (m,).
            held: Directions that are added up already.
            add: Adds up the rows of one parameter.

        Returns:
            A new gradient by parameter, as pieces where it is spread; None if no loss reaches it.
        """


def collect(request: Request, private: Private, arrive: Callable[[int, Row], None]) -> Marks:
    """Differentiate the losses one by one.

    Args:
        request: What is wanted.
        private: Takes the plain gradients.
        arrive: Takes each row over the shared parameters.

    Returns:
        Which losses have a gradient where.
    """
    batch, count = request.batch, len(request.shared)
    everything = [*request.shared, *request.plain]
    there: list[list[bool]] = []
    signs: list[Tensor] = []
    reached: list[bool] = []
    sharded = batch.comm.is_sharded
    for i, row in batch.rows(everything):
        if sharded:
            row[:] = [None if g is None else batch.comm.local(g, p) for g, p in zip(row, everything, strict=True)]
        marks = [g is not None for g in row]
        reached.append(any(marks))
        there.append(marks[:count])
        private.add(i, row[count:])
        del row[count:]
        if request.doubtful:
            signs.append(signs_of(row, request.doubtful, private.peak(i)))
        arrive(i, row)
        del row
    return Marks(there, torch.stack(signs) if signs else None, reached)


def signs_of(row: Row, doubtful: Sequence[int], peak: Tensor) -> Tensor:
    """Whether the gradient of one loss is not zero: in each doubtful parameter, and in any parameter at all.

    Args:
        row: The gradient.
        doubtful: Places of the doubtful parameters.
        peak: The largest entry of the gradient elsewhere.

    Returns:
        (D + 1,), uint8.
    """
    norms = [rows_module.peak([] if (g := row[j]) is None else [g], peak.device) for j in doubtful]
    rest = rows_module.peak([g for g in row if g is not None], peak.device)
    return (torch.stack([*norms, torch.maximum(rest, peak)]) != 0).to(torch.uint8)
