"""What can be read off the autograd graph of the losses before anything is differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# Freeing a graph that Python has walked recurses. The C++ stack of a main thread overflows at twice this depth.
_DEEPEST = 20_000


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
        nodes: All nodes, each after those below it; none if the graph was not walked.
    """

    masks: dict[Tensor, int] | None
    leaves: tuple[Tensor, ...]
    overlaps: tuple[bool, ...]
    overlaps_later: tuple[bool, ...]
    hidden: bool
    nodes: Sequence[Node]


def walk(roots: Sequence[Tensor | GradientEdge | None]) -> Graph:
    """Find the leaves that each loss can reach, and which losses share a part of their graphs.

    Args:
        roots: Where differentiation starts, (m,); None for a loss without a graph.

    Returns:
        What there is to know.
    """
    m = len(roots)
    masks: dict[Node, int] = {}
    leaves: dict[Tensor, int] = {}
    starts: list[Node] = []
    # DistributedDataParallel puts one node behind all outputs of a model. It hands output k to input k, no other.
    sinks: dict[Node, dict[int, int]] = {}

    def reach(node: Node, output: int, mask: int) -> None:
        masks[node] = masks.get(node, 0) | mask
        if type(node).__name__ == "_DDPSinkBackward":
            outputs = sinks.setdefault(node, {})
            outputs[output] = outputs.get(output, 0) | mask

    for i, root in enumerate(roots):
        if root is None:
            continue
        start = root.grad_fn if isinstance(root, Tensor) else root.node
        if start is not None:
            reach(start, root.output_nr, 1 << i)
            starts.append(start)
        elif isinstance(root, Tensor):  # the loss is a leaf itself
            leaves[root] = leaves.get(root, 0) | 1 << i

    order = inputs_first(starts)
    if order is None:
        return Graph(None, (), (True,) * m, (True,) * m, hidden=False, nodes=())
    overlapping: set[int] = set()
    hidden = False
    for node in reversed(order):
        mask = masks[node]
        outputs = sinks.get(node)
        for k, (child, output) in enumerate(node.next_functions):
            passed = mask if outputs is None else outputs.get(k, 0)
            if child is not None:
                reach(child, output, passed)
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaf = node.variable  # type: ignore[attr-defined]
            leaves[leaf] = leaves.get(leaf, 0) | mask
        elif mask & (mask - 1):
            overlapping.add(mask)
        hidden = hidden or kind == "CheckpointFunctionBackward"
    return Graph(
        None if hidden else leaves,
        tuple(leaves),
        tuple(any(mask >> i & 1 for mask in overlapping) for i in range(m)),
        tuple(any(mask >> i & 1 and mask >> (i + 1) for mask in overlapping) for i in range(m)),
        hidden,
        order,
    )


def inputs_first(starts: Sequence[Node]) -> list[Node] | None:
    """Put nodes in order.

    Args:
        starts: Where to begin.

    Returns:
        All nodes below the starts, each after those below it; None if the graph is too deep.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        stack: list[tuple[Node, Iterator[tuple[Node | None, int]]]] = [(start, iter(start.next_functions))]
        while stack:
            node, below = stack[-1]
            if len(stack) > _DEEPEST:
                return None
            for child, _ in below:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append((child, iter(child.next_functions)))
                    break
            else:
                stack.pop()
                order.append(node)
    return order
