"""What can be read off the autograd graph of the losses before anything is differentiated."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.graph import footprints
from gradsurgery.graph.footprints import Footprint, Moves
from gradsurgery.graph.hooks import is_hooked
from gradsurgery.graph.torch_private import metadata

# Freeing a graph that Python has walked recurses, and takes about 210 bytes of the C stack per node of depth.
_BYTES_PER_NODE = 420
_DEEPEST = 20_000
# Nodes between a loss and the join below it, up to which the join is looked for. Joins themselves do not count.
_NEAR = 256


#: Nodes of a graph, each after those below it, with their ``next_functions``: each access to these makes them anew.
Nodes = dict[Node, tuple[tuple["Node | None", int], ...]]


class Stage(NamedTuple):
    """Joins that a loss passes, and where it goes on below them.

    Attributes:
        tops: The joins that it meets first.
        joins: All of them, from the losses down. Each has one output.
        edges: The inputs of joins that lead on.
        moves: Of joins that only move entries, how they do.
    """

    tops: tuple[Node, ...]
    joins: tuple[Node, ...]
    edges: tuple[GradientEdge, ...]
    moves: Mapping[Node, Moves]

    def differentiate(
        self, places: Sequence[Tensor | GradientEdge], gradients: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """Carry gradients down to the edges.

        Args:
            places: Where they are.
            gradients: One per place.
            retain_graph: Keep the graph in between.

        Returns:
            One gradient per edge.
        """
        tops = set(self.tops)
        lower = [join for join in self.joins if join not in tops]
        # Joins above others free what they need by hand afterwards, unless it is known what they do.
        upper = self._above(set(lower)) if lower else set()
        at_once = all(join in self.moves for join in upper)
        wanted = [*self.tops, *lower] if at_once else list(self.tops)
        edges = [GradientEdge(node, 0) for node in wanted]
        found = torch.autograd.grad(places, edges, gradients, retain_graph=retain_graph, allow_unused=True)  # type: ignore[arg-type]
        at = {(node, 0): g for node, g in zip(wanted, found, strict=True) if g is not None}
        return self._pass_down(at, upper if at_once else set(), set(lower) if at_once else set())

    def _above(self, lower: Container[Node | None]) -> set[Node]:
        """The joins that have another one as an input."""
        return {join for join in self.joins if any(child in lower for child, _ in join.next_functions)}

    @torch.no_grad()
    def _pass_down(self, at: dict[tuple[Node, int], Tensor], run: set[Node], found: set[Node]) -> list[Tensor | None]:
        """Run the joins backward. Hooks of the tensors below do not see that, and act when the pass goes on from there.

        Args:
            at: The gradients at the outputs of joins.
            run: Joins that autograd has run.
            found: Joins whose gradients it has found by that.

        Returns:
            The gradients at the edges.
        """
        tops = set(self.tops)
        for join in self.joins:
            g = at.pop((join, 0), None)
            if g is None:
                continue
            # Autograd runs the hooks of its output, as it has done where it came by.
            if join not in tops and join not in found:
                edge = GradientEdge(join, 0)
                (g,) = torch.autograd.grad([edge], [edge], [g], retain_graph=True)
            below = join.next_functions
            if join in run:
                parts: Any = self._moved(join, g, [node is not None and node not in found for node, _ in below])
            else:
                parts = join(g)  # type: ignore[operator]
            for (node, output), part in zip(below, parts if isinstance(parts, tuple) else (parts,), strict=True):
                if node is not None and part is not None and node not in found:
                    shape = metadata(node)[output].shape
                    part = part if part.shape == shape else part.sum_to_size(shape)  # what was broadcast
                    at[node, output] = at[node, output] + part if (node, output) in at else part
        return [at.get((edge.node, edge.output_nr)) for edge in self.edges]

    def _moved(self, join: Node, g: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """What a join would hand to its inputs, which autograd has run without keeping that."""
        flat = g.reshape(-1)
        parts: list[Tensor | None] = []
        for move, is_wanted in zip(self.moves[join], wanted, strict=True):
            if move is None or not is_wanted:
                parts.append(None)
                continue
            places, shape = move
            index = torch.tensor(places, device=g.device)
            part = flat.index_select(0, index.clamp(min=0))
            part = part.masked_fill(index < 0, 0) if min(places, default=0) < 0 else part
            parts.append(part.reshape(shape))
        return tuple(parts)


class Together:
    """Losses whose ways part for good below their joins: one backward pass finds the gradients there for all of them.

    Args:
        losses: The losses, or their edges in the graph, by number.
        stages: The last stage of each of them.
        joins: All joins of these stages, from the losses down.

    Attributes:
        seeds: Gradient of the objective with respect to every loss of the call; to be set before the pass.
        retain: For every loss of the call, whether another pass may need what it leaves; likewise.
    """

    def __init__(
        self, losses: Mapping[int, Tensor | GradientEdge], stages: Mapping[int, Stage], joins: Sequence[Node]
    ) -> None:
        self.seeds: Sequence[Tensor] = ()
        self.retain: Sequence[bool] = ()
        self._losses = losses
        self._stages = stages
        self._joins = tuple(joins)
        self._found: dict[tuple[Node, int], Tensor | None] = {}

    def gradients(self, i: int, retain_graph: bool) -> list[Tensor | None]:
        """Find the gradients of one loss at the edges where it goes on alone; those of the others come with them.

        Args:
            i: Its number.
            retain_graph: Keep the graph above these edges.

        Returns:
            One gradient per edge.
        """
        edges = [(edge.node, edge.output_nr) for edge in self._stages[i].edges]
        if not all(edge in self._found for edge in edges):
            stages = self._stages.values()
            tops = tuple(dict.fromkeys(node for stage in stages for node in stage.tops))
            moves = next(iter(stages)).moves
            whole = Stage(tops, self._joins, tuple(edge for stage in stages for edge in stage.edges), moves)
            seeds = [self.seeds[k] for k in self._losses]
            retain_graph = retain_graph or any(self.retain[k] for k in self._losses)
            found = whole.differentiate(list(self._losses.values()), seeds, retain_graph)
            self._found = {(e.node, e.output_nr): g for e, g in zip(whole.edges, found, strict=True)}
        # Another pass gets tensors of its own: a hook below may have changed these in place.
        return [self._found.pop(edge) for edge in edges]


class Start(NamedTuple):
    """A loss that was joined with others: differentiated from below the join, no zeros pass through the others.

    Attributes:
        loss: The loss, or its edge in the graph.
        stages: The joins on its way, from the loss down. What lies below the last stage leads to every parameter.
        number: Which loss it is.
        together: What finds the gradients at its last stage along with those of other losses; None if one of them may
            reach that stage too.
    """

    loss: Tensor | GradientEdge
    stages: tuple[Stage, ...]
    number: int
    together: Together | None


#: Where the differentiation of a loss begins.
Root = Tensor | GradientEdge | Start


class Graph(NamedTuple):
    """The graph of m losses.

    Attributes:
        masks: For every leaf that requires grad a bit mask: bit i is set if loss i may reach it. None if the graph is
            too deep to be walked, or hidden.
        leaves: All leaves that were seen.
        overlaps: For each loss, whether a part of its graph belongs to another loss too, (m,).
        overlaps_later: The same, counting only losses that come later in the list, (m,).
        hidden: Leaves hide from ``torch.autograd.grad``, behind reentrant activation checkpointing: only an ordinary
            backward pass finds them.
        nodes: All nodes below the roots with what is below each, each after those; empty if the graph was not walked to
            the end.
        roots: Where the differentiation of each loss begins, (m,).
        suspects: Leaves that a loss may reach or not, since they lie below a join that cannot be read: what is zero
            there decides.
        unread: The graph as a whole does not tell which leaves a loss reaches, and what is zero must decide for all.
        joins: Tensors may be joined, so that a loss has gradients of zeros where it does not reach.
    """

    masks: dict[Tensor, int] | None
    leaves: tuple[Tensor, ...]
    overlaps: tuple[bool, ...]
    overlaps_later: tuple[bool, ...]
    hidden: bool
    nodes: Nodes
    roots: tuple[Root | None, ...] = ()
    suspects: frozenset[Tensor] = frozenset()
    unread: bool = False
    joins: bool = True


def walk(given: Sequence[Root | None]) -> Graph:
    """Find the leaves that each loss can reach, and which losses share a part of their graphs.

    Args:
        given: Where differentiation starts, (m,); None for a loss without a graph.

    Returns:
        What there is to know.
    """
    roots = [root.loss if isinstance(root, Start) else root for root in given]
    m = len(roots)
    starts = [node for root in roots if (node := _node(root)) is not None]
    order = inputs_first(starts)
    if order is None:
        return Graph(None, (), (True,) * m, (True,) * m, False, {}, tuple(roots), unread=True)
    kinds = set(map(type, order))
    if m == 1 or not _may_join(order, kinds):
        return _plain(roots, order, any(kind.__name__ == "CheckpointFunctionBackward" for kind in kinds))
    walked = _Walk(roots, order)
    with torch.no_grad():
        walked.go()
    full = (1 << m) - 1
    overlapping = {mask & full for mask in walked.overlapping}
    found = {walked.seen[key]: mask & full for key, mask in walked.leaves.items() if mask & full}
    suspect = walked.losses.suspect
    suspects = frozenset(walked.seen[key] for key, mask in walked.leaves.items() if mask & suspect)
    below, nodes = walked.below_joins() if walked.splits else (tuple(roots), order)
    return Graph(
        None if walked.hidden else found,
        tuple(found),
        tuple(any(mask >> i & 1 for mask in overlapping) for i in range(m)),
        tuple(any(mask >> i & 1 and mask >> (i + 1) for mask in overlapping) for i in range(m)),
        walked.hidden,
        nodes,
        below,
        suspects,
        walked.hidden and walked.uneven,
    )


def _may_join(order: Nodes, kinds: set[type]) -> bool:
    """Whether a node tells its inputs or its entries apart, so that losses may part below it."""
    joins = {kind for kind in kinds if footprints.may_join(kind, 2)}
    return bool(joins) and any(
        type(node) in joins and footprints.may_join(type(node), len(below)) for node, below in order.items()
    )


def _plain(roots: Sequence[Tensor | GradientEdge | None], order: Nodes, hidden: bool) -> Graph:
    """What there is to know of a graph without joins: what reaches a node reaches all that is below it."""
    masks: defaultdict[Node, int] = defaultdict(int)
    found: defaultdict[Tensor, int] = defaultdict(int)
    for i, root in enumerate(roots):
        node = _node(root)
        if node is not None:
            masks[node] |= 1 << i
        elif isinstance(root, Tensor):  # the loss is a leaf itself
            found[root] |= 1 << i
    overlaps = later = 0
    for node in reversed(order):
        mask, below = masks[node], order[node]
        if below:
            if mask & (mask - 1):
                overlaps |= mask
                later |= mask ^ 1 << mask.bit_length() - 1  # the last loss has none after it
            for child, _ in below:
                if child is not None:
                    masks[child] |= mask
        elif type(node).__name__ == "AccumulateGrad":
            found[node.variable] |= mask  # type: ignore[attr-defined]
    leaves, m = dict(found), range(len(roots))
    return Graph(
        None if hidden else leaves,
        tuple(leaves),
        tuple([overlaps >> i & 1 == 1 for i in m]),
        tuple([later >> i & 1 == 1 for i in m]),
        hidden,
        order,
        tuple(roots),
        joins=False,
    )


def origins(root: Root | None) -> list[tuple[Node, int]]:
    """The nodes at which the differentiation of a loss begins, and the number of their output.

    Args:
        root: Where it begins.

    Returns:
        None for a loss that is a leaf itself.
    """
    if isinstance(root, Start):
        return [(edge.node, edge.output_nr) for edge in root.stages[-1].edges]
    node = _node(root)
    return [] if node is None or root is None else [(node, root.output_nr)]


def reaching(roots: Sequence[Root | None], nodes: Nodes) -> dict[Node, int]:
    """Find out which losses pass through which nodes.

    Args:
        roots: Where their differentiation begins, (m,).
        nodes: All nodes below, each after those below it.

    Returns:
        A bit mask for each node that is reached.
    """
    masks: dict[Node, int] = {}
    for i, root in enumerate(roots):
        for node, _ in origins(root):
            masks[node] = masks.get(node, 0) | 1 << i
    for node in reversed(nodes):
        mask = masks.get(node, 0)
        for child, _ in nodes[node] if mask else ():
            if child is not None:
                masks[child] = masks.get(child, 0) | mask
    return masks


class Front:
    """How far down some nodes the ways of the losses go that were met so far.

    Args:
        order: The nodes, from the losses down.

    Attributes:
        order: The same.
        at: The place of each.
        farthest: That of the lowest one that a way leads to; −1 at first.
    """

    def __init__(self, order: Sequence[Node]) -> None:
        self.order = order
        self.at = {node: k for k, node in enumerate(order)}
        self.farthest = -1
        self._outputs: dict[Node, set[int]] = {}

    def reach(self, node: Node, output: int) -> None:
        """Meet one more edge.

        Args:
            node: The node that it leads to, one of those in order.
            output: The number of its output.
        """
        self.farthest = max(self.farthest, self.at[node])
        self._outputs.setdefault(node, set()).add(output)

    def is_narrow(self, node: Node) -> bool:
        """Whether all ways go through one edge here.

        Args:
            node: The next node in order; what leads on from all those before it was met.

        Returns:
            True if they go through its output 0 and nowhere else.
        """
        return self.farthest == self.at[node] and self._outputs[node] == {0}


def _node(root: Tensor | GradientEdge | None) -> Node | None:
    return root.grad_fn if isinstance(root, Tensor) else None if root is None else root.node


class _Walk:
    """One walk from the losses to the leaves. Footprints are looked at only where something joins tensors.

    Args:
        roots: Where differentiation starts, (m,).
        order: All nodes with what is below each, each after those.
    """

    def __init__(self, roots: Sequence[Tensor | GradientEdge | None], order: Nodes) -> None:
        self.roots = roots
        self.order = order
        self.losses = footprints.Losses.of(len(roots))
        self.masks: dict[Node, int] = {}
        #: Which losses have a node in common, other than a leaf.
        self.overlapping: set[int] = set()
        self.leaves: dict[int, int] = {}  # by id: hashing a tensor takes longer than anything else here
        self.seen: dict[int, Tensor] = {}
        self.hidden = False
        #: Some tensor has entries that different losses reach.
        self.uneven = False
        #: Nodes whose inputs are reached by different losses, with the mask of each input.
        self.splits: dict[Node, list[int]] = {}
        #: Of nodes that only move entries, how they do.
        self.moves: dict[Node, Moves] = {}
        self._outputs: dict[Node, dict[int, Footprint]] = {}
        self._hooked: dict[Node, bool] = {}
        self._several: set[Node] = set()
        self._joined = len(roots) > 1 and any(
            footprints.may_join(type(node), len(below) > 1) for node, below in order.items()
        )
        if self._joined:
            self._several = {child for below in order.values() for child, nr in below if nr and child is not None}
            self._several.update(
                node for root in roots if (node := _node(root)) and root is not None and root.output_nr
            )

    def go(self) -> None:
        self._begin()
        masks = self.masks
        for node in reversed(self.order):
            mask = masks.get(node, 0)
            if not mask:
                continue
            kind = type(node)
            if kind.__name__ == "AccumulateGrad":
                self._leaf(node.variable, mask)  # type: ignore[attr-defined]
                continue
            if mask & (mask - 1):
                self.overlapping.add(mask)
            below = self.order[node]
            outputs = self._outputs.pop(node, None) if self._outputs else None
            if outputs is not None:
                outputs = {k: footprints.settled(f) for k, f in outputs.items()}
            if outputs is None and (not self._joined or footprints.name(kind) in footprints.PLAIN):
                watched = self._several or self._outputs
                for child, output in below:
                    if child is None:
                        continue
                    if watched and (child in self._several or child in self._outputs):
                        self._enter(child, output, mask, mask)
                    else:
                        masks[child] = masks.get(child, 0) | mask
            else:
                self._spread(node, outputs or {0: mask})
            self._several.discard(node)
            self.hidden = self.hidden or kind.__name__ == "CheckpointFunctionBackward"

    def _begin(self) -> None:
        for i, root in enumerate(self.roots):
            node = _node(root)
            if node is not None:
                assert root is not None
                self._enter(node, root.output_nr, 1 << i, 1 << i)
            elif isinstance(root, Tensor):  # the loss is a leaf itself
                self._leaf(root, 1 << i)

    def _leaf(self, leaf: Tensor, mask: int) -> None:
        self.seen[id(leaf)] = leaf
        self.leaves[id(leaf)] = self.leaves.get(id(leaf), 0) | mask

    def _enter(self, node: Node, output: int, footprint: Footprint, mask: int) -> None:
        before = self.masks.get(node, 0)
        if self._joined and (node in self._several or node in self._outputs or not isinstance(footprint, int)):
            outputs = self._outputs.setdefault(node, {} if node in self._several or not before else {0: before})
            outputs[output] = footprints.both(outputs[output], footprint) if output in outputs else footprint
        self.masks[node] = before | mask

    def _spread(self, node: Node, outputs: dict[int, Footprint]) -> None:
        below = self.order[node]
        found = footprints.spread(node, below, outputs, self.losses, self.moves)
        parts = [0 if child is None else footprints.union(f) for (child, _), f in zip(below, found, strict=True)]
        self.uneven = self.uneven or any(not isinstance(f, int) for f in found)
        if len({part for (child, _), part in zip(below, parts, strict=True) if child is not None}) > 1:
            self.uneven = True
            if node not in self._several and not isinstance(node, BackwardCFunction):
                self.splits[node] = parts
        for (child, output), footprint, part in zip(below, found, parts, strict=True):
            if child is not None and part:
                self._enter(child, output, footprint, part)

    # ------------------------------------------------------------------------------- below the joins

    def below_joins(self) -> tuple[tuple[Root | None, ...], Nodes]:
        """Where each loss begins, if nothing but what leads to the joins lies above.

        Returns:
            One root per loss, and what lies below these.
        """
        at = {node: -k for k, node in enumerate(self.order)}
        full = self.losses.vague - 1
        stages: dict[int, tuple[Stage, ...]] = {}
        alone: dict[int, Stage] = {}
        above: set[Node] = set()
        for i, root in enumerate(self.roots):
            of_one: list[Stage] = []
            nodes = [node for node, _ in origins(root)]
            left = {join for join in self.splits if self.masks[join] >> i & 1}
            while left and nodes and (stage := self._stage(nodes, 1 << i, at, above)) is not None:
                of_one.append(stage)
                left.difference_update(stage.joins)
                nodes = [edge.node for edge in stage.edges]
            if of_one:
                stages[i] = tuple(of_one)
                if all(self.masks[node] & full == 1 << i for node in nodes):
                    alone[i] = of_one[-1]
        losses = {i: root for i, root in enumerate(self.roots) if i in stages and root is not None}
        if self._on_one_way({node for stage in alone.values() for node in stage.tops}):
            alone = {}
        joins = sorted({node for stage in alone.values() for node in stage.joins}, key=at.__getitem__)
        together = Together({i: losses[i] for i in alone}, alone, joins)
        begins = tuple(
            Start(losses[i], stages[i], i, together if i in alone else None) if i in stages else root
            for i, root in enumerate(self.roots)
        )
        if not stages:
            return begins, self.order
        lowest = max(at[node] for node in above)
        if all(at[node] > lowest for root in begins for node, _ in origins(root)):
            return begins, {n: b for n, b in self.order.items() if n not in above and self.masks.get(n, 0) & full}
        return begins, _reachable(self.order, begins)

    def _stage(self, nodes: Iterable[Node], loss: int, at: dict[Node, int], passed_by: set[Node]) -> Stage | None:
        """The next joins on the way of a loss, if they lead to all of its parameters."""
        below: dict[tuple[Node, int], None] = {}
        above: set[Node] = set()
        passed = 0
        tops: dict[Node, None] = {}
        left: list[tuple[Node, bool]] = [(node, False) for node in nodes]
        while left:
            node, joined = left.pop()
            parts = self.splits.get(node)
            if parts is not None and not joined:
                tops[node] = None
            if node in above:
                continue
            above.add(node)
            passed += parts is None
            for child, output in self._leading_on(node, loss):
                if type(child).__name__ == "AccumulateGrad" or passed > _NEAR:
                    return None
                if parts is None or child in self.splits:
                    left.append((child, parts is not None))
                else:
                    below[child, output] = None
        # What lies below one of these edges must not lie above another.
        if not below or max(at[node] for node in above) >= min(at[node] for node, _ in below):
            return None
        joins = sorted(self.splits.keys() & above, key=at.__getitem__)
        # A join below another one that is also met from elsewhere would be run twice.
        if (len(joins) > 1 and any(self._is_input(node, joins) for node in tops)) or any(map(self._is_hooked, joins)):
            return None
        passed_by |= above
        return Stage(tuple(tops), tuple(joins), tuple(GradientEdge(*edge) for edge in below), self.moves)

    def _leading_on(self, node: Node, loss: int) -> list[tuple[Node, int]]:
        """The inputs of a node that a loss reaches through it, or, if it is no join, through any node."""
        below, parts = self.order[node], self.splits.get(node)
        if parts is None:
            return [(child, nr) for child, nr in below if child is not None and self.masks.get(child, 0) & loss]
        return [
            (child, nr) for (child, nr), part in zip(below, parts, strict=True) if child is not None and part & loss
        ]

    def _on_one_way(self, tops: set[Node]) -> bool:
        """Whether one of some joins lies below another: a pass that stops at both would count the upper one twice."""
        below: set[Node | None] = set()
        left = len(tops)
        for node in reversed(self.order):
            if not left:
                break
            if node in tops:
                if node in below:
                    return True
                left -= 1
            elif node not in below:
                continue
            below.update(child for child, _ in self.order[node])
        return False

    def _is_hooked(self, node: Node) -> bool:
        if node not in self._hooked:
            self._hooked[node] = is_hooked(node)
        return self._hooked[node]

    def _is_input(self, node: Node, joins: Sequence[Node]) -> bool:
        return any(child is node for join in joins for child, _ in self.order[join])


def _reachable(order: Nodes, roots: Sequence[Root | None]) -> Nodes:
    left = [node for root in roots for node, _ in origins(root)]
    reached = set(left)
    while left:
        for child, _ in order[left.pop()]:
            if child is not None and child not in reached:
                reached.add(child)
                left.append(child)
    return {node: below for node, below in order.items() if node in reached}


def deepest() -> int:
    """How deep a graph may be walked in this thread.

    Returns:
        A number of nodes, well below what fits its stack.
    """
    return min(_DEEPEST, _stack_size() // _BYTES_PER_NODE)


def _stack_size() -> int:
    """Size of the stack of this thread, bytes; what threads have at least, where the system does not tell."""
    try:
        libc = ctypes.CDLL(None)
        libc.pthread_self.restype = ctypes.c_void_p
        this = ctypes.c_void_p(libc.pthread_self())
        if sys.platform == "darwin":
            libc.pthread_get_stacksize_np.restype = ctypes.c_size_t
            return int(libc.pthread_get_stacksize_np(this))
        attributes = ctypes.create_string_buffer(256)  # larger than any pthread_attr_t
        size = ctypes.c_size_t()
        if libc.pthread_getattr_np(this, attributes) == 0:
            libc.pthread_attr_getstacksize(attributes, ctypes.byref(size))
            libc.pthread_attr_destroy(attributes)
            return size.value
    except (AttributeError, OSError, TypeError):
        pass
    return threading.stack_size() or 1 << 20


def inputs_first(starts: Sequence[Node]) -> Nodes | None:
    """Put nodes in order.

    Args:
        starts: Where to begin.

    Returns:
        All nodes below the starts, each after those below it; None if the graph is too deep.
    """
    most = min(500, _DEEPEST)  # as deep as most graphs are; the stack is looked at beyond
    found = _inputs_first_shallow(starts, most)
    return _inputs_first_deep(starts, most) if found is None else found


def _inputs_first_shallow(starts: Sequence[Node], most: int) -> Nodes | None:
    """The order, if no more nodes than so many ever wait for those below them: a graph is not deeper than that."""
    order: Nodes = {}
    opened: Nodes = {}
    waiting = list(reversed(starts))
    while waiting:
        node = waiting[-1]
        if node in opened:  # all below it is in order, or it was met from elsewhere before
            del waiting[-1]
            order[node] = opened[node]
            continue
        opened[node] = below = node.next_functions
        for child, _ in reversed(below):  # the first one is opened first, as in `_inputs_first_deep`
            if child is not None and child not in opened:
                waiting.append(child)
        if len(waiting) > most:
            return None
    return order


def _inputs_first_deep(starts: Sequence[Node], most: int) -> Nodes | None:
    order: Nodes = {}
    seen: set[Node] = set()
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        below = start.next_functions
        stack = [(start, below, iter(below))]
        while stack:
            node, below, left = stack[-1]
            if len(stack) > most:
                most = deepest()
                if len(stack) > most:
                    return None
            for child, _ in left:
                if child is not None and child not in seen:
                    seen.add(child)
                    its = child.next_functions
                    stack.append((child, its, iter(its)))
                    break
            else:
                stack.pop()
                order[node] = below
    return order


class _Entry(NamedTuple):
    """What is known of the losses whose gradients come into a node at one of its outputs.

    Attributes:
        mask: Those that may come.
        certain: Those that do come.
        together: If any of them comes, another one does too.
    """

    mask: int
    certain: int
    together: bool

    @property
    def settled(self) -> bool:
        """Whether it is out of the question that exactly one loss comes."""
        return self.together or bool(self.certain & (self.certain - 1))


def undecided(roots: Sequence[Root | None], nodes: Nodes) -> tuple[dict[Tensor, int], set[Tensor]]:
    """Find the leaves of which the graph does not tell whether two losses reach them, or one, or none.

    Every node of torch passes a gradient on. A function written in Python or C++ may return None for some of its
    inputs, and what it returns may depend on which of its outputs have a gradient. If two losses come in the same way,
    they go on together or not at all.

    Args:
        roots: Where differentiation starts, (m,); None for a loss without a graph.
        nodes: What :func:`walk` has found.

    Returns:
        For each leaf a bit mask of the losses that reach it for certain, and the leaves that are open unless these are
        two.
    """
    came = _Came()
    for i, root in enumerate(roots):
        entry = _Entry(1 << i, 1 << i, False)
        starts = origins(root)
        for start, output in starts:
            came.enter(start, output, entry)
        if isinstance(root, Tensor) and not starts:
            came.reach(root, entry)
    for node in reversed(nodes):
        came.pass_on(node, nodes[node])
    return came.certain, {leaf for leaf in came.certain if not came.settled[leaf]}


class _Came:
    """What has come into nodes from above, and into leaves.

    Attributes:
        certain: For each leaf, the losses that do reach it.
        settled: For each leaf, whether it is out of the question that exactly one loss comes.
    """

    def __init__(self) -> None:
        self._entries: dict[Node, dict[int, _Entry]] = {}
        self.certain: dict[Tensor, int] = {}
        self.settled: dict[Tensor, bool] = {}

    def enter(self, node: Node, output: int, new: _Entry) -> None:
        outputs = self._entries.setdefault(node, {})
        old = outputs.get(output, _Entry(0, 0, True))
        outputs[output] = _Entry(old.mask | new.mask, old.certain | new.certain, old.together and new.together)

    def reach(self, leaf: Tensor, entry: _Entry) -> None:
        self.certain[leaf] = self.certain.get(leaf, 0) | entry.certain
        self.settled[leaf] = self.settled.get(leaf, True) and entry.together

    def pass_on(self, node: Node, children: Sequence[tuple[Node | None, int]]) -> None:
        # All that is above the node has been handed on before.
        outputs = self._entries.pop(node, {})
        if type(node).__name__ == "AccumulateGrad":
            for entry in outputs.values():
                self.reach(node.variable, entry)  # type: ignore[attr-defined]
            return
        below = None if footprints.name(type(node)) in footprints.IDENTITIES else _passed(node, list(outputs.values()))
        for k, (child, output) in enumerate(children):
            passed = below if below is not None else outputs.get(k)
            if child is not None and passed is not None:
                self.enter(child, output, passed)


def _passed(node: Node, outputs: Sequence[_Entry]) -> _Entry:
    """What comes out of a node below."""
    mask = certain = 0
    for entry in outputs:
        mask |= entry.mask
        certain |= entry.certain
    settled = all(entry.settled for entry in outputs)
    if not is_users(node):
        return _Entry(mask, certain, settled or bool(certain & (certain - 1)))
    return _Entry(mask, 0, settled)  # to each input go the losses of some of the outputs, all or none of each


def is_users(node: Node) -> bool:
    """Whether a node is a function written in Python or C++, which may do what it likes.

    Args:
        node: The node.

    Returns:
        True for those that torch writes in Python too, such as a compiled region.
    """
    return isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction"
