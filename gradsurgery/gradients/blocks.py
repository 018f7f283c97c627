"""Inner products with the memory of one block of the model at a time.

Where all ways from the losses to the parameters below go through one place of the graph, the m gradients at that place
are all that the part below needs of the part above. So the rows are formed from one such place to the next, multiplied,
and freed. A weighted backward pass through the whole graph at the end gives the direction. It costs one pass more than
keeping the rows, and the memory of the largest block.

That pass gives the sum of the rows if all that it meets is linear. Hooks of the user may not be, and would see one pass
more than there are losses, so that rows are formed where there may be some. The users' functions are compared
(linear.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Add, Request
from gradsurgery.gradients.descent import Direction
from gradsurgery.gradients.formed import Formed, refusal
from gradsurgery.gradients.ghost_graph import has_tensor_hooks
from gradsurgery.gradients.gram import Row, Table
from gradsurgery.gradients.linear import Functions
from gradsurgery.graph import Front, Nodes, Root, hooks, is_users, origins
from gradsurgery.graph.torch_private import metadata

# Blocks are put together as long as they stay below this share of all parameters, or below the largest of them: each
# one costs m more calls of autograd.
_SHARE = 1 / 5


class Block(NamedTuple):
    """A part of the graph.

    Attributes:
        edge: Where it begins; None for the one that begins at the losses.
        places: Places of the shared parameters that it reaches without leaving it, and that no block before it reaches.
            Where one is used further down too, the pass through this block goes on to there.
    """

    edge: GradientEdge | None
    places: tuple[int, ...]


class Found(Table):
    """The inner products of m rows that are never there at once.

    Args:
        plan: The blocks.
        roots: Where differentiation starts, (m,).
        seeds: Gradient of the objective with respect to each loss, m scalars.
        retain_graph: Keep the graph at the end.
        single: Count parameters too that only one loss reaches.

    Attributes:
        rows: For each loss and shared parameter something if there is a gradient, else None.
        others: Gradients of parameters that are not shared, m lists.
        gram: The inner products, (m, m), float64; zeros before the sweep that finds them.
        functions: The users' functions that passes meet.
    """

    def __init__(
        self,
        plan: Plan,
        roots: Sequence[Root],
        seeds: Sequence[Tensor],
        retain_graph: bool,
        single: bool,
    ) -> None:
        super().__init__([])
        m = len(roots)
        self.rows: list[Row] = [[None] * len(plan.shared) for _ in range(m)]
        self.others: list[Row] = []
        self._plan = plan
        self._roots = list(roots)
        self._seeds = list(seeds)
        self._retain = retain_graph
        self._single = single
        self._dropped: set[int] = set()
        self._keep = list(range(m))
        self.gram: Tensor = torch.zeros(m, m, dtype=torch.float64)
        self.functions = Functions(plan.functions, m, *plan.coarsest)
        # The largest entry of each loss in the first block: where it is zero, all below is.
        self._alive: list[Tensor] = []

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """The parameters that the rows are over.

        Returns:
            Those that the plan was made for.
        """
        return self._plan.shared

    def sweep(self, others: Sequence[Tensor] | None, least: torch.dtype) -> Tensor:
        """Go through the blocks from the losses down, with all losses.

        Args:
            others: Parameters that need the gradient of each loss too; None in a second sweep.
            least: Half and single precision are multiplied in this one.

        Returns:
            J Jᵀ, (m, m), float64.
        """
        with self.functions:
            return self._sweep(others, least)

    def _sweep(self, others: Sequence[Tensor] | None, least: torch.dtype) -> Tensor:
        m, blocks = len(self._roots), self._plan.blocks
        gram: Tensor | None = None
        tops: list[Tensor | None] = [None] * m
        for b, block in enumerate(blocks):
            below = blocks[b + 1].edge if b + 1 < len(blocks) else None
            inner: list[Any] = [self.shared[place] for place in block.places]
            if below is not None:
                inner.append(below)
            extra = [] if others is None or b else list(others)
            rows: list[Row] = []
            for i in range(m):
                self.functions.begin(i)
                found = self._through(block, i, tops[i], [*inner, *extra])
                if others is not None and b == 0:
                    self.others.append(found[len(inner) :])
                    self._alive.append(rows_module.peak([g for g in found if g is not None], self._seeds[i].device))
                tops[i] = found[len(inner) - 1] if below is not None else None
                rows.append(found[: len(block.places)])
                del found
                for place, g in zip(block.places, rows[i], strict=True):
                    if g is not None:
                        self.rows[i][place] = g.new_empty(0)
            if (part := self._products(rows, least)) is not None:
                gram = part if gram is None else gram + part.to(gram.device)
        return torch.zeros(m, m, dtype=torch.float64) if gram is None else (gram + gram.T) / 2

    def _through(self, block: Block, i: int, top: Tensor | None, inner: Sequence[Any]) -> Row:
        """Differentiate loss i within a block."""
        if block.edge is None:
            return rows_module.gradient(self._roots[i], inner, self._seeds[i], True) if inner else []
        if top is None:
            return [None] * len(inner)
        return rows_module.gradient(block.edge, inner, top, True)

    def _products(self, rows: list[Row], least: torch.dtype) -> Tensor | None:
        if not self._single:
            # What only one loss reaches is private after all.
            there = [sum(g is not None for g in column) for column in zip(*rows, strict=True)]
            rows = [[g for g, n in zip(row, there, strict=True) if n > 1] for row in rows]
        if not any(g is not None for row in rows for g in row):
            return None
        with torch.no_grad():
            return gram_module.gram_in(rows, least)

    def reached(self) -> list[int]:
        """Find out which losses have a gradient in which parameter.

        Returns:
            For each shared parameter a bit mask: bit i is set if loss i reaches it.
        """
        return [sum(1 << i for i, g in enumerate(column) if g is not None) for column in zip(*self.rows, strict=True)]

    def drop(self, places: Sequence[int]) -> None:
        """Take parameters out of the rows.

        Args:
            places: Their places. At most one loss reaches each of them.
        """
        self._dropped.update(places)

    def row(self, i: int, place: int) -> Tensor | None:
        """Form one gradient after all, in a backward pass of its own.

        Args:
            i: The loss.
            place: The shared parameter.

        Returns:
            Its gradient, or None if the loss does not reach the parameter.
        """
        if self.rows[i][place] is None:
            return None
        return rows_module.gradient(self._roots[i], [self.shared[place]], self._seeds[i], True)[0]

    def whole(self) -> list[Row]:
        """Form all rows after all, after which the graph is gone.

        Returns:
            m rows over the shared parameters.
        """
        rows: list[Row] = []
        for i, (root, seed) in enumerate(zip(self._roots, self._seeds, strict=True)):
            row: Row = [None] * len(self.shared)
            places = [place for place, g in enumerate(self.rows[i]) if g is not None and place not in self._dropped]
            keep = self._retain or i < len(self._roots) - 1
            found = rows_module.gradient(root, [self.shared[place] for place in places], seed, keep)
            for place, g in zip(places, found, strict=True):
                row[place] = g
            rows.append(row)
        return rows

    def products(self) -> Tensor:
        """Inner products, found already.

        Returns:
            (m, m), float64.
        """
        return self.gram

    def repaired(self, found: np.ndarray) -> np.ndarray:
        """Replace products that left the range of float32.

        Args:
            found: The products, (m, m).

        Returns:
            (m, m).
        """
        low, high = gram_module.SAFE_SQUARES
        squares = found.diagonal()
        doubtful = np.flatnonzero(~((squares >= low) & (squares <= high)))
        # A row of exact zeros is common (an inactive hinge) and needs no second look.
        if self.noise < 1e-12 or not any(float(self._alive[i]) > 0 for i in doubtful):
            return self._in_range(found)
        return self.sweep(None, torch.float64).cpu().numpy()

    def triangle(self) -> np.ndarray:
        """A square root of the Gram matrix, from products in double precision; see :func:`.gram.triangle`.

        Returns:
            (m, m).
        """
        if self.unit != 1.0:  # float64 does not hold the products
            return gram_module.triangle([self._formed()[i] for i in self._keep])
        exact = self.sweep(None, torch.float64).cpu().numpy()
        return gram_module.square_root(exact[np.ix_(self._keep, self._keep)])

    def _formed(self) -> list[Row]:
        return [[self.row(i, place) for place in range(len(self.shared))] for i in range(len(self._roots))]

    @property
    def is_double(self) -> bool:
        """Whether products are made in double precision."""
        return False

    @property
    def noise(self) -> float:
        """How far products may be off, relative to the lengths of the two rows."""
        return gram_module.precision([list(self.shared)] * len(self._roots))

    def part(self, keep: Sequence[int]) -> Found:
        """Some of the rows.

        Args:
            keep: Their places.

        Returns:
            The same rows, not copied.
        """
        part = Found(self._plan, self._roots, self._seeds, self._retain, self._single)
        part.unit, part.far_apart = self.unit, self.far_apart
        part.rows = [self.rows[i] for i in keep]
        part._keep = [self._keep[i] for i in keep]
        return part

    def combine(self, weights: Sequence[float]) -> list[Tensor | None]:
        """Add up the rows, Σ wᵢ gᵢ, in one backward pass, after which the graph is gone.

        Args:
            weights: w, (m,).

        Returns:
            One gradient a shared parameter, None if no loss reaches it.
        """
        there = {place for row in self.rows for place, g in enumerate(row) if g is not None} - self._dropped
        places = sorted(there)
        starts = [seed * w for seed, w in zip(self._seeds, weights, strict=True)]
        self.functions.begin(len(starts))
        with self.functions:
            found = rows_module.one_pass(
                self._roots, starts, [self.shared[place] for place in places], self._retain, engine="grad"
            )
        gradients: list[Tensor | None] = [None] * len(self.shared)
        for place, g in zip(places, found, strict=True):
            # Autograd may have returned a tensor that shares its memory with another.
            gradients[place] = rows_module.combine([g], [1.0], self.shared[place])
        return gradients


class Blocked(Formed):
    """Gradients of blocks."""

    def combine(
        self, weights: Sequence[np.ndarray], factors: np.ndarray, held: Sequence[Direction | None], add: Add
    ) -> dict[Tensor, Tensor | None]:
        found = super().combine(weights, factors, held, add)
        assert isinstance(self._table, Found)
        if weights and (name := self._table.functions.unlike(weights[0].tolist())):
            raise RuntimeError(
                f'{self.request.batch.owner}.backward: engine="blocks" ends with one backward pass of the weighted sum '
                f"of all losses, and {name} in the model makes another gradient of it than of the losses one by one: "
                "its backward is not linear in the gradient that it is given, as where it clips, takes signs or draws "
                'random numbers. Nothing was written. Pass engine="rows", where it gets the gradient of one loss at a '
                "time."
            )
        return found


class Plan:
    """The blocks of a graph.

    Args:
        shared: The shared parameters.
        blocks: From the losses down.
        functions: Nodes of functions that the user has written.
        coarsest: The coarsest precision of any gradient, and the largest of the smallest normal numbers, where there
            are such functions.
    """

    def __init__(
        self,
        shared: Sequence[Tensor],
        blocks: Sequence[Block],
        functions: Sequence[Node],
        coarsest: tuple[float, float],
    ) -> None:
        self.shared = tuple(shared)
        self.blocks = tuple(blocks)
        self.functions = tuple(functions)
        self.coarsest = coarsest

    def differentiate(
        self,
        roots: Sequence[Root],
        seeds: Sequence[Tensor],
        retain_graph: bool,
        others: Sequence[Tensor],
        single: bool,
    ) -> Found:
        """Find the inner products.

        Args:
            roots: What the plan was made from, (m,).
            seeds: Gradient of the objective with respect to each loss, m scalars.
            retain_graph: Keep the graph after the last pass.
            others: Parameters that need the gradient of each loss too.
            single: Count parameters too that only one loss reaches.

        Returns:
            The inner products, and what leads to the direction.
        """
        found = Found(self, roots, seeds, retain_graph, single)
        found.gram = found.sweep(others, torch.float32)
        return found


def plan(roots: Sequence[Root], shared: Sequence[Tensor], nodes: Nodes, share: float = _SHARE) -> Plan | None:
    """Cut a graph into blocks.

    Args:
        roots: Where differentiation starts, (m,).
        shared: The parameters whose rows are wanted; leaves.
        nodes: All nodes of the graph with what is below each, each after those.
        share: Blocks are put together as long as they stay below this share of all parameters.

    Returns:
        The blocks, or None if there are not at least two.
    """
    places = {p: place for place, p in enumerate(shared)}
    leading, chains = _ways(nodes, places)
    front = Front([node for node in reversed(nodes) if node in leading and node not in chains])
    parts = [_Part(None, _first(roots, front, chains, places))]
    for node in front.order:
        if front.is_narrow(node):
            parts.append(_Part(GradientEdge(node, 0), set()))
        for child, output in nodes[node]:
            if child is None:
                continue
            if child in front.at:
                front.reach(child, output)
            elif child in chains:
                parts[-1].places.add(chains[child])
    merged = _merged(parts, [p.numel() for p in shared], share)
    if len(merged) < 2:
        return None
    blocks = [Block(part.edge, tuple(sorted(part.places))) for part in merged]
    functions = [node for node in nodes if node in leading and is_users(node)]
    return Plan(shared, blocks, functions, _coarsest(nodes) if functions else (0.0, 0.0))


def _coarsest(nodes: Nodes) -> tuple[float, float]:
    """The coarsest of the gradients that pass through a graph, which under autocast are not the parameters'.

    Args:
        nodes: The graph.

    Returns:
        The largest unit of precision, and the largest of the smallest normal numbers.
    """
    dtypes = {entry.dtype for node in nodes for entry in metadata(node)}
    known = [torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max(info.eps for info in known), max(info.tiny for info in known)


class _Part(NamedTuple):
    """What will be a block, or a part of one.

    Attributes:
        edge: Its upper border; None for the first one.
        places: The parameters that are met in it.
    """

    edge: GradientEdge | None
    places: set[int]


def _ways(nodes: Nodes, places: Mapping[Tensor, int]) -> tuple[set[Node], dict[Node, int]]:
    """The nodes that lead to a shared parameter, and those of them that lead to one parameter and nowhere else.

    The latter, with the place of their parameter, belong to the block that uses them.
    """
    chains: dict[Node, int] = {}
    leading: set[Node] = set()
    for node, below in nodes.items():
        if type(node).__name__ == "AccumulateGrad":
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            if leaf in places:
                chains[node] = places[leaf]
                leading.add(node)
            continue
        children = [child for child, _ in below if child is not None]
        if any(child in leading for child in children):
            leading.add(node)
            if len(children) == 1 and children[0] in chains:
                chains[node] = chains[children[0]]
    return leading, chains


def _first(roots: Sequence[Root], front: Front, chains: Mapping[Node, int], places: Mapping[Tensor, int]) -> set[int]:
    """Begin at the losses: the places of the parameters that are met right there."""
    first: set[int] = set()
    for root in roots:
        for start, output in origins(root):
            if start in chains:
                first.add(chains[start])
            elif start in front.at:
                front.reach(start, output)
        if isinstance(root, Tensor) and root in places:
            first.add(places[root])
    return first


def _merged(parts: Sequence[_Part], size: Sequence[int], share: float) -> list[_Part]:
    """Put neighbours together while they stay below a share of all. A parameter counts where it is met first."""
    seen: set[int] = set()
    for part in parts:
        part.places.difference_update(seen)
        seen |= part.places
    limit = max(sum(size) * share, *(sum(size[place] for place in part.places) for part in parts))
    merged: list[_Part] = []
    for part in parts:
        if merged and sum(size[place] for place in merged[-1].places | part.places) <= limit:
            merged[-1].places.update(part.places)
        else:
            merged.append(_Part(part.edge, set(part.places)))
    return merged


def gather(request: Request) -> Blocked | str:
    """Differentiate the losses with the rows of one block at a time, if the user asks for it.

    Args:
        request: What is wanted.

    Returns:
        The gradients, or why rows are needed.
    """
    if request.engine != "blocks":
        return ""
    if reason := refusal(request):
        return reason
    batch = request.batch
    if any(map(has_tensor_hooks, request.shared)) or hooks.may_look(batch.graph.nodes):
        return "hooks may look at gradients on the way, which would be those of a sum once more"
    cut = plan(batch.roots, request.shared, batch.graph.nodes)
    if cut is None:
        return "the model cannot be cut"
    found = cut.differentiate(batch.roots, batch.seeds, batch.retain[-1], request.plain, request.named)
    return Blocked(request, found, "blocks", f"asked for; {len(cut.blocks)} blocks")
