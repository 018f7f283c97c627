"""What can be read off the autograd graph of the losses before anything is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

# Freeing a graph that Python has walked recurses. The C++ stack of a main thread overflows at twice this depth.
_DEEPEST = 20_000


#: Nodes of a graph, each after those below it, with their ``next_functions``: each access to these makes them anew.
Nodes = dict[Node, tuple[tuple["Node | None", int], ...]]


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
        nodes: All nodes with what is below each, each after those; empty if the graph was not walked to the end.
    """

    masks: dict[Tensor, int] | None
    leaves: tuple[Tensor, ...]
    overlaps: tuple[bool, ...]
    overlaps_later: tuple[bool, ...]
    hidden: bool
    nodes: Nodes


def walk(roots: Sequence[Tensor | GradientEdge | None]) -> Graph:
    """Find the leaves that each loss can reach, and which losses share a part of their graphs.

    Args:
        roots: Where differentiation starts, (m,); None for a loss without a graph.

    Returns:
        What there is to know.
    """
    m = len(roots)
    masks: dict[Node, int] = {}
    leaves: dict[int, int] = {}  # by id: hashing a tensor takes longer than anything else here
    seen: dict[int, Tensor] = {}
    starts: list[Node] = []
    # DistributedDataParallel puts one node behind all outputs of a model. It hands output k to input k, no other.
    sinks: dict[Node, dict[int, int]] = {}

    def enter_sink(node: Node, output: int, mask: int) -> None:
        outputs = sinks.setdefault(node, {})
        outputs[output] = outputs.get(output, 0) | mask

    for i, root in enumerate(roots):
        if root is None:
            continue
        start = root.grad_fn if isinstance(root, Tensor) else root.node
        if start is not None:
            masks[start] = masks.get(start, 0) | 1 << i
            if _is_sink(start):
                enter_sink(start, root.output_nr, 1 << i)
            starts.append(start)
        elif isinstance(root, Tensor):  # the loss is a leaf itself
            seen[id(root)] = root
            leaves[id(root)] = leaves.get(id(root), 0) | 1 << i

    order = inputs_first(starts)
    if order is None:
        return Graph(None, (), (True,) * m, (True,) * m, hidden=False, nodes={})
    overlapping: set[int] = set()
    hidden = False
    for node in reversed(order):
        mask = masks[node]
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            seen[id(leaf)] = leaf
            leaves[id(leaf)] = leaves.get(id(leaf), 0) | mask
            continue
        outputs = sinks.get(node) if sinks else None
        for k, (child, output) in enumerate(order[node]):
            if child is not None:
                passed = mask if outputs is None else outputs.get(k, 0)
                masks[child] = masks.get(child, 0) | passed
                if _is_sink(child):
                    enter_sink(child, output, passed)
        if mask & (mask - 1):
            overlapping.add(mask)
        hidden = hidden or kind == "CheckpointFunctionBackward"
    found = {seen[key]: mask for key, mask in leaves.items()}
    return Graph(
        None if hidden else found,
        tuple(found),
        tuple(any(mask >> i & 1 for mask in overlapping) for i in range(m)),
        tuple(any(mask >> i & 1 and mask >> (i + 1) for mask in overlapping) for i in range(m)),
        hidden,
        order,
    )


def _is_sink(node: Node) -> bool:
    return type(node).__name__ == "_DDPSinkBackward"


def inputs_first(starts: Sequence[Node]) -> Nodes | None:
    """Put nodes in order.

    Args:
        starts: Where to begin.

    Returns:
        All nodes below the starts, each after those below it; None if the graph is too deep.
    """
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
            if len(stack) > _DEEPEST:
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


def undecided(roots: Sequence[Tensor | GradientEdge | None], nodes: Nodes) -> tuple[dict[Tensor, int], set[Tensor]]:
    """Find the leaves of which the graph does not tell whether two losses reach them, or one, or none.

    Every node of torch passes a gradient on. A function written in Python or C++ may return None for some of its
    inputs, and what it returns may depend on which of its outputs have a gradient. If two losses come in the same way,
    they go on together or not at all.

    Args:
        roots: Where differentiation starts, (m,); None for a loss without a graph.
        nodes: What :func:`walk` has found.

    Returns:
        For each leaf a bit mask of the losses that reach it for certain, and the leaves that are open.
    """
    entries: dict[Node, dict[int, _Entry]] = {}
    certain: dict[Tensor, int] = {}
    settled: dict[Tensor, bool] = {}

    def enter(node: Node, output: int, new: _Entry) -> None:
        outputs = entries.setdefault(node, {})
        old = outputs.get(output, _Entry(0, 0, True))
        outputs[output] = _Entry(old.mask | new.mask, old.certain | new.certain, old.together and new.together)

    def reach(leaf: Tensor, entry: _Entry) -> None:
        certain[leaf] = certain.get(leaf, 0) | entry.certain
        settled[leaf] = settled.get(leaf, True) and entry.together

    for i, root in enumerate(roots):
        if root is None:
            continue
        entry = _Entry(1 << i, 1 << i, False)
        start = root.grad_fn if isinstance(root, Tensor) else root.node
        if start is not None:
            enter(start, root.output_nr, entry)
        elif isinstance(root, Tensor):
            reach(root, entry)
    for node in reversed(nodes):
        outputs = entries.pop(node, {})
        if type(node).__name__ == "AccumulateGrad":
            for entry in outputs.values():
                reach(node.variable, entry)  # type: ignore[attr-defined]
            continue
        below = None if _is_sink(node) else _passed(node, list(outputs.values()))
        for k, (child, output) in enumerate(nodes[node]):
            passed = below if below is not None else outputs.get(k)
            if child is not None and passed is not None:
                enter(child, output, passed)
    open_leaves = {leaf for leaf, mask in certain.items() if not settled[leaf] and not mask & (mask - 1)}
    return certain, open_leaves


def _passed(node: Node, outputs: Sequence[_Entry]) -> _Entry:
    """What comes out of a node below."""
    mask = certain = 0
    for entry in outputs:
        mask |= entry.mask
        certain |= entry.certain
    settled = all(entry.settled for entry in outputs)
    if not _may_keep(node):
        return _Entry(mask, certain, settled or bool(certain & (certain - 1)))
    return _Entry(mask, 0, settled)  # to each input go the losses of some of the outputs, all or none of each


def _may_keep(node: Node) -> bool:
    """Whether a node may hand None to an input that wants a gradient."""
    return isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction"
