"""What can be read off the autograd graph of the losses before anything is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
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
