"""Losses → rows, and the way back into ``.grad``. The only module that calls autograd.

A *row* is the gradient of one loss. It is kept as autograd returns it: one tensor per parameter, never one flat copy.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurgery.gradients.exact import exactly
from gradsurgery.gradients.gram import Row as Row
from gradsurgery.graph import Root, Start
from gradsurgery.graph.torch_private import engine_backward, foreach_add_, foreach_mul, foreach_norm

#: Adds up the rows of one parameter with weights.
Add = Callable[[list["Tensor | None"], list[float], Tensor], "Tensor | None"]


class HasGroups(Protocol):
    """An optimizer, as far as it matters where its parameters are."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


#: Entries up to which a parameter is small: calls then cost more than what they do.
SMALL = 2**14
# What numpy calls the dtypes of tensors on the host.
_IN_NUMPY = {(torch.float32, "cpu"): np.float32, (torch.float64, "cpu"): np.float64}
# The largest number of the narrowest dtype.
LEAST_RANGE = torch.finfo(torch.float16).max


def gradient(root: Root, params: Sequence[Tensor], seed: Tensor, retain_graph: bool) -> Row:
    """Differentiate one loss.

    Args:
        root: Where the differentiation of the loss begins.
        params: What to differentiate with respect to.
        seed: Gradient of the objective with respect to the loss, a scalar: 1, or the loss scale.
        retain_graph: Keep the graph for another pass.

    Returns:
        The row.

    Raises:
        RuntimeError: What autograd raises, with the cure where it is known.
    """
    if not params:
        return []
    try:
        if isinstance(root, Start):
            return _gradient_below_joins(root, params, seed, retain_graph)
        return list(engine_backward((root,), (seed,), tuple(params), retain_graph, accumulate=False))
    except RuntimeError as error:
        raise _explained(error) from error


def _gradient_below_joins(root: Start, params: Sequence[Tensor], seed: Tensor, retain_graph: bool) -> Row:
    if root.together is not None:
        found = root.together.gradients(root.number, retain_graph)
    else:
        places: Sequence[Tensor | GradientEdge] = [root.loss]
        found = [seed]
        for stage in root.stages:
            reached = [(place, g) for place, g in zip(places, found, strict=True) if g is not None]
            if not reached:
                return [None] * len(params)
            found = stage.differentiate([p for p, _ in reached], [g for _, g in reached], retain_graph)
            places = stage.edges
    reached = [(edge, g) for edge, g in zip(root.stages[-1].edges, found, strict=True) if g is not None]
    if not reached:
        return [None] * len(params)
    edges, starts = zip(*reached, strict=True)
    return list(engine_backward(edges, starts, tuple(params), retain_graph, accumulate=False))


def _explained(error: RuntimeError) -> RuntimeError:
    text = str(error)
    if "backward through the graph a second time" in text:
        return RuntimeError(
            "The graph of the losses was already freed, by an earlier backward or because losses of two calls share "
            f"it. Compute the losses anew, or keep the graph with retain_graph=True. ({text})"
        )
    if "donated buffers" in text:
        return RuntimeError(
            "The model is compiled, and its compiled backward may run only once a forward. Set "
            "torch._functorch.config.donated_buffer = False before the first compilation; a warm compile cache needs "
            "torch._dynamo.reset() as well. If it came with batches of sizes that change, torch.compile(dynamic=False) "
            "does, too. Or pass each loss as a function without arguments, which costs one forward pass per loss. "
            f"({text})"
        )
    return error


@contextmanager
def emptied(params: Sequence[Tensor]) -> Iterator[None]:
    """Put ``.grad`` aside, and back at the end.

    Args:
        params: The parameters whose ``.grad`` is None inside.

    Yields:
        Nothing.
    """
    before = [p.grad for p in params]
    for p, g in zip(params, before, strict=True):
        if g is not None:
            p.grad = None
    try:
        yield
    finally:
        for p, g in zip(params, before, strict=True):
            if p.grad is not g:
                p.grad = g


def gradient_by_backward(root: Root, params: Sequence[Tensor], seed: Tensor, retain_graph: bool) -> Row:
    """Differentiate one loss by an ordinary backward pass, for graphs that hide parameters from autograd.grad.

    Args:
        root: The loss, or its edge in the graph.
        params: What to differentiate with respect to. Their ``.grad`` must be empty, and is empty afterwards.
        seed: Gradient of the objective with respect to the loss, a scalar.
        retain_graph: Keep the graph for another pass.

    Returns:
        The row.

    Raises:
        RuntimeError: What autograd raises, with the cure where it is known.
    """
    try:
        torch.autograd.backward(_whole(root), seed, retain_graph=retain_graph)
        return [p.grad for p in params]
    except RuntimeError as error:
        raise _explained(error) from error
    finally:
        for p in params:
            p.grad = None


def _whole(root: Root) -> Tensor | GradientEdge:
    """The loss itself, for passes that serve several losses or reach everything."""
    return root.loss if isinstance(root, Start) else root


def one_pass(
    roots: Sequence[Root],
    starts: Sequence[Tensor],
    params: Sequence[Tensor],
    retain_graph: bool,
    engine: str = "accumulate",
) -> Row:
    """Differentiate a weighted sum of the losses in one backward pass.

    Args:
        roots: Where differentiation starts, (m,).
        starts: Gradients of the sum with respect to the losses, m scalars.
        params: What to differentiate with respect to. Their ``.grad`` must be empty, but for "grad".
        retain_graph: Keep the graph for another pass.
        engine: "accumulate": autograd writes ``.grad``, as in a plain loop, so that hooks which wait for it run.
            "grad": it returns the gradients, and DistributedDataParallel does not notice. "backward": an ordinary pass
            through the whole graph.

    Returns:
        The gradients.

    Raises:
        RuntimeError: What autograd raises, with the cure where it is known.
    """
    if not params or not roots:
        return [None] * len(params)
    losses = tuple(map(_whole, roots))
    try:
        if engine == "backward":
            torch.autograd.backward(losses, starts, retain_graph=retain_graph)  # type: ignore[arg-type]
        else:
            found = engine_backward(losses, tuple(starts), tuple(params), retain_graph, engine == "accumulate")
            if engine == "grad":
                return list(found)
        return [p.grad for p in params]
    except RuntimeError as error:
        raise _explained(error) from error
    finally:
        if engine != "grad":
            for p in params:
                p.grad = None


class Joined:
    """Gradients on the host of small parameters that one loss alone reaches, one behind the other in one array.

    Args:
        flat: Their entries, loss by loss.
        places: The parameters that have a gradient.
        losses: The loss of each.
        sizes: The number of entries of each.
    """

    def __init__(self, flat: np.ndarray, places: Sequence[int], losses: Sequence[int], sizes: Sequence[int]) -> None:
        self._flat = flat
        self._places = places
        self._losses = losses
        self._sizes = sizes

    @classmethod
    def of(cls, params: Sequence[Tensor], terms: Sequence[Sequence[tuple[int, Tensor]]]) -> Joined | None:
        """Join gradients.

        Args:
            params: The parameters.
            terms: For each the losses that reach it, by number, and their gradients.

        Returns:
            None where there are none, several for one parameter, or some that have another form.
        """
        found, kinds = [], set()
        for j, (p, those) in enumerate(zip(params, terms, strict=True)):
            if not those:
                continue
            i, g = those[0]
            dtype = p.dtype
            joins = (
                len(those) == 1
                and g.dtype is dtype
                and (dtype, g.device.type) in _IN_NUMPY
                and (dtype, p.device.type) in _IN_NUMPY
                and g.layout is torch.strided
                and g.is_contiguous()
                and p.is_contiguous()
                and 0 < (size := g.numel()) <= SMALL
            )
            if not joins:
                return None
            found.append((i, j, g, size))
            kinds.add(dtype)
        if len(kinds) != 1:
            return None
        found.sort(key=operator.itemgetter(0))
        losses, places, tensors, sizes = zip(*found, strict=True)
        return cls(joined(tensors), places, losses, sizes)

    def peaks(self, m: int) -> np.ndarray:
        """The largest entry of each loss, which is not finite if any is not.

        Args:
            m: Number of losses.

        Returns:
            (m,), float64.
        """
        starts: dict[int, int] = {}
        start = 0
        for i, size in zip(self._losses, self._sizes, strict=True):
            starts.setdefault(i, start)
            start += size
        found = np.zeros(m)
        found[list(starts)] = np.maximum.reduceat(np.abs(self._flat), list(starts.values()))
        return found

    def scaled(self, factors: np.ndarray, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply them.

        Args:
            factors: What multiplies each loss, (m,).
            params: The parameters.

        Returns:
            For each a new tensor; None where there is none.
        """
        flat = self._flat
        if set(factors.tolist()) != {1.0}:
            by = factors[list(self._losses)]
            with np.errstate(over="ignore", invalid="ignore"):  # whoever asks looks at what comes of it
                flat = flat * np.repeat(by.astype(flat.dtype), self._sizes)
        found: list[Tensor | None] = [None] * len(params)
        for j, g in zip(self._places, apart(flat, [params[j] for j in self._places]), strict=True):
            found[j] = g
        return found


def joined(tensors: Sequence[Tensor]) -> np.ndarray:
    """Put small tensors of the host behind each other: for these numpy costs less per call.

    Args:
        tensors: Dense tensors of one dtype, without a graph.

    Returns:
        A new array, flat.
    """
    return np.concatenate([g.numpy().reshape(-1) for g in tensors])


def apart(flat: np.ndarray, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut an array into gradients none of which shares its memory with another.

    Args:
        flat: The array, (n,).
        like: Contiguous tensors of the same shapes, of n entries together.

    Returns:
        New tensors.
    """
    pieces, start = [], 0
    for p in like:
        stop = start + p.numel()
        pieces.append(torch.from_numpy(flat[start:stop].reshape(p.shape).copy()))
        start = stop
    return pieces


def scaled_alone(
    params: Sequence[Tensor], terms: Sequence[Sequence[tuple[int, Tensor]]], by: Sequence[float]
) -> list[Tensor | None]:
    """Multiply the gradients of small parameters that one loss alone reaches, in one call for all of a kind.

    Args:
        params: The parameters.
        terms: For each the losses that reach it, by number, and their gradients.
        by: What multiplies each loss, (m,).

    Returns:
        For each a new tensor; None where there are none or several, or where its form is another.
    """
    found: list[Tensor | None] = [None] * len(params)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for j, (p, those) in enumerate(zip(params, terms, strict=True)):
        if len(those) == 1 and _has_form_of(those[0][1], p):
            groups.setdefault((p.dtype, p.device), []).append(j)
    for places in groups.values():
        products = foreach_mul([terms[j][0][1] for j in places], [by[terms[j][0][0]] for j in places])
        for j, g in zip(places, products, strict=True):
            found[j] = g
    return found


def _has_form_of(g: Tensor, p: Tensor) -> bool:
    """Whether a gradient times a number is, in every respect, what a small parameter wants to have."""
    return (
        p.dtype in (torch.float32, torch.float64)
        and p.numel() <= SMALL
        and g.dtype == p.dtype
        and not g.is_sparse
        and g.stride() == p.stride()
        and g.device == p.device
    )


def largest_factor(params: Iterable[Tensor]) -> float:
    """What rows can be multiplied by while they are added up, in single precision or better.

    Args:
        params: The parameters.

    Returns:
        The largest number.
    """
    return min(map(_largest_wide, {p.dtype for p in params}), default=float("inf"))


@functools.cache
def _largest_wide(dtype: torch.dtype) -> float:
    return torch.finfo(torch.promote_types(dtype, torch.float32)).max


def may_overflow(bound: float, params: Iterable[Tensor]) -> bool:
    """Whether entries up to a bound may be too large for some parameter's dtype.

    Args:
        bound: No entry is larger.
        params: The parameters.

    Returns:
        True if they have to be looked at.
    """
    if bound <= LEAST_RANGE:  # as almost always
        return False
    return not bound <= min((torch.finfo(dtype).max for dtype in {p.dtype for p in params}), default=float("inf"))


def combine(column: Sequence[Tensor | None], weights: Sequence[float], like: Tensor) -> Tensor | None:
    """Add up the rows of one parameter: Σ wᵢ gᵢ.

    Args:
        column: The m gradients of this parameter. They may lie on another device, or be in half precision.
        weights: (m,).
        like: The parameter; the result has its dtype, device and strides.

    Returns:
        A new tensor, or None if no loss reaches the parameter.
    """
    out = combine_wide(column, weights, like)
    return None if out is None else out.to(like.dtype)


def combine_wide(column: Sequence[Tensor | None], weights: Sequence[float], like: Tensor) -> Tensor | None:
    """The same in single precision or better.

    Args:
        column: The m gradients of this parameter.
        weights: (m,).
        like: The parameter; the result has its device and strides.

    Returns:
        A new tensor, or None if no loss reaches the parameter.
    """
    terms = [(g.to_dense() if g.is_sparse else g, w) for g, w in zip(column, weights, strict=True) if g is not None]
    if not terms:
        return None
    half = like.dtype in (torch.float16, torch.bfloat16)
    out = torch.empty_like(like, dtype=torch.float32 if half else like.dtype, requires_grad=False)
    first, w = terms[0]
    if w == 1.0:
        out.copy_(first)  # bit for bit what autograd gave
    else:
        out.copy_(first).mul_(w)  # a half row is widened first
    for g, w in terms[1:]:
        out.add_(g.to(out.device), alpha=w)
    return out


def together(rows: Sequence[Row], params: Sequence[Tensor]) -> list[list[int]]:
    """Find small parameters whose rows can be added up in one call for many of them.

    Args:
        rows: m rows.
        params: The parameters.

    Returns:
        Groups of places, each of one dtype and device.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for j, p in enumerate(params):
        if p.numel() > SMALL or p.dtype not in (torch.float32, torch.float64):
            continue
        shape = p.stride()
        if all(
            (g := row[j]) is not None and not g.is_sparse and g.dtype == p.dtype and g.stride() == shape for row in rows
        ):
            groups.setdefault((p.dtype, p.device), []).append(j)
    return [group for group in groups.values() if len(group) > 1]


def combine_together(rows: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> Sequence[Tensor]:
    """Add up the rows of many small parameters: Σ wᵢ gᵢ, in m calls whatever their number.

    Args:
        rows: m rows over parameters that :func:`together` found.
        weights: (m,).

    Returns:
        New tensors, one per parameter.
    """
    total = foreach_mul(list(rows[0]), weights[0])
    for row, w in zip(rows[1:], weights[1:], strict=True):
        foreach_add_(total, list(row), alpha=w)
    return total


def mixed(rows: Tensor, weights: np.ndarray) -> Tensor:
    """Add up rows that lie in one matrix: Jᵀ w.

    Args:
        rows: J, (m, n).
        weights: w, (m,), float64.

    Returns:
        A new tensor, (n,), of the dtype and on the device of the rows.
    """
    if rows.device.type == "cpu" and rows.dtype in (torch.float64, torch.float32):
        j = rows.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # whoever asks looks at what comes of it
            return torch.from_numpy(weights.astype(j.dtype, copy=False).dot(j))
    w = torch.from_numpy(weights).to(rows.device, torch.promote_types(rows.dtype, torch.float32))
    with exactly(rows.device):
        return (w @ rows.to(w.dtype)).to(rows.dtype)


def plain(terms: Sequence[tuple[float, Tensor]], like: Tensor) -> Tensor | None:
    """Add up the gradients of a parameter that no surgery touches.

    Args:
        terms: Factors and gradients.
        like: The parameter; the result has its strides, or stays sparse.

    Returns:
        A new tensor, since autograd may have returned one that shares its memory with something else; None if there are
        no terms.
    """
    if not terms:
        return None
    if all(g.is_sparse for _, g in terms):
        total = terms[0][1].clone() if terms[0][0] == 1.0 else terms[0][1] * terms[0][0]
        for factor, g in terms[1:]:
            total = total + g * factor
        return total
    return combine([g for _, g in terms], [factor for factor, _ in terms], like)


def store(row: Row, dtype: torch.dtype | None, device: torch.device | None) -> bool:
    """Put the entries of a row where they wait for the others, one after the other.

    Args:
        row: The row; its entries are replaced.
        dtype: What real entries in single or double precision are rounded to; None: nothing.
        device: Where to; None: they stay.

    Returns:
        Whether anything was rounded.
    """
    rounded = False
    for j, g in enumerate(row):
        if g is None:
            continue
        if dtype is not None and g.dtype in (torch.float32, torch.float64):
            # Entries of a sparse gradient that belong together are added up before they are rounded.
            g, rounded = (g.coalesce() if g.is_sparse else g).to(dtype), True
        row[j] = g if device is None else g.to(device)
        del g
    return rounded


def restored(g: Tensor | None, p: Tensor) -> Tensor | None:
    """Bring an entry that :func:`store` put away back to its parameter. What was rounded stays so.

    Args:
        g: The entry; pairs of reals may stand for complex entries.
        p: Its parameter.

    Returns:
        The entry, on the device and in the precision of the parameter.
    """
    if g is None:
        return None
    return g.to(p.device, p.dtype if g.is_complex() or not p.is_complex() else p.dtype.to_real())


def wide(g: Tensor) -> Tensor:
    """Make a gradient dense and at least single precision, so that averages of it lose nothing.

    Args:
        g: Any gradient.

    Returns:
        The gradient itself if it is so already.
    """
    g = g.to_dense()
    return g.float() if g.dtype in (torch.float16, torch.bfloat16) else g


def unscale(row: Row, loss_scale: Tensor | None, factor: float = 1.0) -> None:
    """Take the loss scale out of a row, in single precision or better, and multiply it.

    Args:
        row: The row; its entries are replaced.
        loss_scale: The loss scale; None: 1.
        factor: What the row is multiplied by.
    """
    for j, g in enumerate(row):
        if g is not None:
            g = wide(g)
            g = g if loss_scale is None else g / loss_scale.to(g.device)
            row[j] = g if factor == 1.0 else g * factor


def largest(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Numbers of which the largest is the largest absolute entry, and not finite if any entry is not.

    Args:
        tensors: Gradients.
        device: Where to put the results.

    Returns:
        Scalars of one dtype, in few calls; none if there are no entries.
    """
    entries = [g.coalesce().values() if g.is_sparse else g for g in tensors]
    entries = [g for g in entries if g.numel()]
    if all(g.device == device and g.dtype == entries[0].dtype for g in entries):
        return list(foreach_norm(entries, float("inf"))) if entries else []
    return [peak(entries, device)]


def peak(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Largest absolute entry, which is not finite if any entry is not.

    Args:
        tensors: Gradients.
        device: Where to put the result.

    Returns:
        A scalar, float64; 0 if there are no entries.
    """
    entries = [g.coalesce().values() if g.is_sparse else g for g in tensors]
    entries = [g for g in entries if g.numel()]
    if len({(g.device, g.dtype) for g in entries}) == 1:
        peaks = [torch.stack(foreach_norm(entries, float("inf"))).max().to(device, torch.float64)]
    else:
        peaks = [torch.linalg.vector_norm(g, float("inf")).to(device, torch.float64) for g in entries]
    return torch.stack(peaks).max() if peaks else torch.zeros((), dtype=torch.float64, device=device)


def seeds(tensors: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    """What each backward pass starts from: 1, or the loss scale, which is never read on the host.

    Args:
        tensors: The scalar losses, (m,).
        scaler: A gradient scaler, or None.

    Returns:
        m scalars, each with the dtype and device of its loss.
    """
    if scaler is None:  # made at once; each loss has its own, since a hook may change it in place
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) == 1:
            ((dtype, device),) = kinds
            return list(torch.ones(len(tensors), dtype=dtype, device=device).unbind())
        ones = {kind: iter(torch.ones(len(tensors), dtype=kind[0], device=kind[1]).unbind()) for kind in kinds}
        return [next(ones[t.dtype, t.device]) for t in tensors]
    scaled = scaler.scale([torch.ones((), device=t.device) for t in tensors])
    return [s.to(t.dtype) for s, t in zip(scaled, tensors, strict=True)]


def weighted(tensors: Sequence[Tensor], weights: np.ndarray) -> list[Tensor]:
    """What one backward pass starts from for a weighted sum, without a loss scale.

    Args:
        tensors: The scalar losses, (k,).
        weights: (k,).

    Returns:
        k scalars, each with the dtype and device of its loss.
    """
    kinds = {(t.dtype, t.device.type) for t in tensors}
    if len(kinds) == 1 and kinds <= _IN_NUMPY.keys():  # on the host
        (kind,) = kinds
        return list(torch.from_numpy(weights.astype(_IN_NUMPY[kind])).unbind())
    return multiplied(seeds(tensors, None), weights.tolist())


def multiplied(starts: Sequence[Tensor], weights: Sequence[float] | Tensor) -> list[Tensor]:
    """Multiply what backward passes start from, in one call where all are of a kind.

    Args:
        starts: k scalars.
        weights: (k,). A tensor is not read.

    Returns:
        k scalars; those with weight 1 as they are.
    """
    if isinstance(weights, Tensor):
        return [start * w.to(start.device, start.dtype) for start, w in zip(starts, weights.unbind(), strict=True)]
    changed = [i for i, w in enumerate(weights) if w != 1.0]
    if not changed:
        return list(starts)
    found = list(starts)
    for i, start in zip(changed, foreach_mul([starts[i] for i in changed], [weights[i] for i in changed]), strict=True):
        found[i] = start
    return found


def write(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to ``.grad``; ``None`` leaves it as it is.

    Args:
        params: Parameters.
        gradients: What to add to each. The tensors become the parameters' own.
    """
    old = [p.grad for p in params]
    if any(a is not None and b is not None for a, b in zip(old, gradients, strict=True)):
        gradients = _added(old, gradients)
    for p, a, g in zip(params, old, gradients, strict=True):
        if g is not None and g is not a:
            p.grad = g


@torch.no_grad()
def _added(old: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add as torch accumulates: in place, but for a dense gradient on top of a sparse one.

    What could fail is done before anything is changed, so that an error leaves every gradient as it was.
    """
    sums: dict[int, Tensor] = {}
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a is not None and b is not None and not (_plain_dense(a) and (b.is_sparse or b.layout == torch.strided)):
            sums[i] = b + a if a.is_sparse and not b.is_sparse else a + b
    result: list[Tensor | None] = []
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if i in sums:
            result.append(sums[i])
        elif a is None or b is None:
            result.append(b if a is None else a)
        else:
            result.append(a.add_(b))
    return result


def _plain_dense(g: Tensor) -> bool:
    """Whether a tensor can be added to in place: dense, and no two entries share memory."""
    return g.layout == torch.strided and not any(s == 0 and n > 1 for s, n in zip(g.stride(), g.shape, strict=True))


def total(a: Tensor, b: Tensor) -> Tensor:
    """Add two gradients of one parameter, either of which may be sparse.

    Args:
        a: A gradient.
        b: Another.

    Returns:
        Their sum; sparse only if both are.
    """
    return b + a if a.is_sparse and not b.is_sparse else a + b


def parameters(optimizer: HasGroups) -> list[Tensor]:
    """Trainable parameters in the order of the groups, each once. Read anew in every call: groups change.

    Args:
        optimizer: Any optimizer.

    Returns:
        Its parameters that require grad.
    """
    found = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    # By id: hashing a tensor takes longer than anything else here.
    return found if len(set(map(id, found))) == len(found) else list({id(p): p for p in found}.values())
