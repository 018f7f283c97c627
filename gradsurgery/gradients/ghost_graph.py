"""Which weights need no gradient of a single loss, as the graph of the losses tells, and where all losses meet.

Everything is read off the nodes of the graph, by their names. A parameter is a ghost only if all that lies between it
and the outputs of its layers is known, in every one of its uses; whatever is not known makes it direct.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.gradients.ghost_layers import TRAFFIC, Convolution, Embedding, Layer, Linear, calling
from gradsurgery.graph import Front, Nodes, Root, hooks, is_hooked, is_users, origins
from gradsurgery.graph.torch_private import base_of, hooks_after, hooks_of, metadata, raw_saved, saved, version

# Nodes that layers leave in the graph.
_LAYERS = frozenset({"AddmmBackward0", "MmBackward0", "ConvolutionBackward0", "EmbeddingBackward0"})

# Those of them that multiply two matrices.
_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0"})

# Where nodes keep the tensor that was their input, which may have been asked to keep its gradient.
_INPUTS = {
    "AddmmBackward0": "mat1",
    "BmmBackward0": "self",
    "ConvolutionBackward0": "input",
    "GeluBackward0": "self",
    "MmBackward0": "self",
    "MulBackward0": "self",
    "NativeLayerNormBackward0": "input",
    "PowBackward0": "self",
    "SiluBackward0": "self",
}

# Passing side by side costs as much as visiting all nodes so many times; found by timing.
_TOGETHER = 10


class _Way(NamedTuple):
    """From an input of a node down to a shared parameter, through nothing but casts and transpositions.

    Attributes:
        place: The place of the parameter.
        flipped: It is transposed.
        steps: Each node on the way, the parameter at the end by its id, with the node above it and that one's input.
    """

    place: int
    flipped: bool
    steps: list[tuple[Node | int, tuple[Node, int]]]


class _Call(NamedTuple):
    """A layer, called once.

    Attributes:
        node: What stands for it in the graph.
        weight: The way to its weight.
        bias: The way to its bias, if it has one that is simply added.
        inputs: What it was called with: (Nᵤ, in), images, or indices.
    """

    node: Any
    weight: _Way
    bias: _Way | None
    inputs: Tensor


class Passing(NamedTuple):
    """What one loss does below the trunk, weight gradients left out, in multiplications that take as long.

    Attributes:
        calls: It visits nodes.
        products: It multiplies.
        weights: It reads the matrices of linear layers.
        outputs: It writes gradients at the outputs of these.
    """

    calls: float
    products: float
    weights: float
    outputs: float

    def spared(self, m: int) -> float:
        """Predict what passing side by side spares.

        Nodes are visited and weights are read once for all. In return the gradients at outputs no longer fit the cache.
        The last loss goes alone, and torch's ways of carrying several cost as much as visiting the nodes ten times.

        Args:
            m: Number of losses.

        Returns:
            Multiplications that take as long; 0 if nothing is spared.
        """
        return max(0.0, (m - 2) * (self.calls + self.weights - self.outputs) - _TOGETHER * self.calls)


class Reader:
    """Knows who uses what in a graph.

    Args:
        roots: Where differentiation starts.
        nodes: All nodes with what is below each, each after those.
        shared: The parameters that are looked for.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        nodes: Nodes,
        shared: Sequence[Tensor],
    ) -> None:
        self.nodes = nodes
        self.shared = shared
        self.places = {id(p): place for place, p in enumerate(shared)}
        self.starts: list[tuple[Node, int]] = []
        # How often each is used; leaves by their ids, since one may have several nodes.
        self.uses: dict[Node | int, int] = {}
        self._leaves = {node: node.variable for node in nodes if _kind(node) == "AccumulateGrad"}  # type: ignore[attr-defined]
        self._hooked: dict[Node, bool] = {}
        used: list[Node | None] = [child for below in nodes.values() for child, _ in below]
        for root in roots:
            starts = origins(root)
            self.starts += starts
            used += [node for node, _ in starts]
            if isinstance(root, Tensor) and not starts:  # a loss that is a parameter itself
                self.uses[id(root)] = self.uses.get(id(root), 0) + 1
        for child, times in Counter(used).items():
            if child is not None:
                leaf = self._leaves.get(child)
                key = child if leaf is None else id(leaf)
                self.uses[key] = self.uses.get(key, 0) + times

    def layers(self) -> list[Layer]:
        """Find the layers whose weights could be ghosts.

        Returns:
            One for each such weight, with all calls that use it.
        """
        calls: dict[int, list[_Call]] = {}
        for node in self.nodes:
            if _kind(node) in _LAYERS and (call := self._call(node)) is not None:
                calls.setdefault(call.weight.place, []).append(call)
        layers = []
        for of_one in calls.values():
            if self._are_all([call.weight for call in of_one]):
                kinds = {_kind(call.node) for call in of_one}
                layer: Layer | None = None
                if kinds == {"EmbeddingBackward0"}:
                    layer = self._embedding(of_one)
                elif kinds == {"ConvolutionBackward0"}:
                    layer = self._convolution(of_one)
                elif kinds <= _PRODUCTS:
                    layer = self._linear(of_one)
                if layer is not None:
                    layers.append(layer)
        return layers

    def _call(self, node: Any) -> _Call | None:
        kind = _kind(node)
        try:
            if kind == "ConvolutionBackward0":
                return self._convolution_call(node)
            if kind != "EmbeddingBackward0":
                return self._linear_call(node, kind == "AddmmBackward0")
            way = self._way(node, 0)
            if way is None or saved(node, "sparse") or self._is_hooked(node):
                return None
            return _Call(node, way, None, _saved_tensor(node, "indices").detach().reshape(-1).long())
        # Saved tensors are no stable part of torch, may have been changed in place, or may be freed already.
        except (AttributeError, RuntimeError):
            return None

    def _linear_call(self, node: Any, affine: bool) -> _Call | None:
        way = self._way(node, 2 if affine else 1, flips=True)
        if way is None or (affine and saved(node, "alpha") != 1):
            return None
        inputs = _saved_tensor(node, "mat1" if affine else "self")
        factor = _saved_tensor(node, "mat2")
        if not is_simple(inputs) or inputs.dim() != 2 or self._is_hooked(node) or has_tensor_hooks(factor):
            return None
        weight = self.shared[way.place]
        out, width = weight.shape if way.flipped else weight.shape[::-1]
        shape = tuple(metadata(node)[0].shape)
        if not inputs.numel() or not out or shape != (len(inputs), out) or inputs.shape[1] != width:
            return None
        bias = self._way(node, 0) if affine and saved(node, "beta") == 1 else None
        if bias is not None and self.shared[bias.place].shape != (out,):
            bias = None
        return _Call(node, way, bias, inputs.detach())

    def _linear(self, calls: Sequence[_Call]) -> Linear | None:
        if (
            len({(call.weight.flipped, *_formats(call)) for call in calls}) > 1
        ):  # they cannot be put one below the other
            return None
        places = self._weight_and_bias(calls)
        return Linear(
            tuple(GradientEdge(call.node, 0) for call in calls),
            tuple(self.shared[place] for place in places),
            tuple(places),
            tuple(call.inputs for call in calls),
            tuple(version(call.inputs) for call in calls),
            calls[0].weight.flipped,
        )

    def _weight_and_bias(self, calls: Sequence[_Call]) -> list[int]:
        """The place of the weight, and that of the bias if nothing else uses it."""
        places = [calls[0].weight.place]
        ways = [call.bias for call in calls if call.bias is not None]
        if len(ways) == len(calls) and len({way.place for way in ways}) == 1 and self._are_all(ways):
            places.append(ways[0].place)
        return places

    def _convolution_call(self, node: Any) -> _Call | None:
        way = self._way(node, 1)
        if way is None or saved(node, "groups") != 1 or saved(node, "transposed") or self._is_hooked(node):
            return None
        inputs = _saved_tensor(node, "input")
        weight, shape = self.shared[way.place], tuple(metadata(node)[0].shape)
        if not is_simple(inputs) or inputs.dim() != 4 or weight.dim() != 4 or not inputs.numel() or len(shape) != 4:
            return None
        return _Call(node, way, self._way(node, 2), inputs.detach())

    def _convolution(self, calls: Sequence[_Call]) -> Convolution | None:
        if len(calls) > 1:
            return None
        node, _, _, inputs = calls[0]
        places = self._weight_and_bias(calls)
        batch, _, height, width = metadata(node)[0].shape
        window: dict[str, tuple[int, ...]] = {}
        for name in ("dilation", "padding", "stride"):
            numbers = tuple(saved(node, name))
            window[name] = numbers * 2 if len(numbers) == 1 else numbers
        return Convolution(
            (GradientEdge(node, 0),),
            tuple(self.shared[place] for place in places),
            tuple(places),
            inputs,
            version(inputs),
            batch * height * width,
            window,
        )

    def _embedding(self, calls: Sequence[_Call]) -> Embedding | None:
        place = calls[0].weight.place
        table = self.shared[place]
        count, width = table.shape
        for node, *_, indices in calls:
            if not width or not len(indices) or saved(node, "weight_sym_argsize_0") != count:
                return None
            if metadata(node)[0].shape[-1] != width:
                return None
        if len(set(map(_formats, calls))) > 1:
            return None
        indices = torch.cat([call.inputs for call in calls]) if len(calls) > 1 else calls[0].inputs
        groups, unique = _grouped(indices)
        scales = [scales_of(call.node, call.inputs, count) for call in calls]
        joined: Tensor | None = None
        if any(s is not None for s in scales):
            ones = [torch.ones(len(call.inputs), 1, device=indices.device, dtype=torch.float64) for call in calls]
            joined = torch.cat([one if s is None else s for s, one in zip(scales, ones, strict=True)])
        edges = tuple(GradientEdge(call.node, 0) for call in calls)
        return Embedding(edges, (table,), (place,), tuple(len(c.inputs) for c in calls), groups, unique, joined)

    def _way(self, node: Node, slot: int, flips: bool = False) -> _Way | None:
        """The way from an input of a node to a shared parameter, if there is nothing unknown on it."""
        flipped, above = False, (node, slot)
        steps: list[tuple[Node | int, tuple[Node, int]]] = []
        while True:
            child = self.nodes[above[0]][above[1]][0]
            if child is None:
                return None
            leaf = self._leaves.get(child)
            if leaf is not None:
                place = self.places.get(id(leaf))
                if place is None or not is_simple(leaf):
                    return None
                if has_tensor_hooks(leaf) or hooks_after(leaf):
                    return None
                return _Way(place, flipped, [*steps, (id(leaf), above)])
            kind = _kind(child)
            if kind == "TBackward0" and flips:
                flipped = not flipped
            elif kind != "ToCopyBackward0":  # such as autocast makes
                return None
            if self._is_hooked(child):
                return None
            steps.append((child, above))
            above = (child, 0)

    def _are_all(self, ways: Sequence[_Way]) -> bool:
        """Whether nothing else uses the parameter at the end of these ways, or anything on them."""
        above: dict[Node | int, set[tuple[Node, int]]] = {}
        for way in ways:
            for step, user in way.steps:
                above.setdefault(step, set()).add(user)
        return all(len(users) == self.uses[step] for step, users in above.items())

    def _is_hooked(self, node: Node) -> bool:
        if node not in self._hooked:
            self._hooked[node] = is_hooked(node)
        return self._hooked[node]

    @cached_property
    def has_convolutions(self) -> bool:
        """Look for convolutions among the nodes.

        Returns:
            True if there is one.
        """
        return any(_kind(node) == "ConvolutionBackward0" for node in self.nodes)

    @cached_property
    def is_watched(self) -> bool:
        """Look for code of the user that sees gradients: hooks on tensors and modules, and functions.

        Returns:
            True if there may be some.
        """
        if hooks.may_look(self.nodes):
            return True
        for node in self.nodes:
            kind = _kind(node)
            if is_users(node):
                return True
            try:
                inputs = _saved_tensor(node, _INPUTS[kind])
            except (KeyError, AttributeError, RuntimeError):
                continue
            if isinstance(inputs, Tensor) and _retains(inputs):
                return True
        return False

    @cached_property
    def trunk(self) -> GradientEdge | None:
        """The first place that all ways from the losses to the shared parameters have in common.

        Returns:
            Its edge, or None.
        """
        front = Front(self._leading())
        for node, output in self.starts:
            if node in front.at:
                front.reach(node, output)
        for node in front.order:
            if node in self._leaves:  # nothing below is on the way to this one
                return None
            if front.is_narrow(node):
                return GradientEdge(node, 0)
            for child, output in self.nodes[node]:
                if child is not None and child in front.at:
                    front.reach(child, output)
        return None

    def passing(self, trunk: GradientEdge | None) -> Passing:
        """Count what one loss does on its way down from the trunk, weight gradients left out.

        Args:
            trunk: The first place that all losses go through; None: they have none.

        Returns:
            In multiplications that take as long.
        """
        below: set[Node] = set()
        left = [] if trunk is None else [trunk.node]
        products = weights = outputs = 0
        while left:
            node = left.pop()
            if node in below:
                continue
            below.add(node)
            left += [child for child, _ in self.nodes[node] if child is not None]
            if _kind(node) in _PRODUCTS:
                entries = math.prod(metadata(node)[0].shape)
                rows, columns = self._factor(node)
                products, weights, outputs = products + entries * rows, weights + rows * columns, outputs + entries
        calls = len(below) * calling(self.shared[0].device)
        return Passing(calls, float(products), TRAFFIC * weights, TRAFFIC * outputs)

    def _factor(self, node: Any) -> tuple[int, int]:
        """The shape of what a gradient is multiplied by on its way through a linear layer, (0, 0) if it ends there."""
        try:
            factor = _saved_tensor(node, "mat2")
        except (AttributeError, RuntimeError):
            return 0, 0
        return (0, 0) if factor is None else tuple(factor.shape)

    def _leading(self) -> list[Node]:
        """The nodes that lead to the shared parameters, from the losses down."""
        leading: set[Node] = set()
        for node, below in self.nodes.items():
            if node in self._leaves:
                if id(self._leaves[node]) in self.places:
                    leading.add(node)
            elif any(child in leading for child, _ in below):
                leading.add(node)
        return [node for node in reversed(self.nodes) if node in leading]


def _formats(call: _Call) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """Where a call was made, and in which precision."""
    return call.inputs.device, call.inputs.dtype, metadata(call.node)[0].dtype


def _grouped(indices: Tensor) -> tuple[Tensor, Tensor]:
    """For each index its place among those without repetition, and these, filled up with zeros; without a host sync."""
    ordered, order = indices.sort()
    group = torch.zeros_like(ordered)
    group[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    groups = torch.empty_like(group).scatter_(0, order, group)
    return groups, torch.zeros_like(ordered).scatter_(0, group, ordered)


def scales_of(node: Any, indices: Tensor, count: int) -> Tensor | None:
    """What a call of an embedding multiplies the gradient at each index by.

    Args:
        node: The node of the call.
        indices: What it looks up, (Nᵤ,).
        count: Rows of the table.

    Returns:
        (Nᵤ, 1), float64; None: nothing.
    """
    scales: Tensor | None = None
    if saved(node, "scale_grad_by_freq"):
        groups, _ = _grouped(indices)
        times = torch.zeros(len(indices), device=indices.device, dtype=torch.float64)
        times.index_add_(0, groups, torch.ones_like(times))
        scales = times[groups].reciprocal()[:, None]
    if 0 <= saved(node, "padding_idx") < count:
        kept = (indices != saved(node, "padding_idx"))[:, None].double()
        scales = kept if scales is None else scales * kept
    return scales


def _kind(node: Node) -> str:
    return type(node).__name__


def _saved_tensor(node: Any, name: str) -> Any:
    """A tensor that a node has saved; an AttributeError if reading it would run code, such as a second forward pass."""
    if raw_saved(node, name).unpack_hook is not None:
        raise AttributeError(name)
    return saved(node, name)


def is_simple(tensor: Any) -> bool:
    """Whether this is a dense tensor of real numbers, and nothing beyond.

    Args:
        tensor: Anything.

    Returns:
        True if so.
    """
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_floating_point()


def has_tensor_hooks(tensor: Tensor | None) -> bool:
    """Whether functions look at the gradient of a tensor, or of what it is a view of.

    Args:
        tensor: The tensor.

    Returns:
        False for None.
    """
    if tensor is None:
        return False
    base = base_of(tensor)
    return bool(hooks_of(tensor) or (base is not None and hooks_of(base)))


def _retains(tensor: Tensor) -> bool:
    """Whether a tensor between the leaves and the losses was asked to keep its gradient."""
    base = base_of(tensor)
    return tensor.retains_grad or (base is not None and base.retains_grad)
