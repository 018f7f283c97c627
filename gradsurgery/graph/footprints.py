"""Which losses may reach which entries of a tensor inside the graph.

Losses or heads that pass through one tensor (``torch.stack``, ``torch.cat``, a filled tensor, a column of an output)
can no longer be told apart node by node: autograd pads with zeros, and every loss seems to reach every head. A
*footprint* tells them apart entry by entry. It is a bit mask, bit i for loss i, or an array of such masks that
broadcasts to the shape of the tensor: an axis along which nothing changes has length 1, so that (B, K) outputs take K
numbers.

The rules here carry footprints from the outputs of a node to its inputs, from the structure of the operation alone: a
weight of 0 or a saturated clamp still passes everything on. An operation without a rule is run backward once on marked
entries. Where even that is impossible (a compiled region, a Python function), the footprint is the union of all, marked
as *vague*; below a vague join the gradients themselves must decide, and the leaves there are marked as *suspect*.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, reduce
from itertools import accumulate, pairwise
from operator import mul, or_
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gradsurgery.graph.torch_private import has_saved, metadata, raw_saved, saved, saved_tensors, unpack_hook

Masks = NDArray[Any]
Footprint = int | Masks
#: For each input of an operation that only moves entries, where those of its gradient come from in that of the output,
#: as a flat index or −1 for a zero, and their shape; None for an input without a gradient.
Moves = Sequence[tuple[list[int], tuple[int, ...]] | None]
#: What a node hands its inputs to: nodes and the number of their output.
Below = Sequence[tuple["Node | None", int]]

# Attributes of nodes and their saved tensors are no stable part of torch: what cannot be read is unknown.
_UNREADABLE = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
# Entries up to which an operation without a rule is run on marked ones.
_MOST = 2**18
# Types of numbers that hold marks.
_EXACT = (torch.float32, torch.float64)
# Entries up to which each gets a mark of its own at first.
_FEW = 256
# An array of masks with more bits than this holds Python integers.
_BITS = 62


class Losses(NamedTuple):
    """The bits in use.

    Attributes:
        vague: Marks a footprint as the union of what could not be told apart.
        suspect: Marks what lies below a vague join.
        dtype: Of arrays of masks.
        runs: Operations without a rule are run on marked entries. Otherwise all that passes them is vague.
    """

    vague: int
    suspect: int
    dtype: type
    runs: bool = True

    @staticmethod
    def of(m: int) -> Losses:
        """Lay out the bits.

        Args:
            m: Number of losses; they have the lowest bits.

        Returns:
            The layout.
        """
        return Losses(1 << m, 1 << m + 1, np.int64 if m + 2 <= _BITS else object)


@cache
def name(kind: type) -> str:
    """The operation that a class of nodes belongs to, such as "Cat" for ``CatBackward0``.

    Args:
        kind: Class of a node.

    Returns:
        Its name without the suffix; the whole name of what is not built in.
    """
    built_in = not issubclass(kind, BackwardCFunction)
    found = re.fullmatch(r"(\w+?)Backward\d+", kind.__name__) if built_in else None
    if found is None:
        return kind.__name__
    # The derivative of what acts entry by entry does so too.
    plain = found[1].removesuffix("Backward")
    return plain if plain in _ELEMENTWISE else found[1]


def named(operations: str) -> frozenset[str]:
    """A set of names.

    Args:
        operations: The names, with blanks between them.

    Returns:
        The set.
    """
    return frozenset(operations.split())


# Operations that act entry by entry, with broadcasting.
_ELEMENTWISE = named(
    "Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy "
    "BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone CopyBackwards Copysign Cos Cosh Detach "
    "Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmax Fmin Fmod Frac Gelu Hardshrink Hardsigmoid Hardswish "
    "Hardtanh HuberLoss Hypot I0 KlDiv LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp "
    "Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Polygamma Pow Prelu PreluKernel "
    "Reciprocal Relu Remainder Round Rrelu RreluWithNoise Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh "
    "SmoothL1Loss SoftMarginLoss Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Trunc Where Xlogy"
)
# Operations each of whose outputs depends on whole rows, or that pick entries by their values: what passes through one
# output passes to all of the input. Not in need of a closer look as long as all of an output is reached by the same.
_DENSE = named(
    "AdaptiveAvgPool2D Addbmm Addmm Addmv Addr Amax Amin AvgPool1D AvgPool2D AvgPool3D Baddbmm Bmm Cdist Convolution "
    "CudnnBatchNorm CudnnConvolution Cumsum Cumprod Dot Embedding EmbeddingBag FusedRmsNorm GridSampler2D "
    "LinalgVectorNorm Linear LogSoftmax Logcumsumexp Logsumexp Max MaxPool2D MaxPool2DWithIndices "
    "MaxPool3DWithIndices Mean Median Min MkldnnRnnLayer Mm MultiMargin Mv NativeBatchNorm NativeGroupNorm "
    "NativeLayerNorm NllLoss NllLoss2D Norm Outer Pdist PixelShuffle Prod RepeatInterleave SafeSoftmax "
    "ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu Softmax "
    "Sort Std StdMean Sum Svd Topk Trace UpsampleBilinear2D UpsampleNearest2D Var VarMean WeightNormInterface"
)
# Views that keep every entry.
_MOVING = named("Permute ReshapeAlias Squeeze T Transpose Unsqueeze UnsafeView View Expand")
# One node has all layers and directions, each with weights and an output of its own: of no help as long as the losses
# reach different ones, but what all of them reach passes to all.
_STACKED = named("CudnnRnn")
#: Operations below which a footprint of one mask stays one, whatever its entries.
PLAIN = _ELEMENTWISE | _DENSE | _MOVING | {"AccumulateGrad"}
#: Operations that put several tensors, or parts of one, into one.
JOINING = named(
    "Cat Stack CopySlices IndexAdd IndexCopy IndexPut IndexPutImpl IndexFill MaskedScatter Put Scatter ScatterAdd "
    "ScatterReduce SelectScatter SliceScatter DiagonalScatter AsStridedScatter"
)
# Elementwise operations that take each entry from one of their inputs.
_CHOOSING = named("MaskedFill Where")
# Operations that may leave entries of an input out although they return as many.
_PICKING = named("AsStrided Embedding Gather Index IndexSelect Take Unfold")
# Operations that put one tensor into a larger one, next to others where such are added.
_PLACING = named("Col2Im ConstantPadNd MaxUnpool2D MaxUnpool3D")
#: Nodes that hand output k to input k and to no other.
IDENTITIES = frozenset(("_DDPSinkBackward", "BackwardHookFunctionBackward"))


def acts_by_entry(kind: type) -> bool:
    """Whether an operation takes each entry by itself, but for broadcasting.

    Args:
        kind: Class of its node.

    Returns:
        True if it does.
    """
    return name(kind) in _ELEMENTWISE


def union(footprint: Footprint) -> int:
    """Every loss that reaches any entry.

    Args:
        footprint: A footprint.

    Returns:
        A bit mask.
    """
    if isinstance(footprint, int):
        return footprint
    if footprint.size > _FEW:
        return int(np.bitwise_or.reduce(footprint, axis=None))
    return reduce(or_, footprint.reshape(-1).tolist(), 0)


def _union_of(outputs: dict[int, Footprint]) -> int:
    everything = 0
    for footprint in outputs.values():
        everything |= union(footprint)
    return everything


def both(a: Footprint, b: Footprint) -> Footprint:
    """The footprint of a tensor that is used in two places.

    Args:
        a: The footprint of one use.
        b: That of the other.

    Returns:
        The union, entry by entry.
    """
    return a | b


@cache
def may_join(kind: type, several: bool) -> bool:
    """Whether losses that reach a node may part below it, although all of them reach its output.

    Args:
        kind: Class of the node.
        several: Whether it has several inputs.

    Returns:
        False where the operation is known not to tell its inputs apart, nor to be a part of a sum that does.
    """
    operation = name(kind)
    if several and (operation in _CHOOSING or (operation not in PLAIN and operation not in _NARROWING)):
        return True
    return operation in _PLACING


def spread(
    node: Any, below: Below, outputs: dict[int, Footprint], losses: Losses, moves: dict[Node, Moves] | None = None
) -> list[Footprint]:
    """Carry footprints from the outputs of a node to its inputs.

    Args:
        node: The node.
        below: Its ``next_functions``.
        outputs: The footprint of each output that a loss reaches.
        losses: The bits in use.
        moves: Gets what is found out about nodes that only move entries.

    Returns:
        One footprint per input.
    """
    operation = name(node.__class__)
    if operation in _NARROWING:
        try:
            return [_NARROWING[operation](node, _shape(*below[0]), outputs, losses.dtype)]
        except _UNREADABLE:
            return [losses.vague | _union_of(outputs)]
    everything = _union_of(outputs)
    if operation in IDENTITIES:
        return [outputs.get(k, 0) for k in range(len(below))]
    joins = sum(child is not None for child, _ in below) > 1 and operation not in PLAIN
    if joins and everything & losses.vague:
        everything |= losses.suspect
    first = next(iter(outputs.values()))
    uniform = isinstance(first, int) and all(isinstance(f, int) and f == first for f in outputs.values())
    try:
        found = _by_rule(node, operation, below, outputs, uniform, losses, {} if moves is None else moves)
    except _UNREADABLE:
        found = None
    if found is not None:
        if everything & losses.suspect:
            return [both(f, losses.suspect) if union(f) else f for f in found]
        return found
    everything |= losses.vague | (losses.suspect if joins else 0)
    return [everything] * len(below)


def _by_rule(
    node: Any,
    operation: str,
    below: Below,
    outputs: dict[int, Footprint],
    uniform: bool,
    losses: Losses,
    moves: dict[Node, Moves],
) -> list[Footprint] | None:
    """The footprints of the inputs; None if there is no way to know them."""
    picks = operation in _PICKING and type(below[0][0]).__name__ != "AccumulateGrad"
    if uniform and not picks and (operation in PLAIN | _STACKED or operation in JOINING or not _narrows(node, below)):
        return [outputs[min(outputs)]] * len(below)
    if set(outputs) == {0} and not uniform:
        footprint = outputs[0]
        assert not isinstance(footprint, int)
        chooses = operation in _CHOOSING and sum(child is not None for child, _ in below) > 1
        if operation in _ELEMENTWISE and not chooses:
            return [0 if c is None else settled(_fitted(footprint, _shape(c, nr))) for c, nr in below]
        spreading = _SPREADING.get(operation)
        found = None if spreading is None else spreading(node, below, footprint)
        if found is not None:
            return [0 if f is None else settled(f) for f in found]
    if not losses.runs or (operation != "CopySlices" and operation == type(node).__name__):
        return None
    moved = _moved_one_by_one(node, below, outputs, losses, moves) if set(outputs) == {0} else None
    return _marked(node, below, outputs, losses) if moved is None else moved


def _shape(node: Any, output: int) -> tuple[int, ...]:
    return tuple(metadata(node)[output].shape)


def settled(footprint: Footprint) -> Footprint:
    """Take one mask instead of an array of equal ones.

    Args:
        footprint: A footprint.

    Returns:
        The same footprint.
    """
    if isinstance(footprint, int):
        return footprint
    if not footprint.size:
        return 0
    first = footprint.item(0)
    # A look at the last entry spares the others, which takes longer, in most arrays.
    return first if footprint.item(-1) == first and (footprint == first).all() else footprint


def _as_array(footprint: Footprint, dims: int, dtype: type) -> Masks:
    return np.full((1,) * dims, footprint, dtype) if isinstance(footprint, int) else footprint


def _fitted(footprint: Masks, shape: Sequence[int]) -> Masks:
    """Undo broadcasting, where several entries of the output come from one of the input."""
    extra = footprint.ndim - len(shape)
    if extra > 0:
        footprint = np.bitwise_or.reduce(footprint, axis=tuple(range(extra)))
    footprint = footprint.reshape((1,) * -extra + footprint.shape) if extra < 0 else footprint
    for axis, size in enumerate(shape):
        if size == 1 and footprint.shape[axis] > 1:
            footprint = np.bitwise_or.reduce(footprint, axis=axis, keepdims=True)
    return footprint


def _collapsed(footprint: Masks, axes: Sequence[int]) -> Masks:
    """The union along some axes, which then have length 1."""
    return np.bitwise_or.reduce(footprint, axis=tuple(axes), keepdims=True) if len(axes) else footprint


# ------------------------------------------------------------- operations that take a part of their input


def _signed(number: int) -> int:
    """Undo the wrapping of negative numbers in the attributes of nodes."""
    return number - 2**64 if number >= 2**63 else number


def _axis(number: int, dims: int) -> int:
    axis = _signed(number)
    return axis + dims if axis < 0 else axis


def _assembled(shape: Sequence[int], axis: int, parts: Sequence[tuple[Any, Masks]], dtype: type) -> Footprint:
    """Put footprints side by side along an axis. What no part covers is reached by nothing."""
    flat = [[1 if k == axis else size for k, size in enumerate(part.shape)] for _, part in parts]
    common = list(np.broadcast_shapes(*map(tuple, flat)))
    common[axis] = shape[axis]
    result: Masks = np.zeros(common, dtype)
    for place, part in parts:
        result[(slice(None),) * axis + (place,)] = part
    return settled(result)


def _line(shape: Sequence[int], axis: int, masks: dict[int, Any], dtype: type) -> Footprint:
    """One mask per place along an axis, and nothing in the places that have none."""
    if len(masks) == shape[axis] and len(set(masks.values())) == 1:
        return masks[0]
    line: Masks = np.zeros(shape[axis], dtype)
    for k, mask in masks.items():
        line[k] = mask
    return line if len(shape) == 1 else line.reshape([-1 if k == axis else 1 for k in range(len(shape))])


def _select(node: Any, shape: Sequence[int], outputs: dict[int, Footprint], dtype: type) -> Footprint:
    axis = _axis(saved(node, "dim"), len(shape))
    index = _axis(saved(node, "index"), shape[axis])
    if isinstance(outputs[0], int):
        return _line(shape, axis, {index: outputs[0]}, dtype)
    part = np.expand_dims(outputs[0], axis)
    return _assembled(shape, axis, [(slice(index, index + 1), part)], dtype)


def _slice(node: Any, shape: Sequence[int], outputs: dict[int, Footprint], dtype: type) -> Footprint:
    axis = _axis(saved(node, "dim"), len(shape))
    place = slice(_signed(saved(node, "start")), _signed(saved(node, "end")), saved(node, "step"))
    return _assembled(shape, axis, [(place, _as_array(outputs[0], len(shape), dtype))], dtype)


def _split(node: Any, shape: Sequence[int], outputs: dict[int, Footprint], dtype: type) -> Footprint:
    axis = _axis(saved(node, "dim"), len(shape))
    if has_saved(node, "split_sizes"):
        ends = np.cumsum(saved(node, "split_sizes")).tolist()
    else:
        size = saved(node, "split_size")
        ends = [min(start + size, shape[axis]) for start in range(0, shape[axis], size)]
    starts = [0, *ends]
    parts = [(slice(starts[k], ends[k]), _as_array(f, len(shape), dtype)) for k, f in outputs.items()]
    return _assembled(shape, axis, parts, dtype)


def _unbind(node: Any, shape: Sequence[int], outputs: dict[int, Footprint], dtype: type) -> Footprint:
    axis = _axis(saved(node, "dim"), len(shape))
    if all(isinstance(f, int) for f in outputs.values()):
        return _line(shape, axis, outputs, dtype)
    parts = [(slice(k, k + 1), np.expand_dims(_as_array(f, len(shape) - 1, dtype), axis)) for k, f in outputs.items()]
    return _assembled(shape, axis, parts, dtype)


def _padded(node: Any, shape: Sequence[int], outputs: dict[int, Footprint], dtype: type) -> Footprint:
    result, pads = _as_array(outputs[0], len(shape), dtype), saved(node, "pad")
    for k in range(0, len(pads), 2):
        axis = len(shape) - 1 - k // 2
        before, after = _signed(pads[k]), _signed(pads[k + 1])
        if result.shape[axis] > 1 or before < 0 or after < 0:
            whole = [size if j != axis else shape[axis] + before + after for j, size in enumerate(result.shape)]
            places = np.arange(shape[axis]) + before
            there = (places >= 0) & (places < whole[axis])
            part = np.take(np.broadcast_to(result, whole), places[there], axis)
            result = np.zeros([size if j != axis else shape[axis] for j, size in enumerate(whole)], dtype)
            result[(slice(None),) * axis + (there,)] = part
    return settled(result)


_NARROWING: dict[str, Callable[[Any, Sequence[int], dict[int, Footprint], type], Footprint]] = {
    "Select": _select,
    "Slice": _slice,
    "Split": _split,
    "SplitWithSizes": _split,
    "UnsafeSplit": _split,
    "UnsafeSplitWithSizes": _split,
    "Unbind": _unbind,
    "ConstantPadNd": _padded,
}


# ----------------------------------------------------------------- operations below an array of masks


def _cat(node: Any, below: Below, footprint: Masks) -> list[Footprint | None] | None:
    axis = _axis(saved(node, "dim"), footprint.ndim)
    if footprint.shape[axis] == 1:
        return [footprint] * len(below)
    if sum(child is None for child, _ in below) > 1:
        return None
    sizes = [None if child is None else _shape(child, nr)[axis] for child, nr in below]
    if sizes.count(None) == 1:  # a constant, whose size follows from the others
        sizes[sizes.index(None)] = footprint.shape[axis] - sum(size for size in sizes if size is not None)
    ends = list(accumulate(size for size in sizes if size is not None))
    starts = [0, *ends][: len(ends)]
    if footprint.size == len(below) == footprint.shape[axis] and starts == list(range(len(below))):
        return footprint.reshape(-1).tolist()
    before = (slice(None),) * axis
    return [footprint[(*before, slice(a, b))] for a, b in zip(starts, ends, strict=True)]


def _stack(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    if footprint.size == len(below) and footprint.ndim == 1:
        return footprint.tolist()
    axis = _axis(saved(node, "dim"), footprint.ndim)
    count = footprint.shape[axis]
    return [np.take(footprint, k if count > 1 else 0, axis) for k in range(len(below))]


def _viewed(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    ((child, nr),) = below
    return [_reshaped(footprint, _shape(node, 0), _shape(child, nr))]


def _reshaped(footprint: Masks, before: Sequence[int], after: Sequence[int]) -> Masks:
    """Follow a reshape. Groups of axes along which nothing changes stay short."""
    short: list[int] = []
    long: list[int] = []
    may_cut, cuts_axes = True, False
    for left, right in _matched(before, after):
        changes = any(footprint.shape[k] > 1 for k in left)
        cuts = _common_cuts([before[k] for k in left], [after[k] for k in right])
        may_cut = may_cut and cuts is not None
        cuts_axes = cuts_axes or (changes and cuts is not None and len(cuts) > len(left))
        short += [before[k] if changes else 1 for k in left]
        long += [after[k] if changes else 1 for k in right]
    if may_cut and cuts_axes:
        return _recut(footprint, before, after)
    return np.broadcast_to(footprint, short).reshape(long)


def _matched(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes in groups that hold as many entries."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i], [j]
        a = before[i] if i < len(before) else 1
        b = after[j] if j < len(after) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
                left.append(i - 1)
            else:
                b, j = b * after[j], j + 1
                right.append(j - 1)
        yield [k for k in left if k < len(before)], [k for k in right if k < len(after)]


def _common_cuts(left: Sequence[int], right: Sequence[int]) -> list[int] | None:
    """Where two shapes cut the same entries, as running products; None if one cut does not divide the next."""
    cuts = sorted({*accumulate(left, mul), *accumulate(right, mul)} - {1})
    return None if any(a == 0 or b % a for a, b in pairwise(cuts)) else cuts


def _recut(footprint: Masks, before: Sequence[int], after: Sequence[int]) -> Masks:
    """Follow a reshape that cuts axes, along parts of which nothing may change: heads that become one axis again."""
    fine: list[int] = []
    changing: list[bool] = []
    places: list[list[int]] = []  # of the fine axes that make up each new one
    for left, right in _matched(before, after):
        sizes, wanted = [before[k] for k in left], [after[k] for k in right]
        cuts = _common_cuts(sizes, wanted)
        assert cuts is not None
        start = len(fine)
        fine += [b // a for a, b in zip([1, *cuts], cuts, strict=False)]
        owners = [next(k for k, end in zip(left, accumulate(sizes, mul), strict=True) if cut <= end) for cut in cuts]
        changing += [footprint.shape[k] > 1 for k in owners]
        ends = [0, *(sum(cut <= end for cut in cuts) for end in accumulate(wanted, mul))]
        places += [list(range(start + a, start + b)) for a, b in pairwise(ends)]
    cut = footprint.reshape([size if changes else 1 for size, changes in zip(fine, changing, strict=True)])
    for axis in range(cut.ndim):
        first = cut.take([0], axis)
        if cut.shape[axis] > 1 and (cut == first).all():
            cut = first
    whole = [
        fine[k] if any(cut.shape[j] > 1 for j in group) else 1 for group in places for k in group
    ]  # fine axes lie in order
    return np.broadcast_to(cut, whole).reshape([math.prod(whole[k] for k in group) for group in places])


def _turned(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    operation, dims = name(node.__class__), footprint.ndim
    order = list(range(dims))
    if operation == "Permute":
        order = np.argsort([_axis(d, dims) for d in saved(node, "dims")]).tolist()
    else:
        pair = (0, 1) if operation == "T" else (saved(node, "dim0"), saved(node, "dim1"))
        a, b = (_axis(d, dims) for d in pair)
        if dims > 1:
            order[a], order[b] = order[b], order[a]
    return [footprint.transpose(order)]


def _expanded(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    ((child, nr),) = below
    return [_fitted(footprint, _shape(child, nr))]


def _reduced(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    ((child, nr),) = below
    shape = _shape(child, nr)
    dims = saved(node, "dim")
    axes = sorted(_axis(d, len(shape)) for d in ((dims,) if isinstance(dims, int) else dims))
    return [footprint if footprint.ndim == len(shape) else np.expand_dims(footprint, tuple(axes))]


def _mixed_along(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    return [_collapsed(footprint, [_axis(saved(node, "dim"), footprint.ndim)]) for _ in below]


def _accumulated(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    """An entry goes into those after it."""
    axis = _axis(saved(node, "dim"), footprint.ndim)
    if footprint.shape[axis] == 1:
        return [footprint] * len(below)
    return [np.flip(np.bitwise_or.accumulate(np.flip(footprint, axis), axis), axis)] * len(below)


def _nll(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    return [np.expand_dims(footprint, 1), *[None] * (len(below) - 1)]


def _product(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    """Rows of the left factor stay apart, and columns of the right one."""
    sides: list[Footprint | None] = [_collapsed(footprint, [-1]), _collapsed(footprint, [-2])]
    if len(below) == 3:  # the term that is added
        child, nr = below[0]
        sides.insert(0, None if child is None else _fitted(footprint, _shape(child, nr)))
    return sides


def _batched(kept: Callable[[Any, Masks], int]) -> Callable[[Any, Below, Masks], list[Footprint | None]]:
    """Entries of the batch stay apart in the first input, and nothing in the others, which are parameters."""

    def rule(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
        leading = kept(node, footprint)
        first = _collapsed(footprint, range(leading, footprint.ndim))
        return [first, *[union(footprint)] * (len(below) - 1)]

    return rule


def _convolved(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    """Entries of the batch stay apart in the input, and groups of channels."""
    ((child, nr), *parameters), groups = below, saved(node, "groups")
    first = _collapsed(footprint, range(2, footprint.ndim))
    if groups == 1 or first.shape[1] == 1:
        first = _collapsed(first, [1])
    elif child is not None:
        first = np.bitwise_or.reduce(first.reshape(len(first), groups, -1), 2)
        first = np.repeat(first, _shape(child, nr)[1] // groups, 1).reshape(
            *first.shape[:1], -1, *[1] * (footprint.ndim - 2)
        )
    return [first, *[union(footprint)] * len(parameters)]


def _attention(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    """Queries stay apart, and columns of the values; heads only where there are as many of each."""
    sides = [_collapsed(footprint, axes) for axes in ([-1], [-2, -1], [-2])]
    heads = footprint.shape[1]
    for k, (child, nr) in enumerate(below[1:3], 1):
        if heads > 1 and child is not None and _shape(child, nr)[1] != heads:
            sides[k] = _collapsed(sides[k], [1])
    return [sides[k] if k < 3 else union(footprint) for k in range(len(below))]


def _normalized(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
    """Channels stay apart in a batch norm, and with running statistics everything does."""
    mixed = [axis for axis in range(footprint.ndim) if axis != 1] if saved(node, "training") else []
    return [_collapsed(footprint, mixed), *[union(footprint)] * (len(below) - 1)]


def _looked_up(node: Any, below: Below, footprint: Masks) -> list[Footprint | None] | None:
    """A table that is a parameter is not told apart; one that was computed may be left out in parts."""
    return [union(footprint)] if type(below[0][0]).__name__ == "AccumulateGrad" else None


def _recurrent(node: Any, below: Below, footprint: Masks) -> list[Footprint | None] | None:
    """A state is carried through time, in one direction; samples stay apart."""
    if saved(node, "batch_sizes"):
        return None
    inputs = _collapsed(footprint, [2])
    if saved(node, "reverse"):
        inputs = np.bitwise_or.accumulate(inputs, axis=0)
    else:
        inputs = np.bitwise_or.accumulate(inputs[::-1], axis=0)[::-1]
    weights, start = [union(footprint)] * 4, _collapsed(inputs, [0])
    states = [0 if child is None else _fitted(start, _shape(child, nr)) for child, nr in below[5:]]
    return [inputs, *weights, *states]


def _windowed(dims: int) -> Callable[[Any, Below, Masks], list[Footprint | None]]:
    """Images and channels stay apart where windows move over places."""

    def rule(node: Any, below: Below, footprint: Masks) -> list[Footprint | None]:
        return [_collapsed(footprint, range(footprint.ndim - dims, footprint.ndim))] * len(below)

    return rule


_LEADING = _batched(lambda node, footprint: 1)
_SPREADING: dict[str, Callable[[Any, Below, Masks], list[Footprint | None] | None]] = {
    "AdaptiveAvgPool2D": _windowed(2),
    "AdaptiveAvgPool3D": _windowed(3),
    "AdaptiveMaxPool2D": _windowed(2),
    "Addmm": _product,
    "Amax": _reduced,
    "Amin": _reduced,
    "AvgPool2D": _windowed(2),
    "AvgPool3D": _windowed(3),
    "Baddbmm": _product,
    "Bmm": _product,
    "Cat": _cat,
    "Convolution": _convolved,
    "Cumprod": _accumulated,
    "Cumsum": _accumulated,
    "Embedding": _looked_up,
    "Expand": _expanded,
    "LinalgVectorNorm": _reduced,
    "LogSoftmax": _mixed_along,
    "Logcumsumexp": _accumulated,
    "Logsumexp": _reduced,
    "MaxPool2DWithIndices": _windowed(2),
    "MaxPool3DWithIndices": _windowed(3),
    "MkldnnRnnLayer": _recurrent,
    "Mean": _reduced,
    "Mm": _product,
    "NativeBatchNorm": _normalized,
    "NativeGroupNorm": _LEADING,
    "NativeLayerNorm": _batched(lambda node, footprint: footprint.ndim - len(saved(node, "normalized_shape"))),
    "NllLoss": _nll,
    "NllLoss2D": _nll,
    "Norm": _reduced,
    "Permute": _turned,
    "ReshapeAlias": _viewed,
    "SafeSoftmax": _mixed_along,
    "ScaledDotProductEfficientAttention": _attention,
    "ScaledDotProductFlashAttention": _attention,
    "ScaledDotProductFlashAttentionForCpu": _attention,
    "Softmax": _mixed_along,
    "Squeeze": _viewed,
    "Stack": _stack,
    "Sum": _reduced,
    "T": _turned,
    "Transpose": _turned,
    "UnsafeView": _viewed,
    "Unsqueeze": _viewed,
    "UpsampleBilinear2D": _windowed(2),
    "UpsampleNearest2D": _windowed(2),
    "View": _viewed,
}


# -------------------------------------------------------------------- operations without a rule


def _narrows(node: Any, below: Below) -> bool:
    """Whether an operation may have taken a part of an input only, and not reduced it to one number."""
    size = sum(int(np.prod(tuple(entry.shape))) for entry in metadata(node))
    if size == 1 and type(node).__name__ == name(node.__class__):
        return False
    return any(child is not None and int(np.prod(_shape(child, nr))) > size for child, nr in below)


def _marked(node: Any, below: Below, outputs: dict[int, Footprint], losses: Losses) -> list[Footprint] | None:
    """Run an operation backward on marked entries, and see where the marks end up."""
    entries = metadata(node)
    sizes = [int(np.prod(tuple(entry.shape))) for entry in entries]
    sizes += [int(np.prod(_shape(child, nr))) for child, nr in below if child is not None]
    if max(sizes) > _MOST or _runs_code(node):
        return None
    flat: list[Masks] = [np.asarray(f, dtype=losses.dtype).reshape(-1) for f in outputs.values()]
    masks = np.unique(np.concatenate([np.zeros(1, losses.dtype), *flat]))
    dtype = entries[next(iter(outputs))].dtype
    results = _moved(node, below, outputs, masks, dtype) if dtype in _EXACT else None
    # What a constant has replaced does not go on.
    stops = any(child is None for child, _ in below) and name(node.__class__) in JOINING | _CHOOSING
    if results is None or (not stops and _lost(masks, results)):
        results = [0] * len(below)
        for k in range(1, len(masks)):
            # Nan passes through every sum and every product, with 0 too.
            marks = np.where(np.arange(len(masks)) == k, np.nan, 0.0)
            for place, values in enumerate(_carried(node, below, outputs, masks, marks, dtype)):
                if values is not None:
                    marked = _short(np.isnan(values).astype(np.intp))
                    results[place] = both(results[place], _picked(masks[[0, k]], marked))
    for k, ((child, nr), result) in enumerate(zip(below, results, strict=True)):
        if child is not None and not isinstance(result, int):  # autograd adds up what was broadcast afterwards
            results[k] = settled(_fitted(result, _shape(child, nr)))
    # A mark that is lost everywhere was stopped by a value, such as a mask of zeros, and not by the operation.
    lost = 0 if stops else _lost(masks, results)
    return [both(result, lost) for result in results] if lost else results


@lru_cache(256)
def _marks(shape: tuple[int, ...]) -> tuple[NDArray[np.float32], dict[float, int]]:
    """Numbers of which no sum and no multiple is among them, and the place of each; that of zero is −1."""
    numbers = np.asarray(1 + np.arange(1, math.prod(shape) + 1) * 0.6180339887498949 % 1, np.float32)
    places: dict[float, int] = {number: k for k, number in enumerate(numbers.tolist())}
    return numbers.reshape(shape), {0.0: -1, **places}


def _moves(node: Any, below: Below) -> Moves | None:
    """Run an operation backward on entries that all differ; None if it is large, or does more than to move them."""
    entry, *others = metadata(node)
    if others:
        return None
    shape = tuple(entry.shape)
    writes = type(node).__name__ == "CopySlices"
    if entry.dtype not in _EXACT or not 0 < math.prod(shape) <= _FEW:
        return None
    if not writes and (_runs_code(node) or any(math.prod(_shape(*at)) > _FEW for at in below if at[0] is not None)):
        return None
    marks, place_of = _marks(shape)
    result = node(torch.from_numpy(marks).to(entry.device, entry.dtype))
    moves: list[tuple[list[int], tuple[int, ...]] | None] = []
    try:
        for value, (child, _) in zip(result if isinstance(result, tuple) else (result,), below, strict=True):
            if value is None or child is None:
                moves.append(None)
            else:
                moves.append(([place_of[number] for number in value.reshape(-1).tolist()], tuple(value.shape)))
    except KeyError:
        return None
    return None if writes and not _is_written(moves) else moves


def _is_written(moves: Moves) -> bool:
    """Whether some entries of the first input were replaced by the others, and the rest stayed where it was."""
    if moves[0] is None:
        return True
    expected = list(range(len(moves[0][0])))
    for move in moves[1:]:
        for place in move[0] if move is not None else ():
            expected[place] = -1
    return moves[0][0] == expected


def _moved_one_by_one(
    node: Any, below: Below, outputs: dict[int, Footprint], losses: Losses, known: dict[Node, Moves]
) -> list[Footprint] | None:
    """Where the entries of a small tensor come from; None unless that is all there is to an operation."""
    moves = _moves(node, below)
    if moves is None:
        return None
    whole: Masks = np.asarray(outputs[0], losses.dtype)
    shape = _shape(node, 0)
    whole = whole if whole.shape == shape else np.broadcast_to(whole, shape)
    masks: list[int] = [*whole.reshape(-1).tolist(), 0]
    results: list[Footprint] = []
    arrived = 0
    for move, (child, nr) in zip(moves, below, strict=True):
        moved = [] if move is None else [masks[place] for place in move[0]]
        different = set(moved)
        for mask in different:
            arrived |= mask
        if len(different) < 2 or move is None or child is None:
            results.append(moved[0] if moved else 0)
            continue
        array: Masks = np.array(moved, losses.dtype).reshape(move[1])
        array = array if array.ndim < 2 else _short(array)
        results.append(array if array.shape == _shape(child, nr) else settled(_fitted(array, _shape(child, nr))))
    if all(child is not None for child, _ in below) and any(mask & ~arrived for mask in masks):
        return None
    known[node] = moves
    return results


def _lost(masks: Masks, results: Sequence[Footprint]) -> int:
    """The losses that came to a node and did not arrive at any of its inputs."""
    arrived = 0
    for result in results:
        arrived |= union(result)
    return int(np.bitwise_or.reduce(masks)) & ~arrived


def _moved(
    node: Any, below: Below, outputs: dict[int, Footprint], masks: Masks, dtype: torch.dtype
) -> list[Footprint] | None:
    """Where the marks end up if the operation does nothing but move entries; None if it does more."""
    # Neither sums nor multiples of these numbers are among them.
    numbers = np.sort(np.float32(1 + np.arange(1, len(masks)) * 0.6180339887498949 % 1)).astype(np.float64)
    marks = np.concatenate([np.zeros(1), numbers])
    results: list[Footprint] = []
    for values in _carried(node, below, outputs, masks, marks, dtype):
        if values is None:
            results.append(0)
            continue
        places = np.searchsorted(marks, values).clip(max=len(marks) - 1)
        if not (marks[places] == values).all():
            return None
        results.append(_picked(masks, _short(places)))
    return results


def _short(places: NDArray[np.intp]) -> NDArray[np.intp]:
    """One entry along each axis where nothing changes."""
    for axis in range(places.ndim):
        first = places.take([0], axis) if places.shape[axis] > 1 else places
        if first is not places and (places == first).all():
            places = first
    return places


def _picked(masks: Masks, places: NDArray[np.intp]) -> Footprint:
    return masks[places] if places.size > 1 else int(masks[places.flat[0]]) if places.size else 0


def _carried(
    node: Any, below: Below, outputs: dict[int, Footprint], masks: Masks, marks: NDArray[Any], dtype: torch.dtype
) -> list[NDArray[Any] | None]:
    """Run an operation backward with a mark at each entry, by its mask."""
    arguments: list[torch.Tensor | None] = []
    for k, entry in enumerate(metadata(node)):
        footprint = outputs.get(k, 0)
        if isinstance(footprint, int) and not footprint:
            arguments.append(None)
            continue
        marked = marks[np.searchsorted(masks, footprint)]
        whole = torch.from_numpy(np.array(np.broadcast_to(marked, tuple(entry.shape))))
        whole = torch.complex(whole, whole) if dtype.is_complex else whole
        arguments.append(whole.to(entry.device, dtype))
    with torch.no_grad():
        result = node(*arguments)
    result = result if isinstance(result, tuple) else (result,)
    return [
        None
        if value is None or child is None
        else (value.abs() if value.is_complex() else value).double().cpu().numpy()
        for value, (child, _) in zip(result, below, strict=True)
    ]


def _runs_code(node: Any) -> bool:
    """Whether reading what a node has saved would run code of the user's, such as a second forward pass."""
    for tensor in saved_tensors(node.__class__):
        packed = raw_saved(node, tensor)
        several = packed if isinstance(packed, (tuple, list)) else [packed]
        if any(unpack_hook(one) is not None for one in several):
            return True
    return False
