"""One loss per sample: inner products of all gradients from one backward pass, and their sum from a second one.

The pass starts from random signs v, so that ‖Σ wᵢ gᵢ‖² as a second pass finds it is wᵀ G w only if no row has a part of
another one in it. Where the graph proves that each sample keeps to its own slots, what the first pass leaves is held,
and the second pass is spared.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.gradients import descent
from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Add, Gradients, Request
from gradsurgery.gradients.exact import exactly
from gradsurgery.gradients.gram import SAFE_SQUARES, Gram, Table
from gradsurgery.gradients.sample_graph import Key, Plan, Refused, SampleReader, Site, Value, mixing_node, named_first
from gradsurgery.gradients.sample_layers import Column, Known, Slots, Use, wide
from gradsurgery.graph import hooks
from gradsurgery.graph.samples import Along, Samples, candidates
from gradsurgery.graph.torch_private import foreach_norm, metadata

# Committed steps between two exact checks.
_EVERY = 100
# Signatures that are remembered.
_MOST_KNOWN = 8
# Powers of two that losses are multiplied by in a check.
_POWERS = (-3, 4)
# Entries below the smallest normal number times this are not compared, since multiplying them may round.
_SAFE = 2.0**16
# Where all of them are below this many times that, losses are multiplied by one more power of two first.
_ROOM = 2.0**48
_MOST_POWER = 100
# What ‖d‖² and wᵀ G w may differ by, relative to the square of Σ |wᵢ| ‖gᵢ‖.
_CERTIFIED = 1e-4
# The same in units of the coarsest precision of any gradient, where that is more.
_CERTIFIED_UNITS = 8.0
# How far products are off, relative to the lengths of the rows.
_NOISE, _NOISE_DOUBLE = 4e-6, 1e-13


class Rows(Table):
    """Rows that are never formed.

    Args:
        gram: Their inner products, (m, m).
        double: All parameters are in double precision.
        again: Finds the products in double precision, as far as what they follow from is held.
    """

    def __init__(self, gram: np.ndarray, double: bool, again: Callable[[], np.ndarray | None]) -> None:
        super().__init__([[] for _ in range(len(gram))], noise=_NOISE_DOUBLE if double else _NOISE)
        self._gram = gram
        self._again = again

    def products(self) -> Tensor:
        return torch.from_numpy(self._gram)

    def repaired(self, found: np.ndarray) -> np.ndarray:
        return found

    @property
    def is_double(self) -> bool:
        return False

    def part(self, keep: Sequence[int]) -> Table:
        again = self._again

        def fewer() -> np.ndarray | None:
            found = again()
            return None if found is None else found[np.ix_(keep, keep)]

        part = Rows(self._gram[np.ix_(keep, keep)], False, fewer)
        part._noise = self._noise
        return part

    def triangle(self) -> np.ndarray:
        """A square root of the products in double precision.

        Returns:
            (k, k).
        """
        found = self._again()
        return gram_module.square_root(self._gram if found is None else found)


class Pass:
    """Backward passes from one loss per sample down to the sites.

    Args:
        plan: The sites.
        samples: The graph.
        seeds: What each sample starts from, (B,).
    """

    def __init__(self, plan: Plan, samples: Samples, seeds: Tensor) -> None:
        self.plan = plan
        self.samples = samples
        self.seeds = seeds

    def run(self, factors: Tensor, retain: bool, consume: Callable[[int, Tensor], None]) -> None:
        """Differentiate Σ fᵢ lᵢ, and hand over the gradient at each site as it comes.

        Args:
            factors: f, (B,).
            retain: Keep the graph.
            consume: Takes the number of a site and the gradient at its output.
        """
        lowest = [k for k, site in enumerate(self.plan.sites) if site.is_lowest]
        edges: list[Any] = [GradientEdge(self.plan.sites[k].node, 0) for k in lowest]
        with ExitStack() as stack:
            for k, site in enumerate(self.plan.sites):
                if not site.is_lowest:
                    stack.callback(hooks.before(site.node, _handing(k, site.node, consume)).remove)
            found = rows_module.gradient(self.samples.edge, edges, self.seeds * factors, retain)
        for k, g in zip(lowest, found, strict=True):
            consume(k, _zeros(self.plan.sites[k].node) if g is None else g)


def _handing(k: int, node: Node, consume: Callable[[int, Tensor], None]) -> Callable[[Sequence[Tensor | None]], None]:
    def hand(gradients: Sequence[Tensor | None]) -> None:
        g = gradients[0]
        consume(k, _zeros(node) if g is None else g)

    return hand


def _zeros(node: Node) -> Tensor:
    entry = metadata(node)[0]
    return torch.zeros(tuple(entry.shape), dtype=entry.dtype, device=entry.device)


class Check:
    """Whether each sample keeps to its own slots, bit for bit: scaling by powers of two is exact.

    Args:
        passes: Runs backward passes.
        signs: v, (B,).
        rng: Draws powers.
    """

    def __init__(self, passes: Pass, signs: Tensor, rng: np.random.Generator) -> None:
        self.passes = passes
        self.signs = signs
        count = passes.samples.size
        powers = np.ldexp(1.0, rng.integers(_POWERS[0], _POWERS[1] + 1, count)) * rng.choice([-1.0, 1.0], count)
        self.powers = torch.from_numpy(powers).to(signs)
        self.found: list[Tensor] = []

    def make(self) -> str:
        """Make two passes, and find out whose the entries of each site are. The graph stays.

        Returns:
            The node that brings samples together; empty if none does.
        """
        first = self._taken(self.signs)
        second = self._taken(self.signs * self.powers)
        factor = self._room(first)
        compared = (first, second)
        if factor != 1.0:
            compared = self._taken(self.signs * factor), self._taken(self.signs * self.powers * factor)
        for site, a, b in zip(self.passes.plan.sites, *compared, strict=True):
            along = self._along(site, a, b)
            if along is None:
                return self._named(site, first)
            site.along = along
            for _, use in site.uses:
                use.axis = along.axis
        self.found = first
        return ""

    def _taken(self, factors: Tensor) -> list[Tensor]:
        taken: dict[int, Tensor] = {}
        self.passes.run(factors, True, taken.__setitem__)
        return [taken[k] for k in range(len(self.passes.plan.sites))]

    def _room(self, ds: Sequence[Tensor]) -> float:
        """What brings entries that are all too small to be multiplied exactly to where they are not."""
        peaks = [(float(torch.linalg.vector_norm(d, float("inf"))), torch.finfo(d.dtype).tiny) for d in ds if d.numel()]
        largest = max((peak for peak, _ in peaks), default=0.0)
        least = max((tiny for _, tiny in peaks), default=0.0) * _SAFE * _ROOM
        if not 0.0 < largest < least:
            return 1.0
        return float(2.0 ** min(-int(np.frexp(largest)[1]), _MOST_POWER))

    def _along(self, site: Site, a: Tensor, b: Tensor) -> Along | None:
        """Whose the entries of a site are; None if of no layout that is known."""
        if site.along is not None:
            return site.along if self._agrees(a, b, site.along) else None
        count = self.passes.samples.size
        axes = set.intersection(*(set(use.axes) for _, use in site.uses))
        for axis in sorted(axes, key=lambda k: (a.shape[k] != count, k)):
            for labels in candidates(a.shape[axis], count):
                if self._agrees(a, b, along := Along(axis, labels)):
                    return along
        return None

    def _agrees(self, a: Tensor, b: Tensor, along: Along) -> bool:
        labels = torch.from_numpy(along.labels).to(a.device)
        by = self.powers.to(a)[labels.clamp(min=0)]
        expected = a * by.view(-1, *(1,) * (a.dim() - 1 - along.axis)) if a.dim() else a * by
        if torch.equal(b, expected):  # as almost always
            return True
        if not bool(torch.isfinite(a).all()):  # the usual rule acts
            return True
        least = torch.finfo(a.dtype).tiny * _SAFE
        return bool(((b == expected) | ((b.abs() < least) & (a.abs() < least))).all())

    def _named(self, site: Site, first: Sequence[Tensor]) -> str:
        """What to call the node that brings samples together."""
        again = self._taken(self.signs)
        if not all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(first, again, strict=True)):
            raise Refused("two equal backward passes differ on this device, so that nothing can be compared")
        named = mixing_node(self.passes.samples, self.passes.plan.inner)
        return named or self._first_mixed() or type(site.node).__name__

    def _first_mixed(self) -> str:
        """The first node from the losses down below which samples do not keep to places of their own."""
        seen: list[dict[Node, Tensor]] = []
        samples, plan = self.passes.samples, self.passes.plan
        nodes = [node for node in samples.nodes if type(node).__name__ != "AccumulateGrad"]
        for factors in (self.signs, self.signs * self.powers):
            at: dict[Node, Tensor] = {}
            with ExitStack() as stack:
                for node in nodes:
                    stack.callback(hooks.before(node, _noting(at, node)).remove)
                rows_module.gradient(samples.edge, list(plan.params), self.passes.seeds * factors, True)
            seen.append(at)
        clean = {node: self._is_clean(a, seen[1][node]) for node, a in seen[0].items() if node in seen[1]}
        found = []
        for node in reversed(samples.nodes):
            below = [child for child, _ in samples.nodes[node] if child is not None and child not in plan.inner]
            if clean.get(node) and any(clean.get(child) is False for child in below):
                found.append(node)
        return named_first(found) or ""

    def _is_clean(self, a: Tensor, b: Tensor) -> bool:
        count = self.passes.samples.size
        return any(
            self._agrees(a, b, Along(axis, labels))
            for axis in range(a.dim())
            for labels in candidates(a.shape[axis], count)
        )


def _noting(at: dict[Node, Tensor], node: Node) -> Callable[[Sequence[Tensor | None]], None]:
    def note(gradients: Sequence[Tensor | None]) -> None:
        if gradients[0] is not None:
            at[node] = gradients[0]

    return note


class Collector:
    """Puts the gradients at sites together, value by value.

    Args:
        plan: The sites.
        size: Number of samples.
        take: Takes all uses of a value, once they have their gradients.
    """

    def __init__(self, plan: Plan, size: int, take: Callable[[Key, Column], None]) -> None:
        self._plan = plan
        self._size = size
        self._take = take
        self._slots: dict[bytes, Slots] = {}
        self._uses = Counter(key for site in plan.sites for key, _ in site.uses)
        self._waiting: dict[Key, list[tuple[Use, Tensor, Slots]]] = {}

    def consume(self, k: int, d: Tensor) -> None:
        """Take the gradient at one site.

        Args:
            k: Its number.
            d: The gradient at its output.
        """
        site = self._plan.sites[k]
        assert site.along is not None
        slots = self._slots_of(site.along, d.device)
        known: Known = {}
        for key, use in site.uses:
            parts = self._waiting.setdefault(key, [])
            parts.append((use, d, slots))
            if len(parts) == self._uses[key]:
                del self._waiting[key]
                with torch.no_grad(), exactly(d.device):
                    self._take(key, Column(parts, known))

    def _slots_of(self, along: Along, device: torch.device) -> Slots:
        key = along.labels.tobytes()
        if key not in self._slots:
            self._slots[key] = Slots(along.labels, self._size, device)
        return self._slots[key]


class PerSample(Gradients):
    """Gradients of one loss per sample.

    Args:
        request: What is wanted.
        samples: The losses.
        plan: The sites.
    """

    engine = "per sample"

    def __init__(self, request: Request, samples: Samples, plan: Plan) -> None:
        super().__init__(request)
        self._samples = samples
        self._plan = plan
        self._mode = request.batch.per_sample
        self._all = [*request.shared, *request.plain]
        self._rng = np.random.default_rng([request.step, samples.size])
        self._loss_seeds = torch.stack(list(request.batch.seeds))
        self._seeds = self._sample_seeds(torch.ones_like(self._loss_seeds))
        signs = self._rng.choice([-1.0, 1.0], samples.size)
        self._signs = torch.from_numpy(signs).to(self._seeds)
        self._passes = Pass(plan, samples, self._seeds)
        # What waits for the end of the pass.
        self._derived: list[tuple[Value, Tensor]] = []
        self._by_rows = plan.by_rows()
        # What is left of the passes: of each value the inner products, and what they follow from, or rows.
        self._columns: dict[Key, Column] = {}
        self._grams: dict[Key, Tensor] = {}
        self._signed: dict[int, Tensor] = {}
        self._direct: dict[int, Tensor] = {}
        self._keeps = False
        # Hooks on the way may bring samples together in any step, whatever they did in the last one.
        self._is_watched = False

    # ------------------------------------------------------------------------------------------- the pass

    @classmethod
    def gather(cls, request: Request) -> PerSample | str:
        """Differentiate all losses in one pass, where each depends on one sample.

        Args:
            request: What is wanted.

        Returns:
            The gradients, or why samples were not found.

        Raises:
            Refused: Samples cannot be told apart.
        """
        batch = request.batch
        samples: Samples | None = batch.samples
        if samples is None:
            return batch.unsampled
        params = [*request.shared, *request.plain]
        _require_single(params)
        reader = SampleReader(samples, params)
        plan = reader.plan()
        is_watched = reader.is_watched
        if batch.per_sample == "auto" and is_watched:
            raise Refused("functions or hooks look at gradients on the way, which would be those of weighted sums")
        found = cls(request, samples, plan)
        found._is_watched = is_watched
        signature = plan.signature(samples)
        if batch.per_sample == "auto":
            _require_auto(plan, samples, request, signature)
        found._measure(signature)
        return found

    def _measure(self, signature: str) -> None:
        request, plan = self.request, self._plan
        checked, collector = request.checked, Collector(plan, self._samples.size, self._take)
        due = request.step % _EVERY == 0 or signature not in checked or (self._is_watched and self._mode == "keep")
        # On the user's word too, a check is made in full: the powers of two samples may be equal by chance.
        is_proven = plan.is_proven and not self._is_watched
        on_word = self._mode == "keep" and (is_proven or not due)
        chosen = self._mode not in ("keep", "rerun") and is_proven and self._fits()
        self._keeps = on_word or chosen
        last = self._keeps and not plan.direct and not request.batch.retain_graph
        if due:
            check = Check(self._passes, self._signs, self._rng)
            named = check.make()
            if named:
                request.failed.add(f"coupled {signature}")
                raise Refused(_coupled(named))
            layouts = "".join(_written(site.along, self._samples.size) for site in plan.sites)
            known = {key: value for key, value in checked.items() if key != signature}
            for key in list(known)[: max(0, len(known) + 1 - _MOST_KNOWN)]:
                del known[key]
            checked.clear()
            checked.update({**known, signature: layouts})
            for k, d in enumerate(check.found):
                collector.consume(k, d)
        else:
            for site, letter in zip(plan.sites, checked[signature], strict=True):
                if site.along is None:
                    site.along = _read(letter, tuple(metadata(site.node)[0].shape), self._samples.size)
                    for _, use in site.uses:
                        use.axis = site.along.axis
            self._passes.run(self._signs, not last, collector.consume)
        self._signed, self._derived = _led_on(self._derived, self._all, not self._is_watched), []
        self._differentiate_direct()
        how = "held from it" if self._keeps else "found by a second one"
        self.reason = f"one pass for {self._samples.size} samples; the direction is {how}"

    def _fits(self) -> bool:
        """Whether what would be held is no more than what a backward pass works with: inputs and weights."""
        held = inputs = 0
        for site in self._plan.sites:
            held += int(np.prod(tuple(metadata(site.node)[0].shape)))
            for _, use in site.uses:
                given = getattr(use, "inputs", None)
                inputs += int(np.prod(use.shape)) + (0 if given is None else given.numel())
        return held <= 2 * inputs

    def _take(self, key: Key, column: Column) -> None:
        value = self._plan.values[key]
        if key in self._by_rows:
            self._derived.append((value, column.whole()))
            return
        column.keep()
        if self._keeps:
            self._columns[key] = column
        self._grams[key] = _products(column)

    def _differentiate_direct(self) -> None:
        """A pass per loss for the parameters that no site gives."""
        if not self._plan.direct:
            return
        batch, params = self.request.batch, [self._all[place] for place in self._plan.direct]
        rows: list[list[Tensor | None]] = []
        for i in range(self.request.m):
            one = torch.zeros(self.request.m, dtype=self._seeds.dtype, device=self._seeds.device)
            one[i] = 1.0
            seeds = self._sample_seeds(one)
            last = self._keeps and not batch.retain_graph and i == self.request.m - 1
            rows.append(rows_module.gradient(self._samples.edge, params, seeds, not last))
        for k, place in enumerate(self._plan.direct):
            column = [row[k] for row in rows]
            there = next((g for g in column if g is not None), None)
            if there is not None:
                dense = [torch.zeros_like(there.to_dense() if there.is_sparse else there) if g is None
                         else g.to_dense() if g.is_sparse else g for g in column]  # fmt: skip
                self._direct[place] = torch.stack(dense).reshape(len(dense), -1)

    def _sample_seeds(self, per_loss: Tensor) -> Tensor:
        """What each sample starts from, if the losses start from their seeds times these numbers.

        Args:
            per_loss: (m,).

        Returns:
            (B,).
        """
        seeds, groups = self._loss_seeds, self._samples.groups
        if groups is None:
            return seeds * per_loss.to(seeds)
        roots = self.request.batch.roots
        edge: Any = self._samples.edge
        scaled = (seeds * per_loss.to(seeds)).unbind()
        found = rows_module.one_pass(roots, list(scaled), [edge], True, "grad")[0]
        assert found is not None
        return found

    def _per_sample(self, weights: np.ndarray) -> Tensor:
        """Weights of the losses as weights of the samples."""
        w = torch.from_numpy(np.asarray(weights, np.float64)).to(self._seeds.device)
        return (
            w
            if self._samples.groups is None
            else torch.where(self._samples.groups < 0, 0.0, w[self._samples.groups.clamp(min=0)])
        )

    # --------------------------------------------------------------------------------------- inner products

    def summed(self, places: set[int], double: bool) -> np.ndarray:
        """Inner products over some parameters.

        Args:
            places: Of all parameters, which.
            double: In double precision, where what they follow from is held.

        Returns:
            (m, m), with the loss scale.
        """
        count = self._samples.size
        device = self._seeds.device
        by_sample = torch.zeros(count, count, dtype=torch.float64, device=device)
        for key, gram in self._grams.items():
            if self._plan.values[key].places[0] in places:
                again = double and key in self._columns
                by_sample += (self._columns[key].gram(True) if again else gram).to(device)
        for place in places & self._signed.keys():
            by_sample += gram_module.gram_in([[row] for row in self._signed[place]], torch.float64).to(device)
        signs = self._signs.double()
        by_sample *= signs[:, None] * signs
        found = self._grouped(by_sample)
        for place in places & self._direct.keys():
            found = found + gram_module.gram_in([[row] for row in self._direct[place]], torch.float64).to(device)
        # Terms of a sum over samples may cancel.
        products: np.ndarray = found.cpu().numpy()
        np.fill_diagonal(products, np.maximum(products.diagonal(), 0.0))
        return products

    def _grouped(self, by_sample: Tensor) -> Tensor:
        groups = self._samples.groups
        if groups is None:
            return by_sample
        mine = groups >= 0
        by_sample, groups = by_sample[mine][:, mine], groups[mine]
        half = by_sample.new_zeros(self.request.m, by_sample.shape[1]).index_add_(0, groups, by_sample)
        return half.new_zeros(self.request.m, self.request.m).index_add_(1, groups, half)

    def partition(self, parts: list[list[int]]) -> None:
        self.parts = parts
        double = all(p.dtype == torch.float64 for p in self.shared)
        itself = weakref.ref(self)  # or the two would hold each other

        def again(part: Sequence[int]) -> np.ndarray | None:
            gradients = itself()
            return None if gradients is None else gradients.summed(set(part), True)

        self.tables = [Rows(self.summed(set(part), False), double, partial(again, part)) for part in parts]

    def peaks(self) -> list[Tensor]:
        if not self.request.plain:
            return [torch.zeros(self.request.m, dtype=torch.float64)]
        start = len(self.request.shared)
        squares = self.summed(set(range(start, len(self._all))), False).diagonal()
        return [torch.from_numpy(np.sqrt(squares))]

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> descent.Direction | None:
        if k and not descent.is_certain(gram.table, gram.values, weights):  # `inside` looks at the first group
            self.may_rise = True
        return None

    def inside(self, gram: Gram, weights: np.ndarray) -> tuple[Gradients, np.ndarray]:
        if not np.isfinite(weights).all() or descent.is_certain(gram.table, gram.values, weights):
            return self, weights
        moved = descent.moved_inside(gram.table, gram.values, weights)
        if moved is None:
            self.may_rise = True
            return self, weights
        return self, moved

    # ------------------------------------------------------------------------------------------ the direction

    @torch.no_grad()
    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        found: dict[Tensor, Tensor | None] = {}
        start = len(self.request.shared)
        jobs = [*zip(self.parts, weights, strict=False), (list(range(start, len(self._all))), factors)]
        for k, (part, w) in enumerate(jobs):
            if part:
                last = not any(p for p, _ in jobs[k + 1 :])
                if not self._keeps:
                    found.update(self._rerun(part, w, last))
                    continue
                with exactly(self._seeds.device):
                    found.update(self._kept(part, w))
        self._columns, self._grams, self._signed, self._direct, self.tables = {}, {}, {}, {}, []
        return found

    def _kept(self, places: Sequence[int], weights: np.ndarray) -> dict[Tensor, Tensor | None]:
        by_sample = self._per_sample(weights)
        signed = by_sample * self._signs.double()
        found: dict[Tensor, Tensor | None] = {self._all[place]: None for place in places}
        for key, column in list(self._columns.items()):
            place = self._plan.values[key].places[0]
            if place in places:
                p = self._all[place]
                found[p] = _as(column.weighted(signed), p)
                del self._columns[key]
        for rows_of, w in ((self._signed, signed), (self._direct, torch.from_numpy(weights))):
            for place in rows_of.keys() & set(places):
                p, rows = self._all[place], rows_of[place]
                found[p] = _plus(found[p], _as((w.to(rows) @ rows).view(p.shape), p))
        return found

    def _rerun(self, places: Sequence[int], weights: np.ndarray, last: bool) -> dict[Tensor, Tensor | None]:
        """A second pass, weighted; the rows that were multiplied must add up to the same length."""
        params = [self._all[place] for place in places]
        expected = self.summed(set(places), False) if np.isfinite(weights).all() else None
        batch = self.request.batch
        retain = batch.retain_graph or not last or self._mode == "auto"
        seeds = self._sample_seeds(torch.from_numpy(np.asarray(weights, np.float64)))
        edge: Any = self._samples.edge
        with rows_module.emptied(params):  # autograd's own rules on memory that is shared apply
            gradients = rows_module.one_pass([edge], [seeds], params, retain, "accumulate")
        if expected is not None:
            self._certify(weights, expected, gradients)
        return dict(zip(params, gradients, strict=True))

    def _certify(self, weights: np.ndarray, gram: np.ndarray, gradients: Sequence[Tensor | None]) -> None:
        there = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
        found = sum(float(norm) ** 2 for norm in foreach_norm(list(map(wide, there)))) if there else 0.0
        if not SAFE_SQUARES[0] <= found <= SAFE_SQUARES[1]:
            found = sum(float(torch.linalg.vector_norm(g.double())) ** 2 for g in there)
        size = float(np.abs(weights) @ np.sqrt(np.maximum(gram.diagonal(), 0.0))) ** 2
        if not np.isfinite(found) or not np.isfinite(size):  # the usual rule acts
            return
        dtypes = {metadata(site.node)[0].dtype for site in self._plan.sites}
        dtypes |= {g.dtype for g in gradients if g is not None}
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        if abs(found - float(weights @ gram @ weights)) > max(_CERTIFIED, _CERTIFIED_UNITS * coarsest) * size:
            named = mixing_node(self._samples, self._plan.inner) or "a node that the check has passed before"
            raise Refused(_coupled(named))


def _led_on(derived: Sequence[tuple[Value, Tensor]], params: Sequence[Tensor], together: bool) -> dict[int, Tensor]:
    """Rows of what is made of parameters, carried down to these, and of what else uses these."""
    found: dict[int, Tensor] = {}
    for value, rows in derived:
        below: Sequence[Tensor | None] = [rows]
        if value.edge is not None:
            entry = metadata(value.edge.node)[value.edge.output_nr]
            shaped = rows.view(len(rows), *entry.shape).to(entry.dtype)
            below = _carried(value.edge, [params[place] for place in value.places], shaped, together)
        for place, g in zip(value.places, below, strict=True):
            if g is not None:
                g = g.reshape(len(rows), -1)
                found[place] = g + found[place] if place in found else g
    return found


def analysed(samples: Samples, params: Sequence[Tensor], seeds: Tensor, products: bool) -> Tensor:
    """Inner products or lengths of the gradients of samples, after an exact check. The graph stays.

    Args:
        samples: The losses.
        params: The parameters.
        seeds: What each sample starts from, (B,).
        products: All inner products; otherwise the squared lengths alone, which need none.

    Returns:
        (B, B) or (B,), float64.

    Raises:
        Refused: Samples cannot be told apart.
    """
    _require_single(params)
    reader = SampleReader(samples, params)
    plan = reader.plan()
    rng = np.random.default_rng(samples.size)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], samples.size)).to(seeds)
    check = Check(Pass(plan, samples, seeds), signs, rng)
    if named := check.make():
        raise Refused(_coupled(named))
    size = samples.size
    total = torch.zeros((size, size) if products else size, dtype=torch.float64, device=seeds.device)
    derived: list[tuple[Value, Tensor]] = []

    by_rows = plan.by_rows()

    def take(key: Key, column: Column) -> None:
        if key in by_rows:
            derived.append((plan.values[key], column.whole()))
        else:
            total.add_(_products(column) if products else column.squares())

    collector = Collector(plan, size, take)
    for k, d in enumerate(check.found):
        collector.consume(k, d)
    rows = [*_led_on(derived, params, not reader.is_watched).values(), *_rows_one_by_one(samples, plan, seeds, signs)]
    for r in rows:
        total += gram_module.gram_in([[row] for row in r], torch.float64) if products else r.double().square().sum(1)
    return total * signs.double()[:, None] * signs.double() if products else total


def _rows_one_by_one(samples: Samples, plan: Plan, seeds: Tensor, signs: Tensor) -> Iterator[Tensor]:
    """Rows of the parameters that no site gives, times signs."""
    params = [plan.params[place] for place in plan.direct]
    passes = [
        rows_module.gradient(samples.edge, params, torch.zeros_like(seeds).index_fill_(0, one, 1) * seeds * signs, True)
        for one in torch.arange(samples.size if params else 0, device=seeds.device).unbind()
    ]
    for k, column in enumerate(zip(*passes, strict=True)):
        if any(g is not None for g in column):
            dense = [torch.zeros_like(params[k]) if g is None else g.to_dense() for g in column]
            yield torch.stack(dense).reshape(samples.size, -1)


def _carried(edge: Any, params: Sequence[Tensor], gradients: Tensor, together: bool) -> Sequence[Tensor | None]:
    """Many gradients at one place, carried down to parameters: side by side, if they may and operations know how."""
    if together:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of an operation that goes through a batch one by one
                return torch.autograd.grad(
                    [edge], params, [gradients], retain_graph=True, is_grads_batched=True, allow_unused=True
                )
        except (RuntimeError, Warning):
            pass
    rows = [rows_module.gradient(edge, params, g, True) for g in gradients]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _products(column: Column) -> Tensor:
    """Inner products, in double precision where single precision does not hold them."""
    found = column.gram(False)
    low, high = SAFE_SQUARES
    squares = found.diagonal()
    unsafe = ~((squares >= low) & (squares <= high))
    if bool(unsafe.any()) and bool((column.squares()[unsafe] > 0).any()):
        return column.gram(True)
    return found


def _require_single(params: Sequence[Tensor]) -> None:
    for p in params:
        if p.is_complex():
            raise Refused("complex parameters have no real products of inputs and gradients")


def _require_auto(plan: Plan, samples: Samples, request: Request, signature: str) -> None:
    """What ``engine="auto"`` asks for beyond what is right: that nothing is tried in vain."""
    if plan.direct:
        raise Refused(f"{len(plan.direct)} parameters would need a pass per loss")
    named = mixing_node(samples, plan.inner)
    if named is not None:
        raise Refused(_coupled(named))
    if not plan.is_proven:
        named = mixing_node(samples, plan.inner, surely=False) or "an operation"
        raise Refused(f"the graph does not tell whether {named} brings samples together; per_sample=True finds out")
    if f"coupled {signature}" in request.failed:
        raise Refused("an earlier step has shown that samples depend on each other")


_HINTS = {
    "NativeBatchNormBackward0": "put batch norms into eval mode, or use GroupNorm or LayerNorm",
    "CudnnBatchNormBackward0": "put batch norms into eval mode, or use GroupNorm or LayerNorm",
}


def _coupled(node: str) -> str:
    if node in _HINTS:
        return f"{node} brings samples together, so that a loss depends on others than its own: {_HINTS[node]}"
    return (
        f"{node} brings samples together, so that a loss depends on others than its own, or puts them into an order "
        "that is not followed: compute each loss from its own sample, in the order of the batch"
    )


def _written(along: Along | None, count: int) -> str:
    """A layout as a letter of the alphabet: axis and order."""
    assert along is not None
    times = len(along.labels) // count
    second = times > 1 and len(along.labels) > 1 and along.labels[0] != along.labels[1]
    return chr(ord("a") + 2 * along.axis + second)


def _read(letter: str, shape: tuple[int, ...], count: int) -> Along:
    axis, second = divmod(ord(letter) - ord("a"), 2)
    layouts = list(candidates(shape[axis], count)) if axis < len(shape) else []
    if not layouts:
        raise Refused("the layout of a layer has changed since it was checked")
    return Along(axis, layouts[min(second, len(layouts) - 1)])


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient with the shape, dtype, device and strides of its parameter."""
    if gradient.is_sparse:
        return gradient.to(like.dtype)
    same = gradient.dtype == like.dtype and gradient.device == like.device and gradient.stride() == like.stride()
    return gradient if same else torch.empty_like(like, requires_grad=False).copy_(gradient)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else rows_module.total(a, b)
