"""Inner products of weight gradients that are never formed.

The gradient of loss i in the weight of a linear layer is Dᵢᵀ A, with the layer's inputs A, (N, in), and the gradients
at its outputs, Dᵢ, (N, out). Inner products follow from K = A Aᵀ alone, ⟨Dᵢᵀ A, Dⱼᵀ A⟩ = ⟨Dᵢ, K Dⱼ⟩, and the weighted
sum of all rows is one product, (Σ wᵢ Dᵢ)ᵀ A. Where N is small, this costs less than one weight gradient a loss. The
gradient of an embedding has no more rows than there were indices, and is kept as those. Such parameters are *ghosts*;
all others are *direct*: autograd gives their rows.

Everything is read off the graph of the losses. A parameter is a ghost only if all that lies between it and the outputs
of its one layer is known; whatever is not known makes it direct. One thing cannot be seen: a hook that the user has put
on a ``weight.t()`` of his own, in a layer whose inputs need no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from gradsurgery import gram as gram_module
from gradsurgery import graph as graph_module
from gradsurgery import rows as rows_module
from gradsurgery.gram import Row, Table

# Widths of float32 products whose sums are then added up in float64, and entries of all tasks that are handled at once.
_CHUNK = 8192
_BUCKET_CPU, _BUCKET_GPU = 2**18, 2**24

# Rounding of ⟨D, K D⟩ in float32 relative to Σₙ ‖aₙ‖² ‖dₙ‖², what is allowed of it relative to the squared norm, and
# the squared norms that float32 can hold.
_ROUNDING, _ALLOWED = 6e-8, 5e-7
_SAFE_SQUARES = (1e-24, 1e30)

# What reading or writing an entry costs, and what a handful of small operations cost, in multiplications.
_TRAFFIC, _CALLS = 16.0, 1e6


# Where nodes keep the tensor that was their input. If it has hooks, somebody looks at its gradient.
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

#: Seconds that a function takes on a device.
Clock = Callable[[Callable[[], object], torch.device], float]


class _Linear(NamedTuple):
    """y = A Wᵀ + b, or y = A W + b. Of each loss, the gradients D at the outputs are kept, (N, out).

    Attributes:
        edge: Where autograd hands over the gradients at the outputs.
        params: The weight, and the bias if it is a ghost too.
        places: Their places among the shared parameters.
        inputs: A, (N, in).
        version: What A counted of changes in place when the graph was read.
        flipped: The weight is (out, in).
    """

    edge: GradientEdge
    params: tuple[Tensor, ...]
    places: tuple[int, ...]
    inputs: Tensor
    version: int
    flipped: bool

    def saves(self, m: int) -> bool:
        n, width = self.inputs.shape
        out = self.params[0].numel() // width
        ghost = n * n * width + m * n * n * out + n * width * out + (m + 3 * _TRAFFIC) * m * n * out + _CALLS
        return ghost < m * n * width * out + (m + 4 * _TRAFFIC) * m * width * out

    def keep(self, gradient: Tensor) -> Tensor:
        return gradient

    def products(self, rows: Sequence[Tensor], least: torch.dtype) -> tuple[Tensor, Tensor]:
        dtype = _widest(least, self.inputs, *rows)
        inputs = self.inputs.to(dtype)
        kernel = _product(inputs, inputs)
        if len(self.params) > 1:  # the bias is the weight of one more input, always 1
            kernel += 1
        lengths = kernel.diagonal().clone()
        # K = M + Mᵀ with a block of zeros in M: a quarter of the work less.
        (n, out), m = rows[0].shape, len(rows)
        half = n // 2
        kernel[:half, :half] /= 2
        kernel[half:, half:] /= 2
        kernel = kernel.to(dtype)
        gram = kernel.new_zeros(m, m, dtype=torch.float64)
        squares = kernel.new_zeros(n, m, dtype=torch.float64)
        step = max(1, (_BUCKET_CPU if kernel.device.type == "cpu" else _BUCKET_GPU) // (m * n))
        for start in range(0, out, step):
            part = torch.cat([row[:, start : start + step] for row in rows], dim=1).to(dtype)
            moved = torch.empty_like(part)
            torch.mm(kernel[:half, :half], part[:half], out=moved[:half])
            torch.mm(kernel[half:], part, out=moved[half:])
            part, moved = part.unflatten(1, (m, -1)), moved.unflatten(1, (m, -1))
            gram += torch.bmm(part, moved.transpose(1, 2)).sum(0, dtype=torch.float64)
            squares += torch.linalg.vector_norm(part, dim=2).double().square()
        return gram + gram.T, lengths @ squares

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        self.check()
        mixed = _mixed(rows, weights, _widest(torch.float32, self.inputs, *rows))
        inputs = self.inputs.to(mixed.dtype)
        weight = mixed.T @ inputs if self.flipped else inputs.T @ mixed
        return [_as(g, p) for g, p in zip((weight, mixed.sum(0)), self.params, strict=False)]

    def beyond_rows(self, rows: Sequence[Tensor], clock: Clock) -> float:
        flat = [self.keep(row.reshape(len(self.inputs), -1)) for row in rows]
        one = clock(lambda: self.combine(flat[:1], [1.0]), self.inputs.device)
        ours = clock(lambda: self.products(flat, torch.float32), self.inputs.device)
        return ours + clock(lambda: self.combine(flat, [0.5] * len(flat)), self.inputs.device) - len(flat) * one

    def check(self) -> None:
        # Autograd does the same before it forms a gradient.
        if self.inputs._version != self.version:
            raise RuntimeError(
                "The inputs of a linear layer were changed in place after the losses were computed, so that its "
                "gradient is lost. Change a clone of them."
            )


class _Embedding(NamedTuple):
    """Rows of a table. Of each loss, the gradients of those that were looked up are kept, (N, width).

    Attributes:
        edge: Where autograd hands over the gradients at the outputs.
        params: The table.
        places: Its place among the shared parameters.
        groups: For each index, where it is among those without repetition, (N,).
        indices: The indices without repetition, filled up with zeros, (N,).
        scales: What the gradient of each of these is multiplied by, (N, 1), or None.
    """

    edge: GradientEdge
    params: tuple[Tensor, ...]
    places: tuple[int, ...]
    groups: Tensor
    indices: Tensor
    scales: Tensor | None

    def saves(self, m: int) -> bool:
        return 2 * len(self.indices) < len(self.params[0])

    def keep(self, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(len(self.groups), -1)
        flat = flat.to(_widest(torch.float32, flat))
        found = flat.new_zeros(flat.shape).index_add_(0, self.groups, flat)
        return found if self.scales is None else found * self.scales

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        mixed = _mixed(rows, weights, rows[0].dtype)
        table = mixed.new_zeros(self.params[0].shape)
        return [_as(table.index_add_(0, self.indices, mixed), self.params[0])]

    def beyond_rows(self, rows: Sequence[Tensor], clock: Clock) -> float:
        kept = self.keep(rows[0])
        found: list[Row] = [[kept] for _ in rows]
        one = clock(lambda: self.combine([kept], [1.0]), kept.device)
        ours = len(rows) * clock(lambda: self.keep(rows[0]), kept.device)
        ours += clock(lambda: gram_module.gram(found), kept.device)
        return ours + clock(lambda: self.combine([kept] * len(rows), [0.5] * len(rows)), kept.device) - len(rows) * one


_Layer = _Linear | _Embedding


class Found(Table):
    """The rows of m losses, those of ghosts as what they follow from.

    Args:
        plan: What makes them.

    Attributes:
        rows: For each loss what is kept of it by each layer, and its gradients in the direct parameters.
        others: Gradients of parameters that are not shared, m lists.
        batched: The losses went through the trunk side by side.
    """

    engine = "ghosts"

    def __init__(self, plan: Plan) -> None:
        super().__init__([])
        self.rows: list[Row] = []
        self._plan = plan
        self.others: list[Row] = []
        self.batched = False

    def _keep(self, gradients: Sequence[Tensor | None]) -> None:
        layers = self._plan.layers
        kept = [None if g is None else layer.keep(g) for layer, g in zip(layers, gradients, strict=False)]
        self.rows.append([*kept, *gradients[len(layers) :]])

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
        with _exactly(kept.device):
            return layer.combine([kept], [1.0])[layer.places.index(place)]

    def products(self) -> Tensor:
        """Multiply in single precision, without waiting for the device.

        Returns:
            (m, m + 1), float64: the Gram matrix, and in the last column the size of what was added up in its diagonal.
            To be handed to :meth:`repaired` on the host.
        """
        return self._products(torch.float32 if _is_single_exact() else torch.float64)

    def gram(self) -> np.ndarray:
        """Inner products of the rows.

        Returns:
            J Jᵀ, (m, m), float64, wrong by at most 1e-6 of the product of two norms.
        """
        return self.repaired(self.products().cpu().numpy())

    def repaired(self, found: np.ndarray) -> np.ndarray:
        """Replace products whose terms cancelled too well for float32, or left its range.

        Args:
            found: What :meth:`products` gave, on the host, (m, m + 1).

        Returns:
            J Jᵀ, (m, m), float64.
        """
        gram, sizes = found[:, :-1], found[:, -1]
        if self.noise < _ROUNDING:  # they are in double precision
            return gram
        low, high = _SAFE_SQUARES
        squares = gram.diagonal()
        doubtful = ~((squares >= low) & (squares <= high) & (_ROUNDING * sizes <= _ALLOWED * squares))
        # A row of exact zeros is common (an inactive hinge) and needs no second look.
        if any(bool(g.any()) for i in np.flatnonzero(doubtful) for g in self.rows[i] if g is not None):
            return self._products(torch.float64).cpu().numpy()[:, :-1]
        return gram

    def triangle(self) -> np.ndarray:
        """A square root of the Gram matrix, for which all rows are formed; see :func:`gradsurgery.gram.triangle`.

        Returns:
            (m, k), k ≤ m.
        """
        return gram_module.triangle(
            [[self.row(i, place) for place in range(len(self._plan.shared))] for i in range(len(self))]
        )

    @property
    def noise(self) -> float:
        """How far products may be off, relative to the lengths of the two rows."""
        double = all(p.dtype == torch.float64 for p in self._plan.shared)
        return float(np.finfo(np.float64).eps) if double else _ALLOWED

    def part(self, keep: Sequence[int]) -> Found:
        """Some of the rows.

        Args:
            keep: Their places.

        Returns:
            The same rows, not copied.
        """
        part = Found(self._plan)
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
                with _exactly(present[0][0].device):
                    combined = self._plan.layers[k].combine([g for g, _ in present], [w for _, w in present])
                for place, g in zip(places, combined, strict=True):
                    gradients[place] = g
        return gradients

    @torch.no_grad()
    def _products(self, least: torch.dtype) -> Tensor:
        layers = self._plan.layers
        linear = [k for k, layer in enumerate(layers) if isinstance(layer, _Linear)]
        gram = gram_module.gram_in([[g for k, g in enumerate(row) if k not in linear] for row in self.rows], least)
        sizes = torch.zeros_like(gram.diagonal())
        for k in linear:
            layer = layers[k]
            assert isinstance(layer, _Linear)
            present = [i for i, row in enumerate(self.rows) if row[k] is not None]
            kept = [g for row in self.rows if (g := row[k]) is not None]
            if not kept:
                continue
            layer.check()
            with _exactly(kept[0].device):
                part, size = layer.products(kept, least)
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
    """

    def __init__(self, shared: Sequence[Tensor], layers: Sequence[_Layer], reader: _Reader) -> None:
        self.shared = tuple(shared)
        self.layers = tuple(layers)
        ghosts = {place for layer in layers for place in layer.places}
        self.direct = [place for place in range(len(shared)) if place not in ghosts]
        self.places = [*(layer.places for layer in layers), *((place,) for place in self.direct)]
        column = {place: k for k, places in enumerate(self.places) for place in places}
        self.columns = [column[place] for place in range(len(shared))]
        self._reader = reader

    @cached_property
    def trunk(self) -> GradientEdge | None:
        """The first place in the graph that all losses go through on their way to the shared parameters, or None.

        Returns:
            Its edge.
        """
        return self._reader.trunk()

    @property
    def is_mostly_ghosts(self) -> bool:
        """Whether hardly anything of the rows is formed, so that several losses may pass side by side.

        Returns:
            True if one entry in twenty at most belongs to a direct parameter.
        """
        total = sum(p.numel() for p in self.shared)
        return 20 * sum(self.shared[place].numel() for place in self.direct) <= total

    @cached_property
    def is_watched(self) -> bool:
        """Whether hooks look at gradients on the way, as far as the graph tells.

        With several losses side by side they would get one tensor for all, and nothing is left of it after the pass.

        Returns:
            True if hooks were seen.
        """
        return self._reader.is_watched()

    @property
    def ghosts(self) -> list[int]:
        """Places of the ghosts among the shared parameters.

        Returns:
            Indices into `shared`.
        """
        return [place for layer in self.layers for place in layer.places]

    def differentiate(
        self,
        roots: Sequence[Tensor | GradientEdge],
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
                loss goes alone, to free the graph.

        Returns:
            The rows.

        Raises:
            RuntimeError: What autograd raises, with the cure where it is known.
        """
        found = Found(self)
        inner: list[Any] = [*(layer.edge for layer in self.layers), *(self.shared[place] for place in self.direct)]
        m, start = len(roots), 0
        # A node that has more to do hands over its gradient before the hooks of its output have seen it, and calls its
        # own hooks afterwards.
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for k, layer in enumerate(self.layers):
                handle = layer.edge.node.register_prehook(partial(_see, seen, k))
                stack.callback(handle.remove)
            if batched and self.trunk is not None:
                start = m if retain_graph else m - 1
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
                found._keep([seen.get(k, g) for k, g in enumerate(grads[: len(inner)])])
                found.others.append(grads[len(inner) :])
        return found

    def _side_by_side(
        self,
        roots: Sequence[Tensor | GradientEdge],
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
            version, untouched = top._version, False

            def compare(gradients: Sequence[Tensor | None]) -> None:
                nonlocal untouched
                untouched = gradients[0] is top and top._version == version

            seen.clear()
            handle = trunk.node.register_prehook(compare)
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
            found._keep([None if g is None or j is None else g[j] for g in merged])
        found.batched = True
        return True


def plan(
    roots: Sequence[Tensor | GradientEdge],
    shared: Sequence[Tensor],
    nodes: Sequence[Node] | None = None,
    force: bool = False,
) -> Plan | None:
    """Read off the graph of the losses which parameters need no gradient of a single loss.

    Args:
        roots: Where differentiation starts, (m,).
        shared: The parameters whose rows are wanted; leaves.
        nodes: All nodes of the graph, each after those below it, if they are known already.
        force: Make a ghost of all that can be one, even where rows are cheaper.

    Returns:
        What to do, or None if all parameters are direct.
    """
    if nodes is None:
        starts = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
        nodes = graph_module.inputs_first([start for start in starts if start is not None])
    if not nodes:
        return None
    reader = _Reader(roots, nodes, shared)
    layers = [layer for node in nodes if (layer := reader.layer(node)) and (force or layer.saves(len(roots)))]
    return Plan(shared, layers, reader) if layers else None


class _Reader:
    """Knows who uses what in a graph.

    Args:
        roots: Where differentiation starts.
        nodes: All nodes, each after those below it.
        shared: The parameters that are looked for.
    """

    def __init__(self, roots: Sequence[Tensor | GradientEdge], nodes: Sequence[Node], shared: Sequence[Tensor]) -> None:
        self.nodes = nodes
        self.places = {p: place for place, p in enumerate(shared)}
        self.starts: list[tuple[Node, int]] = []
        self.uses: dict[Node | Tensor, int] = {}  # leaves by themselves: one may have several nodes
        for root in roots:
            node = root.grad_fn if isinstance(root, Tensor) else root.node
            if node is not None:
                self.starts.append((node, root.output_nr))
                self._count(node)
            elif isinstance(root, Tensor):  # a loss that is a parameter itself
                self.uses[root] = 2
        for node in nodes:
            for child, _ in node.next_functions:
                if child is not None:
                    self._count(child)

    def _count(self, node: Node) -> None:
        key = node.variable if _kind(node) == "AccumulateGrad" else node  # type: ignore[attr-defined]
        self.uses[key] = self.uses.get(key, 0) + 1

    def is_watched(self) -> bool:
        for node in self.nodes:
            kind = _kind(node)
            if kind == "BackwardHookFunctionBackward":
                return True
            try:
                inputs = _saved(node, _INPUTS[kind])
            except (KeyError, AttributeError, RuntimeError):
                continue
            if isinstance(inputs, Tensor) and (_has_tensor_hooks(inputs) or _retains(inputs)):
                return True
        return False

    def layer(self, node: Node) -> _Layer | None:
        try:
            if _kind(node) in ("AddmmBackward0", "MmBackward0"):
                return self._linear(node)
            if _kind(node) == "EmbeddingBackward0":
                return self._embedding(node)
        # Saved tensors are no stable part of torch, may have been changed in place, or may be freed already.
        except (AttributeError, RuntimeError):
            pass
        return None

    def _linear(self, node: Any) -> _Linear | None:
        affine = _kind(node) == "AddmmBackward0"
        found = self._parameter(node, 2 if affine else 1, flips=True)
        if found is None or (affine and node._saved_alpha != 1):
            return None
        weight, place, flipped = found
        inputs = _saved(node, "mat1" if affine else "self")
        factor = _saved(node, "mat2")
        if not _is_simple(inputs) or inputs.dim() != 2 or _is_hooked(node) or _has_tensor_hooks(factor):
            return None
        inputs = inputs.detach()
        shape = tuple(node._input_metadata[0].shape)
        out, width = weight.shape if flipped else weight.shape[::-1]
        if not inputs.numel() or shape != (len(inputs), out) or inputs.shape[1] != width:
            return None
        params: tuple[Tensor, ...] = (weight,)
        places: tuple[int, ...] = (place,)
        bias = self._parameter(node, 0) if affine and node._saved_beta == 1 else None
        if bias is not None and bias[0].shape == (out,):
            params, places = (weight, bias[0]), (place, bias[1])
        return _Linear(GradientEdge(node, 0), params, places, inputs, inputs._version, flipped)

    def _embedding(self, node: Any) -> _Embedding | None:
        found = self._parameter(node, 0)
        if found is None or node._saved_sparse or _is_hooked(node):
            return None
        table, place, _ = found
        indices = _saved(node, "indices").detach().reshape(-1).long()
        count, width = table.shape
        if not len(indices) or node._saved_weight_sym_argsize_0 != count or node._input_metadata[0].shape[-1] != width:
            return None
        ordered, order = indices.sort()
        group = torch.zeros_like(ordered)
        group[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        groups = torch.empty_like(group).scatter_(0, order, group)
        unique = torch.zeros_like(ordered).scatter_(0, group, ordered)
        scales: Tensor | None = None
        if node._saved_scale_grad_by_freq:
            times = torch.zeros_like(table[:1, :1], dtype=torch.float32).new_zeros(len(unique))
            scales = times.index_add_(0, groups, torch.ones_like(times)).clamp(min=1).reciprocal()[:, None]
        if 0 <= node._saved_padding_idx < count:
            ones = torch.ones(len(unique), 1, device=unique.device) if scales is None else scales
            scales = ones * (unique != node._saved_padding_idx)[:, None]
        return _Embedding(GradientEdge(node, 0), (table,), (place,), groups, unique, scales)

    def _parameter(self, node: Node, slot: int, flips: bool = False) -> tuple[Tensor, int, bool] | None:
        """A shared parameter that nothing but this input of a node uses, its place, and whether it is transposed."""
        child, flipped = node.next_functions[slot][0], False
        while child is not None:
            kind = _kind(child)
            if kind == "AccumulateGrad":
                leaf: Tensor = child.variable  # type: ignore[attr-defined]
                alone = leaf in self.places and self.uses[leaf] == 1 and _is_simple(leaf)
                unobserved = not _has_tensor_hooks(leaf) and not leaf._post_accumulate_grad_hooks
                return (leaf, self.places[leaf], flipped) if alone and unobserved else None
            if self.uses[child] > 1 or _is_hooked(child):
                return None
            if kind == "TBackward0" and flips:
                flipped = not flipped
            elif kind != "ToCopyBackward0":  # such as autocast makes
                return None
            child = child.next_functions[0][0]
        return None

    def trunk(self) -> GradientEdge | None:
        # The first place that all ways from the losses to the shared parameters have in common.
        leading: set[Node] = set()
        for node in self.nodes:
            if _kind(node) == "AccumulateGrad":
                if node.variable in self.places:  # type: ignore[attr-defined]
                    leading.add(node)
            elif any(child in leading for child, _ in node.next_functions):
                leading.add(node)
        order = [node for node in reversed(self.nodes) if node in leading]  # from the losses down
        at = {node: k for k, node in enumerate(order)}
        outputs: dict[Node, set[int]] = {}
        for node, output in self.starts:
            outputs.setdefault(node, set()).add(output)
        farthest = max((at[node] for node in outputs if node in at), default=len(order))
        for k, node in enumerate(order):
            if _kind(node) == "AccumulateGrad":  # nothing below is on the way to this one
                return None
            if farthest == k and outputs[node] == {0}:
                return GradientEdge(node, 0)
            for child, output in node.next_functions:
                if child in leading:
                    farthest = max(farthest, at[child])
                    outputs.setdefault(child, set()).add(output)
        return None


def _kind(node: Node) -> str:
    return type(node).__name__


def _saved(node: Any, name: str) -> Any:
    """A tensor that a node has saved; an AttributeError if reading it would run code, such as a second forward pass."""
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        raise AttributeError(name)
    return getattr(node, f"_saved_{name}")


def _is_simple(tensor: Any) -> bool:
    """Whether this is a dense tensor of real numbers, and nothing beyond."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_floating_point()


def _has_tensor_hooks(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(
        tensor._backward_hooks or (tensor._base is not None and tensor._base._backward_hooks)
    )


def _retains(tensor: Tensor) -> bool:
    """Whether a tensor between the leaves and the losses was asked to keep its gradient."""
    return tensor.retains_grad or (tensor._base is not None and tensor._base.retains_grad)


def _is_hooked(node: Node) -> bool:
    """Whether functions were registered at a node. They are kept in one place, to which one more gives access."""
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks is None or len(hooks) > 0:
            return True
    return False


def _is_single_exact() -> bool:
    """Whether products of float32 matrices are made in float32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for one backend alone
        return False


def _see(seen: dict[int, Tensor], k: int, gradients: Sequence[Tensor | None]) -> None:
    """Called before a node: notes what it is given."""
    if gradients[0] is not None:
        seen[k] = gradients[0]


def _exactly(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)  # it would multiply in half precision


def _widest(least: torch.dtype, *tensors: Tensor) -> torch.dtype:
    for tensor in tensors:
        least = torch.promote_types(least, tensor.dtype)
    return least


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ in float64, from products over chunks of the columns."""
    width = a.shape[1]
    whole = width - width % _CHUNK
    total = a.new_zeros(len(a), len(b), dtype=torch.float64)
    if whole:
        left, right = (x[:, :whole].unflatten(1, (-1, _CHUNK)).transpose(0, 1) for x in (a, b))
        total += torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    if whole < width:
        total += a[:, whole:] @ b[:, whole:].T
    return total


def _mixed(rows: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    total = rows[0].to(dtype) * weights[0]
    for row, w in zip(rows[1:], weights[1:], strict=True):
        total.add_(row, alpha=w)
    return total


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient with the dtype, device and strides of its parameter."""
    same = gradient.dtype == like.dtype and gradient.device == like.device and gradient.stride() == like.stride()
    return gradient if same else torch.empty_like(like, requires_grad=False).copy_(gradient)
