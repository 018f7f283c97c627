"""Which layers of a graph give the gradients of single samples, as the nodes of the graph tell.

A *site* is the first node above a parameter that is no view and no cast. What it uses is a *value*: the parameter, or
something made of parameters alone, such as a normalised weight.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.gradients.ghost_graph import Reader, has_tensor_hooks, is_simple, scales_of
from gradsurgery.gradients.sample_layers import Convolution, Embedding, Linear, Summed, Use
from gradsurgery.graph import is_hooked
from gradsurgery.graph.footprints import acts_by_entry, named
from gradsurgery.graph.samples import Along, Samples
from gradsurgery.graph.torch_private import has_saved, hooks_after, metadata, raw_saved, saved, unpack_hook

# What may lie between a parameter and the layer that uses it.
_DERIVING = named(
    "TBackward0 ToCopyBackward0 ViewBackward0 ReshapeAliasBackward0 UnsafeViewBackward0 UnsqueezeBackward0 "
    "SqueezeBackward0 SqueezeBackward1 SqueezeBackward2 SliceBackward0 SelectBackward0 PermuteBackward0 "
    "TransposeBackward0 WeightNormInterfaceBackward0 AccumulateGrad"
)

# What is no part of a value, and the most nodes of one.
_LAYERS = named(
    "AddmmBackward0 BmmBackward0 ConvolutionBackward0 EmbeddingBackward0 NativeBatchNormBackward0 "
    "NativeGroupNormBackward0 NativeLayerNormBackward0"
)
_MOST_MADE_OF = 32

#: The node of a value that uses of it have in common: its place in the graph, or the id of a leaf.
Key = tuple[Node, int] | int


class Refused(Exception):
    """The gradients of single samples cannot be told apart; the reason is the end of a sentence."""


@dataclass
class Site:
    """A node that uses values.

    Attributes:
        node: The node.
        uses: The values that it uses, and how.
        along: Whose the entries of its output are, as the graph proves; None where a check has to tell.
        is_lowest: No other site lies below.
    """

    node: Node
    uses: list[tuple[Key, Use]]
    along: Along | None
    is_lowest: bool = True


class Value(NamedTuple):
    """What sites use.

    Attributes:
        places: Of the parameters that it is made of.
        edge: Where it is made; None if it is a parameter itself.
    """

    places: tuple[int, ...]
    edge: GradientEdge | None


@dataclass
class Plan:
    """How the gradients of single samples are found.

    Attributes:
        params: The parameters.
        sites: From the losses down.
        values: What they use.
        direct: Places of the parameters that need a pass per loss.
        inner: Nodes between parameters and sites.
    """

    params: Sequence[Tensor]
    sites: list[Site] = field(default_factory=list)
    values: dict[Key, Value] = field(default_factory=dict)
    direct: list[int] = field(default_factory=list)
    inner: set[Node] = field(default_factory=set)

    @property
    def is_proven(self) -> bool:
        """Whether the graph proves for each site whose its entries are."""
        return all(site.along is not None for site in self.sites)

    def by_rows(self) -> set[Key]:
        """The values whose uses must give rows, since products of the parameters below do not add up from theirs.

        Returns:
            What is made of parameters, and these, where sites use them as well.
        """
        made = {place for value in self.values.values() if value.edge is not None for place in value.places}
        return {key for key, value in self.values.items() if value.edge is not None or value.places[0] in made}

    def signature(self, samples: Samples) -> str:
        """What must stay the same for a check to hold in later steps.

        Args:
            samples: The graph.

        Returns:
            A short text: kinds of nodes, modes of norms, sizes of values.
        """
        kinds = ",".join(f"{type(node).__name__}{_mode(node)}" for node in samples.nodes)
        sizes = [(tuple(use.shape for _, use in site.uses), site.along is None) for site in self.sites]
        return f"{zlib.crc32(f'{kinds};{sizes};{samples.groups is None}'.encode()):08x}"


def _mode(node: Any) -> str:
    return str(saved(node, "training")) if has_saved(node, "training") else ""


class SampleReader(Reader):
    """Reads sites off a graph.

    Args:
        samples: The graph.
        params: The parameters whose gradients are wanted.
    """

    def __init__(self, samples: Samples, params: Sequence[Tensor]) -> None:
        super().__init__([samples.edge], samples.nodes, params)
        self.samples = samples
        self._inside: dict[Key, list[tuple[Node | int, tuple[Node, int]]]] = {}
        self._values: dict[Key, Value] = {}

    def plan(self) -> Plan:
        """Find the sites.

        Returns:
            The plan.

        Raises:
            Refused: Samples cannot be told apart by sites, whatever the model.
        """
        if any(type(node).__name__ == "CompiledFunctionBackward" for node in self.nodes):
            raise Refused("what torch.compile has compiled does not show its layers")
        found = [site for node in reversed(self.nodes) if (site := self._site(node)) is not None]
        # What makes one value of others, such as a product of two parameters, is no site of theirs.
        making = {
            step for site in found for key, _ in site.uses for step, _ in self._inside[key] if isinstance(step, Node)
        }
        found = [site for site in found if site.node not in making]
        users: dict[Node | int, set[tuple[Node, int]]] = {}
        for site in found:
            for key, _ in site.uses:
                for step, user in self._inside[key]:
                    users.setdefault(step, set()).add(user)
        wanted = {id(p) for p in self.shared if id(p) in self.uses}
        direct = {step for step in wanted if len(users.get(step, ())) < self.uses[step]}
        direct |= self._half_used(users)
        while True:  # a value that needs a pass per loss takes the other parameters that it is made of with it
            lost = {
                id(self.shared[place]) for value in self._values.values() for place in value.places
                if any(id(self.shared[other]) in direct for other in value.places)
            }  # fmt: skip
            if lost <= direct:
                break
            direct |= lost
        plan = Plan(self.shared)
        plan.direct = [place for place, p in enumerate(self.shared) if id(p) in direct]
        gone = set(plan.direct)
        plan.values = {key: value for key, value in self._values.items() if not gone & set(value.places)}
        for site in found:
            site.uses = [(key, use) for key, use in site.uses if key in plan.values]
        plan.sites = [site for site in found if site.uses]
        plan.inner = {step for step in users if isinstance(step, Node)}
        self._mark_lowest(plan)
        return plan

    def _half_used(self, users: dict[Node | int, set[tuple[Node, int]]]) -> set[int]:
        """Leaves below a node that something else uses, too."""
        found: set[int] = set()
        for step, by in users.items():
            if isinstance(step, Node) and len(by) < self.uses[step]:
                for steps in self._inside.values():
                    if any(inner == step for inner, _ in steps):
                        found |= {inner for inner, _ in steps if isinstance(inner, int)}
        return found

    def _mark_lowest(self, plan: Plan) -> None:
        sites = {site.node for site in plan.sites}
        above: set[Node] = set()
        for node, below in self.nodes.items():
            if any(child in sites or child in above for child, _ in below if child is not None):
                above.add(node)
        for site in plan.sites:
            site.is_lowest = site.node not in above

    def _site(self, node: Node) -> Site | None:
        handler = _HANDLERS.get(type(node).__name__)
        if handler is None:
            return None
        uses: list[tuple[Key, Use]] = []
        along = self.samples.along(node, 0)
        for slot, (child, nr) in enumerate(self.nodes[node]):
            if child is None or not self._is_value(node, child, nr, along):
                continue
            value = self._value(node, slot, child, nr, type(node).__name__)
            if value is None:
                continue
            key, shape, flipped = value
            use = self._read(handler, node, slot, shape, flipped)
            if use is not None and (along is None or along.axis in use.axes):
                use.axis = 0 if along is None else along.axis
                uses.append((key, use))
        if not uses:
            return None
        if metadata(node)[0].dtype == torch.float16:
            raise Refused(f"{type(node).__name__} is in float16, which cannot be scaled exactly: use bfloat16")
        if is_hooked(node):
            raise Refused(f"a hook is registered at {type(node).__name__}")
        return Site(node, uses, along)

    def _read(self, handler: Handler, node: Node, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
        try:
            return handler(node, slot, shape, flipped)
        # Saved tensors are no stable part of torch, may have been changed in place, or may be freed already.
        except AttributeError:
            return None

    def _is_value(self, node: Node, child: Node, nr: int, along: Along | None) -> bool:
        """Whether an input is made of parameters alone."""
        if child in self._leaves or self._is_derived(child):
            return True
        # Whose the output is, is known, and the input belongs to nobody: what carries samples comes in above.
        return along is not None and self.samples.is_mixed(child, nr) and self._is_apart(node, child)

    def _is_apart(self, node: Node, child: Node) -> bool:
        """Whether a few operations make something of parameters alone, and no layer is among them."""
        inside, waiting = {child}, [child]
        while waiting:
            below = [c for c, _ in self.nodes[waiting.pop()] if c is not None and c not in inside]
            waiting += below
            inside.update(below)
            if len(inside) > _MOST_MADE_OF:
                return False
        own = [c for c in inside if c not in self._leaves]
        if any(type(c).__name__ in _LAYERS for c in own):
            return False
        users = Counter(c for other in (*own, node) for c, _ in self.nodes[other] if c is not None)
        return all(users[c] == self.uses[c] for c in own)

    def _is_derived(self, child: Node) -> bool:
        waiting = [child]
        while waiting:
            node = waiting.pop()
            if type(node).__name__ not in _DERIVING:
                return False
            waiting += [below for below, _ in self.nodes[node] if below is not None]
        return True

    def _value(
        self, node: Node, slot: int, child: Node, nr: int, kind: str
    ) -> tuple[Key, tuple[int, ...], bool] | None:
        """What an input is: its key, its shape, and whether it is a transposed matrix."""
        way = self._way(node, slot, flips=kind in ("AddmmBackward0", "MmBackward0"))
        if way is not None:
            leaf = self.shared[way.place]
            self._values[id(leaf)] = Value((way.place,), None)
            self._inside.setdefault(id(leaf), []).extend(way.steps)
            return id(leaf), tuple(leaf.shape), way.flipped
        if child in self._leaves:  # frozen, another optimizer's, or with hooks
            return None
        steps, leaves = self._region(node, slot)
        places = [self.places.get(id(leaf)) for leaf in leaves]
        if not places or any(place is None for place in places) or not all(map(_is_free, leaves)):
            return None
        key = (child, nr)
        self._values[key] = Value(tuple(place for place in places if place is not None), GradientEdge(child, nr))
        self._inside.setdefault(key, []).extend(steps)
        return key, tuple(metadata(child)[nr].shape), False

    def _region(self, node: Node, slot: int) -> tuple[list[tuple[Node | int, tuple[Node, int]]], list[Tensor]]:
        """All that lies below an input."""
        steps: list[tuple[Node | int, tuple[Node, int]]] = []
        leaves: dict[int, Tensor] = {}
        waiting, seen = [(node, slot)], set()
        while waiting:
            above, k = waiting.pop()
            child, _ = self.nodes[above][k]
            if child is None:
                continue
            leaf = self._leaves.get(child)
            steps.append((child if leaf is None else id(leaf), (above, k)))
            if leaf is not None:
                leaves[id(leaf)] = leaf
            elif child not in seen:
                seen.add(child)
                waiting += [(child, j) for j in range(len(self.nodes[child]))]
        return steps, list(leaves.values())


def _is_free(leaf: Tensor) -> bool:
    """Whether nobody looks at the gradient of a parameter."""
    return is_simple(leaf) and not has_tensor_hooks(leaf) and not hooks_after(leaf)


# ------------------------------------------------------------------------------------------- what nodes use

Handler = Callable[[Any, int, tuple[int, ...], bool], "Use | None"]


def _tensor(node: Any, name: str) -> Tensor:
    """A tensor that a node has saved.

    Raises:
        Refused: Reading it would run code, such as a second forward pass.
    """
    if unpack_hook(raw_saved(node, name)) is not None:
        raise Refused(
            f"{type(node).__name__} has its saved tensors packed, as under activation checkpointing, and they can be "
            "unpacked once"
        )
    found: Tensor = saved(node, name)
    return found.detach()


def _output(node: Any) -> tuple[int, ...]:
    return tuple(metadata(node)[0].shape)


def _linear(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    affine = type(node).__name__ == "AddmmBackward0"
    if affine and slot == 0:
        rank = len(_output(node))
        return Summed(shape, (*(1,) * (rank - len(shape)), *shape), (0,)) if saved(node, "beta") == 1 else None
    if slot != (2 if affine else 1) or (affine and saved(node, "alpha") != 1):
        return None
    return Linear(_tensor(node, "mat1" if affine else "self"), shape, flipped)


def _convolution(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    if slot == 2:
        rank = len(_output(node))
        return Summed(shape, (1, *shape, *(1,) * (rank - 2)), (0,))
    if slot != 1:
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = tuple(list(v) if isinstance(v := saved(node, name), (tuple, list)) else v for name in names)
    return Convolution(_tensor(node, "input"), _tensor(node, "weight"), options)


def _layer_norm(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    rank = len(_output(node))
    aligned = (*(1,) * (rank - len(shape)), *shape)
    if slot == 2:
        return Summed(shape, aligned, range(rank))
    if slot != 1:
        return None
    x, mean, scale = _tensor(node, "input"), _tensor(node, "result1"), _tensor(node, "result2")
    return Summed(shape, aligned, range(rank), lambda d: d * ((x - mean) * scale))


def _group_norm(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    rank = len(_output(node))
    aligned = (1, *shape, *(1,) * (rank - 2))
    if slot == 2:
        return Summed(shape, aligned, (0,))
    if slot != 1:
        return None
    x, mean, scale = _tensor(node, "input"), _tensor(node, "result1"), _tensor(node, "result2")
    n, groups = x.shape[0], saved(node, "group")

    def normalized(d: Tensor) -> Tensor:
        centred = (x.reshape(n, groups, -1) - mean.view(n, groups, 1)) * scale.view(n, groups, 1)
        return d * centred.view(x.shape)

    return Summed(shape, aligned, (0,), normalized)


def _batch_norm(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    rank = len(_output(node))
    aligned = (1, *shape, *(1,) * (rank - 2))
    if slot == 2:
        return Summed(shape, aligned, (0,))
    if slot != 1:
        return None
    x = _tensor(node, "input")
    if saved(node, "training"):  # the inputs of a layer may depend on other samples
        mean, scale = _tensor(node, "result1"), _tensor(node, "result2")
    else:
        mean, scale = _tensor(node, "running_mean"), (_tensor(node, "running_var") + saved(node, "eps")).rsqrt()
    centre, scale = mean.view(aligned), scale.view(aligned)
    return Summed(shape, aligned, (0,), lambda d: d * ((x - centre) * scale))


def _embedding(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    indices, count = _tensor(node, "indices"), saved(node, "weight_sym_argsize_0")
    if slot != 0 or count != shape[0] or not indices.numel():
        return None
    scales = scales_of(node, indices.reshape(-1).long(), count)
    scales = None if scales is None else scales.reshape(indices.shape)
    return Embedding(indices.long(), shape, scales, bool(saved(node, "sparse")))


def _broadcast(node: Any, shape: tuple[int, ...], factor: Callable[[Tensor], Tensor] | None = None) -> Use | None:
    rank = len(_output(node))
    return Summed(shape, (*(1,) * (rank - len(shape)), *shape), range(rank), factor)


def _added(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    alpha = saved(node, "alpha") if slot else 1
    alpha = -alpha if type(node).__name__ == "SubBackward0" and slot else alpha
    return _broadcast(node, shape, None if alpha == 1 else lambda d: d * alpha)


def _multiplied(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    other = _tensor(node, "self" if slot else "other")
    return _broadcast(node, shape, lambda d: d * other)


def _divided(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    other = _tensor(node, "other")
    if slot == 0:
        return _broadcast(node, shape, lambda d: d / other)
    top = _tensor(node, "self")
    return _broadcast(node, shape, lambda d: -d * (top / other) / other)


def _expanded(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    return _broadcast(node, shape)


def _prelu(node: Any, slot: int, shape: tuple[int, ...], flipped: bool) -> Use | None:
    if slot != 1:
        return None
    x = _tensor(node, "self")
    return _broadcast(node, shape, lambda d: torch.where(x > 0, 0, x * d))


_HANDLERS: dict[str, Handler] = {
    "AddBackward0": _added,
    "AddmmBackward0": _linear,
    "ConvolutionBackward0": _convolution,
    "DivBackward0": _divided,
    "EmbeddingBackward0": _embedding,
    "ExpandBackward0": _expanded,
    "MmBackward0": _linear,
    "MulBackward0": _multiplied,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "PreluKernelBackward0": _prelu,
    "SubBackward0": _added,
}


def mixing_node(samples: Samples, inner: Iterable[Node], surely: bool = True) -> str | None:
    """The first node from the losses down that brings samples together.

    Args:
        samples: The graph.
        inner: Nodes between parameters and sites.
        surely: By its structure; otherwise one of which nothing is known will do.

    Returns:
        Its name; None if the graph tells of none.
    """
    passed, found = set(inner), []
    for node in reversed(samples.nodes):
        if samples.along(node, 0) is None:
            continue
        for child, nr in samples.nodes[node]:
            if child is None or child in passed or type(child).__name__ in ("AccumulateGrad", *_DERIVING):
                continue
            if samples.is_mixed(child, nr) or not (surely or samples.along(child, nr)):
                found.append(node)
    return named_first(found)


def named_first(nodes: Sequence[Node]) -> str | None:
    """What to call the place where samples come together.

    Args:
        nodes: Nodes below which they are together, from the losses down.

    Returns:
        The name of the first that does more than to add or multiply what others have mixed; None if there are none.
    """
    found = [node for node in nodes if not acts_by_entry(type(node))] or nodes
    return type(found[0]).__name__ if found else None
