"""Which sample reaches which entries of a tensor, where a vector has one loss per sample.

Every sample gets a code of 2k bits, its number and the number's complement: the union of two codes has a bit that is
set in both halves. So the rules of :mod:`gradsurgery.graph.footprints` carry one machine word per entry, whatever the
number of samples, and an entry that two samples reach is told from one that a single sample reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.graph import footprints
from gradsurgery.graph.footprints import Footprint
from gradsurgery.graph.reach import Front, Graph, Nodes, inputs_first
from gradsurgery.graph.torch_private import engine_backward, metadata

#: Numbers of samples, −1 for nobody.
Labels = NDArray[np.int64]


class Along(NamedTuple):
    """The samples of a tensor's entries, where they change along one axis only.

    Attributes:
        axis: The axis.
        labels: Which sample each place along it belongs to.
    """

    axis: int
    labels: Labels


class Samples(NamedTuple):
    """A vector with one loss per sample, and what its graph tells.

    Attributes:
        edge: The vector in the graph.
        size: Number of samples, B.
        nodes: All nodes below, each after those below it.
        groups: For each sample the loss that it is a part of, (B,); None where each is a loss of its own.
        found: For each node the footprints of its outputs.
    """

    edge: GradientEdge
    size: int
    nodes: Nodes
    groups: Tensor | None
    found: Mapping[Node, Mapping[int, Footprint]]

    def along(self, node: Node, output: int) -> Along | None:
        """Whose the entries of a tensor are.

        Args:
            node: The node that makes it.
            output: The number of its output.

        Returns:
            The samples; None where the graph proves nothing.
        """
        footprint = self.found.get(node, {}).get(output, 0)
        if isinstance(footprint, int) and not _is_one(footprint, self.size):
            return None
        shape = tuple(metadata(node)[output].shape)
        labels = _decoded(_without_repeats(np.asarray(footprint, np.int64)), self.size)
        if labels is None:
            return None
        axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
        if not axes:
            return Along(0, np.full(shape[0] if shape else 1, labels.item(), np.int64))
        return Along(axes[0], labels.reshape(-1)) if len(axes) == 1 else None

    def is_mixed(self, node: Node, output: int) -> bool:
        """Whether several samples surely reach the same entries, by the structure of the operations.

        Args:
            node: The node.
            output: The number of its output.

        Returns:
            False where the graph does not tell.
        """
        footprint = self.found.get(node, {}).get(output, 0)
        if isinstance(footprint, int):
            return not footprint >> 2 * _bits(self.size) and not _is_one(footprint, self.size)
        return not _is_vague(footprint, self.size) and _decoded(footprint, self.size) is None

    def graph(self, m: int) -> Graph:
        """What a walk over all losses would find, as far as it matters to those who need no row.

        Args:
            m: Number of losses.

        Returns:
            Leaves that two samples reach count as reached by all losses.
        """
        masks: dict[Tensor, int] = {}
        for node, outputs in self.found.items():
            if type(node).__name__ == "AccumulateGrad":
                leaf = node.variable  # type: ignore[attr-defined]
                masks[leaf] = masks.get(leaf, 0) | self._mask(footprints.union(outputs[0]), m)
        later = (*(True,) * (m - 1), False)
        return Graph(masks, tuple(masks), (True,) * m, later, False, self.nodes)

    def _mask(self, code: int, m: int) -> int:
        labels = None if _is_vague(code, self.size) else _decoded(code, self.size)
        if labels is None:
            return (1 << m) - 1
        return 1 << (labels.item() if self.groups is None else int(self.groups[labels.item()]))


def traced(edge: GradientEdge, groups: Tensor | None = None) -> Samples | None:
    """Follow the samples of a vector down to the leaves, by the structure of the operations alone.

    Args:
        edge: The vector in the graph.
        groups: For each sample the loss that it is a part of, (B,).

    Returns:
        What there is to know; None if the graph is too deep.
    """
    nodes = inputs_first([edge.node])
    if nodes is None:
        return None
    count = int(metadata(edge.node)[edge.output_nr].shape[0])
    losses = footprints.Losses.of(2 * _bits(count))._replace(runs=False)
    found: dict[Node, dict[int, Footprint]] = {edge.node: {edge.output_nr: _codes(count)}}
    for node in reversed(nodes):
        outputs = found.get(node)
        below = nodes[node]
        if outputs is None or not below:
            continue
        outputs = found[node] = {k: footprints.settled(f) for k, f in outputs.items()}
        for (child, nr), footprint in zip(below, _spread(node, below, outputs, losses, count), strict=True):
            if child is not None and (not isinstance(footprint, int) or footprint):
                at = found.setdefault(child, {})
                at[nr] = footprints.both(at[nr], footprint) if nr in at else footprint
    return Samples(edge, count, nodes, groups, found)


def _spread(
    node: Node, below: footprints.Below, outputs: dict[int, Footprint], losses: footprints.Losses, count: int
) -> Sequence[Footprint]:
    """The footprints of the inputs. What is mixed stays mixed, without a look at the operation."""
    first = next(iter(outputs.values()))
    if len(outputs) == 1 and isinstance(first, int) and not _is_one(first, count):
        return [first] * len(below)
    return footprints.spread(node, below, outputs, losses)


def vector_of(losses: Sequence[Tensor]) -> GradientEdge | None:
    """The vector that some losses are all entries of, in its order.

    Args:
        losses: Scalars.

    Returns:
        Its place in the graph; None if they are something else.
    """
    node: Any = losses[0].grad_fn if losses else None
    if node is None or type(node).__name__ != "UnbindBackward0" or len(metadata(node)) != len(losses):
        return None
    if any(loss.grad_fn is not node or loss.output_nr != k for k, loss in enumerate(losses)):
        return None
    ((child, nr),) = node.next_functions
    return None if child is None or len(metadata(child)[nr].shape) != 1 else GradientEdge(child, nr)


def vector_below(losses: Sequence[Tensor]) -> GradientEdge | None:
    """The first vector that all losses are made from, such as one loss per sample where these are means over groups.

    Args:
        losses: Scalars, (m,).

    Returns:
        Its place in the graph; None if the ways of the losses meet nowhere in a vector of m entries at least.
    """
    starts = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    nodes = inputs_first(starts) if len(starts) == len(losses) else None
    if nodes is None:
        return None
    front = Front(list(reversed(nodes)))
    for loss, node in zip(losses, starts, strict=True):
        front.reach(node, loss.output_nr)
    for node in front.order:
        if type(node).__name__ == "AccumulateGrad":
            return None
        if front.is_narrow(node):
            shape = tuple(metadata(node)[0].shape)
            return GradientEdge(node, 0) if len(shape) == 1 and shape[0] >= len(losses) else None
        for child, output in nodes[node]:
            if child is not None:
                front.reach(child, output)
    return None


def grouped(losses: Sequence[Tensor]) -> tuple[GradientEdge | None, Tensor | None]:
    """The vector of one loss per sample that some losses are made from, each from samples of its own.

    Args:
        losses: Scalars, (m,).

    Returns:
        The vector, and for each of its entries the loss that it goes into, −1 for none; None if a sample goes into two.
    """
    edge = vector_below(losses)
    if edge is None:
        return None, None
    numbers = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    mark = numbers.flip(0).square()
    found = []
    for marks in (torch.ones_like(numbers), numbers, mark):
        seeds = tuple(value.to(loss) for value, loss in zip(marks, losses, strict=True))
        (g,) = engine_backward(tuple(losses), seeds, (edge,), True, accumulate=False)  # type: ignore[arg-type]
        found.append(torch.zeros(0) if g is None else g.detach().double())
    ones, first, second = found
    # What several losses hold of a sample may cancel in one of the passes.
    used = (ones != 0) | (first != 0) | (second != 0)
    safe = torch.where(used, ones, torch.ones_like(ones))
    groups = torch.where(used, (first / safe).round() - 1, -torch.ones_like(ones)).long()
    inside = (groups >= -1) & (groups < len(losses))
    place = groups.clamp(0, len(losses) - 1)
    # The marks as the losses' own dtypes hold them, and rounding of the few operations from a loss to the vector.
    rounding = 16 * max(torch.finfo(loss.dtype).eps for loss in losses)
    held = [
        torch.stack([x.to(loss).double() for x, loss in zip(marks, losses, strict=True)]) for marks in (numbers, mark)
    ]
    wanted = [marks.to(second)[place] for marks in held]
    errors = [(seen / safe - one).abs() <= rounding * one for seen, one in zip((first, second), wanted, strict=True)]
    close = errors[0] & errors[1]
    return (edge, groups) if bool((inside & (close | ~used)).all()) else (None, None)


def candidates(size: int, count: int) -> Iterator[Labels]:
    """How places along an axis may belong to samples, where the graph does not tell.

    Args:
        size: Places.
        count: Samples.

    Yields:
        Sample after sample, then place after place.
    """
    times, rest = divmod(size, count)
    if rest or not times:
        return
    yield np.repeat(np.arange(count), times)
    if times > 1:
        yield np.tile(np.arange(count), times)


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def _codes(count: int) -> NDArray[np.int64]:
    numbers, k = np.arange(count, dtype=np.int64), _bits(count)
    return numbers | (numbers ^ ((1 << k) - 1)) << k


def _without_repeats(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes without the axes along which they are the same, but for places that nobody reaches."""
    for axis in range(codes.ndim):
        if codes.shape[axis] == 1:
            continue
        line = codes[tuple(slice(None) if k == axis else 0 for k in range(codes.ndim))]
        if line[0] and line[-1] and line[0] != line[-1]:  # as along the samples
            continue
        most = codes.max(axis, keepdims=True)
        if ((codes == most) | (codes == 0)).all():
            codes = most
    return codes


def _is_vague(footprint: Footprint, count: int) -> bool:
    everything = footprint if isinstance(footprint, int) else int(np.bitwise_or.reduce(footprint, axis=None))
    return bool(everything >> 2 * _bits(count))


def _is_one(code: int, count: int) -> bool:
    """Whether a footprint that is the same everywhere is that of one sample, or of nobody."""
    k = _bits(count)
    full = (1 << k) - 1
    return not code or (code & full) ^ (code >> k) == full


def _decoded(footprint: Footprint, count: int) -> Labels | None:
    """The samples of entries, −1 for nobody; None if some belong to several or are vague."""
    k = _bits(count)
    full = (1 << k) - 1
    codes = np.asarray(footprint, np.int64)
    low = codes & full
    single = low ^ (codes >> k) == full
    if single.all():
        return low
    nobody = codes == 0
    return np.where(nobody, -1, low) if (single | nobody).all() else None
