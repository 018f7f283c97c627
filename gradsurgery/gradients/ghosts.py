"""Inner products of weight gradients that are never formed.

Inner products and sums of gradients of linear layers, convolutions and embeddings follow from the inputs and the
gradients at the outputs (ghost_layers.py). Such parameters are *ghosts*; all others are *direct*: autograd gives their
rows. Which is which is read off the graph of the losses (ghost_graph.py). One thing cannot be seen: a hook that the
user has put on a ``weight.t()`` of his own, in a layer whose inputs need no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery import graph as graph_module
from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Request
from gradsurgery.gradients.exact import exactly
from gradsurgery.gradients.formed import Formed, refusal
from gradsurgery.gradients.ghost_graph import Passing, Reader, has_tensor_hooks
from gradsurgery.gradients.ghost_layers import Embedding, Layer, Linear
from gradsurgery.gradients.gram import Row, Table, Workspace
from gradsurgery.graph import hooks
from gradsurgery.graph.torch_private import version

# Rounding of ⟨D, K D⟩ in float32 relative to Σₙ ‖aₙ‖² ‖dₙ‖², and what is allowed of it relative to the squared norm.
# Rounding in float64, and what is allowed of it if all parameters are in it.
_ROUNDING, _ALLOWED = 6e-8, 5e-7
_EPS = float(np.finfo(np.float64).eps)
_ALLOWED_DOUBLE = 32 * _EPS

# What part of the passes and rows of all losses must be spared, or rows are formed: predictions are no better.
_WORTH = 0.1


class Found(Table):
    """The rows of m losses, those of ghosts as what they follow from.

    Args:
        plan: What makes them.

    Attributes:
        rows: For each loss what is kept of it by each layer, and its gradients in the direct parameters.
        others: Gradients of parameters that are not shared, m lists.
        batched: The losses went through the trunk side by side.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__([])
        self.rows: list[Row] = []
        self._plan = plan
        self.others: list[Row] = []
        self.batched = False

    def keep(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the row of one more loss.

        Args:
            gradients: At the edges of the plan, and in the direct parameters.
        """
        plan = self._plan
        kept = [layer.keep(gradients[start:stop]) for layer, (start, stop) in zip(plan.layers, plan.spans, strict=True)]
        self.rows.append([*kept, *gradients[len(plan.edges) :]])

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """The parameters that the rows are over.

        Returns:
            Those that the plan was made for.
        """
        return self._plan.shared

    def reached(self) -> list[int]:
        """Find out which losses have a gradient in which parameter.

        Returns:
            For each shared parameter a bit mask: bit i is set if loss i reaches it.
        """
        masks = [sum(1 << i for i, g in enumerate(column) if g is not None) for column in zip(*self.rows, strict=True)]
        return [masks[k] for k in self._plan.columns]

    def drop(self, places: Sequence[int]) -> None:
        """Take parameters out of the rows.

        Args:
            places: Their places; all parameters of a layer, or none of them.
        """
        for place in places:
            for row in self.rows:
                row[self._plan.columns[place]] = None

    @torch.no_grad()
    def row(self, i: int, place: int) -> Tensor | None:
        """Form one gradient after all.

        Args:
            i: The loss.
            place: The shared parameter.

        Returns:
            Its gradient, or None if the loss does not reach the parameter.
        """
        k = self._plan.columns[place]
        kept = self.rows[i][k]
        if kept is None or k >= len(self._plan.layers):
            return kept
        layer = self._plan.layers[k]
        with exactly(kept.device):
            return layer.combine([kept], [1.0])[layer.places.index(place)]

    def whole(self) -> list[Row]:
        """Form all rows after all.

        Returns:
            m rows over the shared parameters.
        """
        return [[self.row(i, place) for place in range(len(self.shared))] for i in range(len(self))]

    def products(self) -> Tensor:
        """Multiply in single precision, without waiting for the device.

        Returns:
            (m, m + 1), float64: the Gram matrix, and in the last column the size of what was added up in its diagonal.
            To be handed to :meth:`repaired` on the host.
        """
        return self._products(torch.float32)

    def gram(self) -> np.ndarray:
        """Inner products of the rows.

        Returns:
            J Jᵀ, (m, m), float64, wrong by at most 1e-6 of the product of two norms, beyond what the rows are.
        """
        return self.repaired(self.products().cpu().numpy())

    def repaired(self, found: np.ndarray) -> np.ndarray:
        """Replace products whose terms cancelled too well, or left the range of float32 or float64.

        Args:
            found: What :meth:`products` gave, on the host, (m, m + 1).

        Returns:
            J Jᵀ, (m, m), float64, of the rows divided by :attr:`~gradsurgery.gradients.gram.Table.unit`.
        """
        return self._in_range(self._repaired(found))

    def _repaired(self, found: np.ndarray) -> np.ndarray:
        gram, sizes = found[:, :-1], found[:, -1]
        low, high = gram_module.SAFE_SQUARES
        squares = gram.diagonal()
        pairs = zip(squares.tolist(), sizes.tolist(), strict=True)
        if all(low <= square <= high and _ROUNDING * size <= _ALLOWED * square for square, size in pairs):
            return gram
        double = self.noise < _ROUNDING
        if not double:
            doubtful = ~((squares >= low) & (squares <= high) & (_ROUNDING * sizes <= _ALLOWED * squares))
            # A row of exact zeros is common (an inactive hinge) and needs no second look.
            if not any(bool(g.any()) for i in np.flatnonzero(doubtful) for g in self.rows[i] if g is not None):
                return gram
            again = self._products(torch.float64).cpu().numpy()
            gram, sizes = again[:, :-1], again[:, -1]
        allowed = _ALLOWED_DOUBLE if double else _ALLOWED
        if (_EPS * sizes <= allowed * gram.diagonal()).all():
            return gram
        # The gradients are small next to their terms. Formed, they are rounded as the direction will be.
        return self._products(torch.float64, formed=True).cpu().numpy()[:, :-1]

    def triangle(self) -> np.ndarray:
        """A square root of the Gram matrix, for which all rows are formed; see :func:`.gram.triangle`.

        Returns:
            (m, k), k ≤ m.
        """
        return gram_module.triangle(self.whole())

    def _formed(self) -> list[Row]:
        return self.whole()

    @property
    def is_double(self) -> bool:
        """Whether products are made in double precision."""
        return False

    @property
    def noise(self) -> float:
        """How far products may be off, relative to the lengths of the two rows."""
        double = all(p.dtype == torch.float64 for p in self._plan.shared)
        return _EPS if double else _ALLOWED

    def part(self, keep: Sequence[int]) -> Found:
        """Some of the rows.

        Args:
            keep: Their places.

        Returns:
            The same rows, not copied.
        """
        part = Found(self._plan)
        part.unit, part.far_apart = self.unit, self.far_apart
        part.rows = [self.rows[i] for i in keep]
        return part

    @torch.no_grad()
    def combine(self, weights: Sequence[float]) -> list[Tensor | None]:
        """Add up the rows: Σ wᵢ gᵢ. They are freed meanwhile, and nothing else can be asked afterwards.

        Args:
            weights: w, (m,).

        Returns:
            One gradient a shared parameter, None if no loss reaches it. The tensors are new.
        """
        gradients: list[Tensor | None] = [None] * len(self._plan.shared)
        for k, places in enumerate(self._plan.places):
            column = [row[k] for row in self.rows]
            for row in self.rows:
                row[k] = None
            present = [(g, w) for g, w in zip(column, weights, strict=True) if g is not None]
            if k >= len(self._plan.layers):
                gradients[places[0]] = rows_module.combine(column, weights, self._plan.shared[places[0]])
            elif present:
                with exactly(present[0][0].device):
                    combined = self._plan.layers[k].combine([g for g, _ in present], [w for _, w in present])
                for place, g in zip(places, combined, strict=True):
                    gradients[place] = g
        return gradients

    @torch.no_grad()
    def _products(self, least: torch.dtype, formed: bool = False) -> Tensor:
        """Multiply; the gradients themselves, of one layer at a time, if they are to be formed."""
        layers = self._plan.layers
        linear = [k for k, layer in enumerate(layers) if not isinstance(layer, Embedding)]
        gram = gram_module.gram_in([[g for k, g in enumerate(row) if k not in linear] for row in self.rows], least)
        sizes = torch.zeros_like(gram.diagonal())
        workspace = Workspace()
        for k in linear:
            layer = layers[k]
            assert not isinstance(layer, Embedding)
            present = [i for i, row in enumerate(self.rows) if row[k] is not None]
            kept = [g for row in self.rows if (g := row[k]) is not None]
            if not kept:
                continue
            layer.check()
            with exactly(kept[0].device):
                if formed:
                    part = gram_module.gram_in([list(layer.combine([g], [1.0])) for g in kept], least)
                    size = part.new_zeros(len(kept))
                else:
                    part, size = layer.products(kept, least, workspace)
            if len(kept) < len(self.rows):
                at = torch.tensor(present, device=part.device)
                part = part.new_zeros(gram.shape).index_put_((at[:, None], at), part)
                size = size.new_zeros(sizes.shape).index_put_((at,), size)
            gram, sizes = gram.to(part.device) + part, sizes.to(part.device) + size
        return torch.cat([(gram + gram.T) / 2, sizes[:, None]], dim=1)


class Plan:
    """Which shared parameters are ghosts.

    Args:
        shared: The shared parameters.
        layers: The layers whose parameters are ghosts.
        reader: Knows the graph.

    Attributes:
        direct: Places of all shared parameters that are no ghosts.
        places: For each column of the rows that are kept, which shared parameters follow from it.
        columns: For each shared parameter, from which column it follows.
        edges: Where autograd hands over the gradients at the outputs of all layers.
        spans: Which of them belong to each layer: from, to.
    """

    def __init__(self, shared: Sequence[Tensor], layers: Sequence[Layer], reader: Reader) -> None:
        self.shared = tuple(shared)
        self.layers = tuple(layers)
        ghosts = {place for layer in layers for place in layer.places}
        self.direct = [place for place in range(len(shared)) if place not in ghosts]
        self.places = [*(layer.places for layer in layers), *((place,) for place in self.direct)]
        column = {place: k for k, places in enumerate(self.places) for place in places}
        self.columns = [column[place] for place in range(len(shared))]
        self.edges = [edge for layer in layers for edge in layer.edges]
        ends = np.cumsum([len(layer.edges) for layer in layers]).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))
        self._reader = reader

    @cached_property
    def trunk(self) -> GradientEdge | None:
        """The first place in the graph that all losses go through on their way to the shared parameters, or None.

        Returns:
            Its edge.
        """
        return self._reader.trunk

    @cached_property
    def is_batched(self) -> bool:
        """Whether several losses should pass side by side.

        Returns:
            True if one entry in twenty at most belongs to a direct parameter, the losses have a trunk, no hook was
            seen, and there are no convolutions, ghosts or not, which are faster one by one.
        """
        total = sum(p.numel() for p in self.shared)
        if 20 * sum(self.shared[place].numel() for place in self.direct) > total:
            return False
        return not self._reader.has_convolutions and self.trunk is not None and not self.is_watched

    def passing(self) -> Passing:
        """Count what one loss does below the trunk, weight gradients left out.

        Returns:
            In multiplications that take as long.
        """
        return self._reader.passing(self.trunk)

    @cached_property
    def is_watched(self) -> bool:
        """Whether code of the user may look at gradients on the way.

        With several losses side by side it would get one tensor for all, and nothing is left of it after the pass.

        Returns:
            True if there may be hooks, or if there are functions of the user.
        """
        return any(map(has_tensor_hooks, self.shared)) or self._reader.is_watched

    @property
    def ghosts(self) -> list[int]:
        """Places of the ghosts among the shared parameters.

        Returns:
            Indices into `shared`.
        """
        return [place for layer in self.layers for place in layer.places]

    def differentiate(
        self,
        roots: Sequence[graph_module.Root],
        seeds: Sequence[Tensor],
        retain_graph: bool = False,
        others: Sequence[Tensor] = (),
        batched: bool = False,
    ) -> Found:
        """Differentiate the losses one by one.

        Args:
            roots: What the plan was made from, (m,).
            seeds: Gradient of the objective with respect to each loss, m scalars.
            retain_graph: Keep the graph afterwards.
            others: Parameters that need the gradient of each loss too. None of them may be below the trunk if `batched`
                is to be faster.
            batched: Go through the trunk with all losses side by side, where its backward functions know how. The last
                loss goes alone: it frees the graph, and tensors that keep their gradients show.

        Returns:
            The rows.

        Raises:
            RuntimeError: What autograd raises, with the cure where it is known.
        """
        found = Found(self)
        inner: list[Any] = [*self.edges, *(self.shared[place] for place in self.direct)]
        m, start = len(roots), 0
        # A node that has more to do hands over its gradient before the hooks of its output have seen it, and calls its
        # own hooks afterwards.
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for k, edge in enumerate(self.edges):
                handle = hooks.before(edge.node, partial(_see, seen, k))
                stack.callback(handle.remove)
            if batched and self.trunk is not None:
                start = m - 1
                if not self._side_by_side(roots[:start], seeds[:start], inner, others, found, seen):
                    found, start = Found(self), 0
            for i in range(start, m):
                seen.clear()
                keep = retain_graph or i < m - 1
                try:
                    grads = rows_module.gradient(roots[i], [*inner, *others], seeds[i], keep)
                except RuntimeError as error:
                    if not found.batched or "vmap" not in str(error):
                        raise
                    raise RuntimeError(
                        "A tensor in the model keeps its gradient (retain_grad), and several losses were "
                        'differentiated side by side. Pass engine="rows" to the method: one after the other.'
                    ) from error
                found.keep([seen.get(k, g) for k, g in enumerate(grads[: len(inner)])])
                found.others.append(grads[len(inner) :])
        return found

    def _side_by_side(
        self,
        roots: Sequence[graph_module.Root],
        seeds: Sequence[Tensor],
        inner: list[Any],
        others: Sequence[Tensor],
        found: Found,
        seen: dict[int, Tensor],
    ) -> bool:
        """Differentiate down to the trunk one by one, and from there together. False if that is not possible."""
        trunk: Any = self.trunk
        tops: list[Tensor | None] = []
        for root, seed in zip(roots, seeds, strict=True):
            top, *rest = rows_module.gradient(root, [trunk, *others], seed, True)
            tops.append(top)
            found.others.append(rest)
        present = [top for top in tops if top is not None]
        if len(present) < 2:
            return False
        reached: list[int] = []

        def down(top: Tensor) -> list[Tensor]:
            # Hooks at the output of the trunk have seen this gradient before, and would act twice.
            before, untouched = version(top), False

            def compare(gradients: Sequence[Tensor | None]) -> None:
                nonlocal untouched
                untouched = gradients[0] is top and version(top) == before

            seen.clear()
            handle = hooks.before(trunk.node, compare)
            try:
                grads = torch.autograd.grad(trunk, inner, top, retain_graph=True, allow_unused=True)
            finally:
                handle.remove()
            if not untouched:
                raise RuntimeError("The output of the trunk may have hooks.")
            found = [seen.get(k, g) for k, g in enumerate(grads)]
            reached[:] = [k for k, g in enumerate(found) if g is not None]
            return [g for g in found if g is not None]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a backward function that goes through a batch one by one
                results = torch.vmap(down)(torch.stack(present))
        except (RuntimeError, Warning):
            return False
        merged: Row = [None] * len(inner)
        for k, g in zip(reached, results, strict=True):
            merged[k] = g
        following = iter(range(len(present)))
        for top in tops:
            j = None if top is None else next(following)
            found.keep([None if g is None or j is None else g[j] for g in merged])
        found.batched = True
        return True


def plan(
    roots: Sequence[graph_module.Root],
    shared: Sequence[Tensor],
    nodes: graph_module.Nodes | None = None,
    force: bool = False,
    together: bool = True,
) -> Plan | None:
    """Read off the graph of the losses which parameters need no gradient of a single loss.

    Args:
        roots: Where differentiation starts, (m,).
        shared: The parameters whose rows are wanted; leaves.
        nodes: All nodes of the graph with what is below each, each after those, if they are known already.
        force: Make a ghost of all that can be one, even where rows are cheaper.
        together: The losses may pass side by side.

    Returns:
        What to do, or None if all parameters are direct.
    """
    if nodes is None:
        nodes = graph_module.inputs_first([node for root in roots for node, _ in graph_module.origins(root)])
    if not nodes:
        return None
    reader = Reader(roots, nodes, shared)
    layers = reader.layers()
    if force or not layers:
        return Plan(shared, layers, reader) if layers else None
    m = len(roots)
    several = any(len(layer.edges) > 1 for layer in layers)
    masks = graph_module.reaching(roots, nodes) if several else {}
    costs = [
        layer.costs(m, _share(layer.edges, masks, m)) if isinstance(layer, Linear) else layer.costs(m)
        for layer in layers
    ]
    made = Plan(shared, [layer for layer, (ghost, rows) in zip(layers, costs, strict=True) if ghost < rows], reader)
    return _chosen(made, Plan(shared, layers, reader), costs, m if together else 0)


def _chosen(made: Plan, every: Plan, costs: Sequence[tuple[float, float]], m: int) -> Plan | None:
    """Choose between the layers that are cheaper as ghosts, all layers, and none.

    With all of them as ghosts the losses may pass side by side, which may spare more than the other layers cost.
    """
    whole = sum(rows for _, rows in costs)
    spared = sum(rows - ghost for ghost, rows in costs if ghost < rows)
    # Without its weight gradients a pass costs as much again.
    alone = made if spared > _WORTH * 2 * whole else None
    passing = every.passing() if m > 2 and every.is_batched else None
    if passing is None or (besides := passing.spared(m)) == 0:
        return alone
    worth = _WORTH * (whole + m * (passing.calls + passing.products))
    if made.is_batched:
        return made if spared + besides > worth else alone
    return every if besides + sum(rows - ghost for ghost, rows in costs) > max(spared, worth) else alone


def _share(calls: Sequence[GradientEdge], masks: Mapping[Node, int], m: int) -> float:
    """What part of the calls of a layer a loss reaches, on average."""
    if len(calls) == 1:
        return 1.0
    return sum(masks.get(call.node, 0).bit_count() for call in calls) / (m * len(calls))


def _see(seen: dict[int, Tensor], k: int, gradients: Sequence[Tensor | None]) -> None:
    """Called before a node: notes what it is given."""
    if gradients[0] is not None:
        seen[k] = gradients[0]


def gather(request: Request) -> Formed | str:
    """Differentiate the losses without the gradients of single losses, where the shapes make that cheaper.

    Args:
        request: What is wanted.

    Returns:
        The gradients, or why rows are needed.
    """
    if request.engine == "blocks":
        return ""
    if reason := refusal(request):
        return reason
    batch = request.batch
    together = "unbatched" not in request.failed
    made = plan(batch.roots, request.shared, batch.graph.nodes, request.engine == "ghosts", together)
    if made is None:
        return "by their shapes all layers are cheaper as rows"
    spared = sum(made.shared[place].numel() for place in made.ghosts) / sum(p.numel() for p in request.shared)
    # The last loss goes alone, so that it takes three to have two side by side.
    batched = request.m > 2 and together and made.is_batched
    found = made.differentiate(batch.roots, batch.seeds, batch.retain[-1], request.plain, batched)
    if batched and not found.batched:
        request.failed.add("unbatched")
    reason = f"{len(made.layers)} layers with {spared:.0%} of the shared entries need no rows"
    return Formed(request, found, "ghosts", reason)
