"""Gradients of single samples in the parameters of one layer, from its inputs A and the gradients D at its outputs.

The gradient of Σ vᵢ lᵢ at the outputs of a layer holds what each loss contributes side by side, where each loss depends
on one sample: D is cut into slots, such as the tokens of a sample, and row i follows from the slots of sample i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsurgery.gradients.gram import product
from gradsurgery.graph.samples import Labels

#: Products of gradients with themselves, by their addresses.
Known = dict[int, tuple[Tensor, Tensor]]

# Entries of rows that are formed at a time on the host, and elsewhere.
_BUCKET_CPU, _BUCKET_GPU = 2**22, 2**26
# Columns of a product in single precision, before it is added up in double.
_CHUNK = 1024


class Slots:
    """Which slots along an axis belong to which sample.

    Args:
        labels: The sample of each slot, −1 for nobody, (S,).
        count: Number of samples, B.
        device: Where the slots are.

    Attributes:
        count: B.
        times: Slots of each sample, T; of the one that has most.
        present: The samples that have slots, (s,); None if all do.
    """

    def __init__(self, labels: Labels, count: int, device: torch.device) -> None:
        self.count = count
        mine = np.flatnonzero(labels >= 0)
        samples, counts = np.unique(labels[mine], return_counts=True)
        self.times = int(counts.max(initial=0))
        self.present = None if len(samples) == count else torch.from_numpy(samples).to(device)
        self._labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self._size = len(samples)
        self._index: Tensor | None = None
        self._order = self._ordered(labels, samples)
        if not self._order:
            order = mine[np.argsort(labels[mine], kind="stable")]
            index = np.full((len(samples), self.times), len(labels), np.int64)
            index[np.repeat(np.arange(len(samples)), counts), _within(counts)] = order
            self._index = torch.from_numpy(index).to(device)

    def _ordered(self, labels: Labels, samples: Labels) -> str:
        if len(labels) != len(samples) * self.times:
            return ""
        if (labels == np.repeat(samples, self.times)).all():
            return "samples first"
        return "places first" if (labels == np.tile(samples, self.times)).all() else ""

    def split(self, x: Tensor) -> Tensor:
        """Cut the first axis into samples.

        Args:
            x: (S, …).

        Returns:
            (s, T, …), with zeros where a sample has fewer slots.
        """
        if self._order == "samples first":
            return x.reshape(self._size, self.times, *x.shape[1:])
        if self._order == "places first":
            return x.reshape(self.times, self._size, *x.shape[1:]).transpose(0, 1)
        assert self._index is not None
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self._index]

    def spread(self, weights: Tensor) -> Tensor:
        """Give each slot what its sample has.

        Args:
            weights: (B,).

        Returns:
            (S,); 0 where the slot is nobody's.
        """
        if self._order == "samples first" and self.times == 1 and self.present is None:
            return weights
        found = weights[self._labels.clamp(min=0)]
        return torch.where(self._labels < 0, torch.zeros_like(found), found)

    def rows(self, rows: Tensor) -> Tensor:
        """Rows of all samples, with zeros for those without slots.

        Args:
            rows: (s, …).

        Returns:
            (B, …).
        """
        if self.present is None:
            return rows
        return rows.new_zeros(self.count, *rows.shape[1:]).index_copy_(0, self.present, rows)

    def gram(self, gram: Tensor) -> Tensor:
        """Inner products of all samples.

        Args:
            gram: (s, s).

        Returns:
            (B, B).
        """
        if self.present is None:
            return gram
        found = gram.new_zeros(self.count, self.count)
        return found.index_put_((self.present[:, None], self.present), gram)


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, … within each run of so many."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class Use(ABC):
    """One way in which a node uses a value: a parameter, or what is made of parameters alone.

    Attributes:
        shape: The shape of the value.
        axis: The axis of D along which the samples change.
    """

    shape: tuple[int, ...]
    axis = 0
    #: Axes of D along which samples may change.
    axes: Sequence[int] = (0,)

    @abstractmethod
    def rows(self, d: Tensor, slots: Slots, start: int, stop: int) -> Tensor:
        """Gradients of the samples in a part of the value.

        Args:
            d: The gradient at the output of the node.
            slots: Whose it is.
            start: Where the part begins, along the first axis of the value.
            stop: Where it ends.

        Returns:
            (B, k), single precision or better.
        """

    @abstractmethod
    def mixed(self, d: Tensor) -> Tensor:
        """The gradient in the value, as autograd would find it.

        Args:
            d: The gradient at the output, each slot multiplied by the weight of its sample.

        Returns:
            A tensor of the shape of the value.
        """

    def cuts(self) -> bool:
        """Whether forming a part of a row costs no more than its share.

        Returns:
            False if all is formed at once.
        """
        return True

    def weighted(self, d: Tensor, slots: Slots, weights: Tensor) -> Tensor:
        """The gradient of a weighted sum of the losses in the value.

        Args:
            d: The gradient at the output of the node.
            slots: Whose it is.
            weights: (B,).

        Returns:
            A tensor of the shape of the value.
        """
        d = wide(d)
        by = slots.spread(weights.to(d.device, d.dtype))
        return self.mixed(d * by.view(-1, *(1,) * (d.dim() - 1 - self.axis)) if d.dim() else d * by.sum())


class Linear(Use):
    """The weight of a linear layer.

    Args:
        inputs: A, (S, in).
        shape: Of the weight.
        flipped: It is (out, in).
    """

    def __init__(self, inputs: Tensor, shape: Sequence[int], flipped: bool) -> None:
        self.inputs = inputs
        self.shape = tuple(shape)
        self.flipped = flipped

    def rows(self, d: Tensor, slots: Slots, start: int, stop: int) -> Tensor:
        a, d = slots.split(wide(self.inputs)), slots.split(wide(d))
        left, right = (d, a) if self.flipped else (a, d)
        left = left[:, :, start:stop]
        left = left.transpose(1, 2)
        rows = left * right if slots.times == 1 else torch.bmm(left, right)
        return slots.rows(rows.reshape(len(rows), -1))

    def mixed(self, d: Tensor) -> Tensor:
        a = wide(self.inputs).to(d.dtype)
        return d.T @ a if self.flipped else a.T @ d


class Convolution(Use):
    """The weight of a convolution.

    Args:
        inputs: The images, (S, in, …).
        weight: The weight, for its shape.
        options: Stride, padding, dilation, whether it is transposed, output padding, and groups.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, options: tuple[Any, ...]) -> None:
        self.inputs = inputs
        self.shape = tuple(weight.shape)
        self.options = options

    def cuts(self) -> bool:
        return self.options[-1] == 1 and not self.options[3]

    def rows(self, d: Tensor, slots: Slots, start: int, stop: int) -> Tensor:
        a, d = wide(self.inputs), wide(d)
        if self.cuts():
            rows = self._each(a, d[:, start:stop], (stop - start, *self.shape[1:]))
        else:
            rows = self._each(a, d, self.shape)[:, start:stop]
        found = slots.split(rows.flatten(1))
        return slots.rows(found.squeeze(1) if slots.times == 1 else found.sum(1))

    def _each(self, a: Tensor, d: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of each image: one call, with the batch folded into the groups."""
        stride, padding, dilation, transposed, output_padding, groups = self.options
        n = len(a)
        like = a.new_empty(()).expand(n * shape[0], *shape[1:])
        found = torch.ops.aten.convolution_backward(
            d.reshape(1, -1, *d.shape[2:]), a.reshape(1, -1, *a.shape[2:]), like, None,
            stride, padding, dilation, transposed, output_padding, groups * n, [False, True, False],
        )[1]  # fmt: skip
        result: Tensor = found.view(n, *shape)
        return result

    def mixed(self, d: Tensor) -> Tensor:
        a = wide(self.inputs).to(d.dtype)
        like = a.new_empty(()).expand(self.shape)
        stride, padding, dilation, transposed, output_padding, groups = self.options
        found: Tensor = torch.ops.aten.convolution_backward(
            d, a, like, None, stride, padding, dilation, transposed, output_padding, groups, [False, True, False]
        )[1]
        return found


class Embedding(Use):
    """A table.

    Args:
        indices: What was looked up, of the shape of the output without its last axis.
        shape: Of the table.
        scales: What the gradient at each index is multiplied by, of the shape of the indices, or None.
        sparse: Gradients are sparse.
    """

    def __init__(self, indices: Tensor, shape: Sequence[int], scales: Tensor | None, sparse: bool) -> None:
        self.indices = indices
        self.shape = tuple(shape)
        self.scales = scales
        self.sparse = sparse
        self.axes = range(indices.dim())

    def scaled(self, d: Tensor) -> Tensor:
        """D with what lookups multiply it by.

        Args:
            d: The gradient at the output.

        Returns:
            The same shape, single precision or better.
        """
        d = wide(d)
        return d if self.scales is None else d * self.scales.to(d.dtype)[..., None]

    def pairs(self, d: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """The entries that are not zero.

        Args:
            d: The gradient at the output.
            slots: Whose it is.

        Returns:
            Samples and places in the table, (P,) each, no pair twice and sorted by place, and gradients (P, width).
        """
        d = slots.split(self.scaled(d).movedim(self.axis, 0)).flatten(1, -2)
        at = slots.split(self.indices.movedim(self.axis, 0).unsqueeze(-1)).flatten(1)
        samples = torch.arange(len(d), device=d.device) if slots.present is None else slots.present
        keys = (at * slots.count + samples[:, None]).reshape(-1)
        unique, inverse = keys.unique(return_inverse=True)
        sums = d.new_zeros(len(unique), d.shape[-1]).index_add_(0, inverse, d.reshape(-1, d.shape[-1]))
        return unique % slots.count, unique // slots.count, sums

    def rows(self, d: Tensor, slots: Slots, start: int, stop: int) -> Tensor:
        samples, places, sums = self.pairs(d, slots)
        inside = (places >= start) & (places < stop)
        found = sums.new_zeros(slots.count, stop - start, sums.shape[1])
        found.index_put_((samples[inside], places[inside] - start), sums[inside])
        return found.flatten(1)

    def gram(self, d: Tensor, slots: Slots) -> Tensor:
        """Inner products, place by place: only samples that look up the same have any.

        Args:
            d: The gradient at the output.
            slots: Whose it is.

        Returns:
            (B, B), float64.
        """
        samples, places, sums = self.pairs(d, slots)
        _, counts = places.unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        found = torch.zeros(slots.count * slots.count, dtype=torch.float64, device=d.device)
        most = 1
        while len(counts):
            chosen = (counts <= most) & (counts > most // 2)
            if bool(chosen.any()):
                at = starts[chosen, None] + torch.arange(most, device=d.device)
                there = torch.arange(most, device=d.device) < counts[chosen, None]
                at = torch.where(there, at, 0)
                e = torch.where(there[..., None], sums[at], 0)
                s = samples[at]
                for block in range(0, len(at), step := max(1, _BUCKET_CPU // (most * max(most, e.shape[2])))):
                    part, who = e[block : block + step], s[block : block + step]
                    products = torch.bmm(part, part.transpose(1, 2)).double()
                    found.index_add_(
                        0, (who[:, :, None] * slots.count + who[:, None]).reshape(-1), products.reshape(-1)
                    )
            if most >= int(counts.max()):
                break
            most *= 2
        return found.view(slots.count, slots.count)

    def mixed(self, d: Tensor) -> Tensor:
        d = self.scaled(d)
        at, entries = self.indices.reshape(-1), d.reshape(-1, d.shape[-1])
        if self.sparse:
            kept = torch.arange(len(at), device=d.device)
            if self.scales is not None:
                kept = kept[self.scales.reshape(-1) != 0]
            return torch.sparse_coo_tensor(at[kept][None], entries[kept], self.shape, check_invariants=False)
        return d.new_zeros(self.shape).index_add_(0, at, entries)


class Summed(Use):
    """A small value: a bias, the weight of a norm, a scale. Its gradient is a sum of something of the shape of D.

    Args:
        shape: Of the value.
        aligned: The value's shape as it is broadcast to that of D.
        axes: Axes of D along which samples may change.
        factor: From D to what is added up; None: D itself.
    """

    def __init__(
        self,
        shape: Sequence[int],
        aligned: Sequence[int],
        axes: Sequence[int],
        factor: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.aligned = tuple(aligned)
        self.axes = tuple(axis for axis in axes if self.aligned[axis] == 1)
        self.factor = factor

    def _terms(self, d: Tensor) -> Tensor:
        return wide(d) if self.factor is None else wide(self.factor(d))

    def rows(self, d: Tensor, slots: Slots, start: int, stop: int) -> Tensor:
        x = slots.split(self._terms(d).movedim(self.axis, 0))
        aligned = [size for axis, size in enumerate(self.aligned) if axis != self.axis]
        summed = [1, *(axis + 2 for axis, size in enumerate(aligned) if size == 1)]
        x = x.sum(summed) if any(x.shape[axis] > 1 for axis in summed) else x
        rows = slots.rows(x.reshape(len(x), -1))
        width = rows.shape[1] // max(1, self.shape[0] if self.shape else 1)
        return rows[:, start * width : stop * width]

    def mixed(self, d: Tensor) -> Tensor:
        return self._terms(d).sum_to_size(self.aligned).reshape(self.shape)


class Column:
    """All uses of one value, with the gradients at their outputs.

    Args:
        parts: The uses, with the gradient at the output of each and whose it is.
        known: Inner products of gradients at outputs that another value has asked for already, by their addresses.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Use, Tensor, Slots]],
        known: Known | None = None,
    ) -> None:
        self.known = {} if known is None else known
        self.shape = parts[0][0].shape
        self._parts = list(parts)
        self._rows: Tensor | None = None
        self.count = parts[0][2].count

    def rows(self, start: int, stop: int) -> Tensor:
        """Gradients of the samples in a part of the value.

        Args:
            start: Where it begins, along its first axis.
            stop: Where it ends.

        Returns:
            (B, k).
        """
        found = [use.rows(d, slots, start, stop) for use, d, slots in self._parts]
        total = found[0]
        for more in found[1:]:
            total = total + more
        return total

    @property
    def length(self) -> int:
        """Entries along the first axis."""
        return self.shape[0] if self.shape else 1

    def whole(self) -> Tensor:
        """All rows.

        Returns:
            (B, n).
        """
        return self.rows(0, self.length) if self._rows is None else self._rows

    def chunks(self) -> list[tuple[int, int]]:
        """Parts of the value whose rows are formed at a time.

        Returns:
            From, to.
        """
        numel = int(np.prod(self.shape))
        device = self._parts[0][1].device
        bucket = _BUCKET_CPU if device.type == "cpu" else _BUCKET_GPU
        if not all(use.cuts() for use, *_ in self._parts):
            return [(0, self.length)]
        step = max(1, min(self.length, bucket * self.length // max(1, numel * self.count)))
        return [(start, min(start + step, self.length)) for start in range(0, self.length, step)]

    def keep(self) -> None:
        """Hold the rows instead of what they follow from, where they are smaller."""
        held = sum(d.numel() for _, d, _ in self._parts)
        if self._rows is None and self.count * int(np.prod(self.shape)) <= held:
            self._rows = self.whole()
            self._parts = []

    def gram(self, double: bool) -> Tensor:
        """Inner products of the rows.

        Args:
            double: In double precision.

        Returns:
            (B, B), float64.
        """
        if self._rows is not None:
            rows = self._rows.double() if double else self._rows
            return _squared(rows, {} if double else self.known)
        if double:
            return Column([(_doubled(use), d.double(), slots) for use, d, slots in self._parts]).gram(False)
        uses = [use for use, *_ in self._parts]
        if len(uses) == 1 and isinstance(uses[0], Embedding):
            _, d, slots = self._parts[0]
            return uses[0].gram(d, slots)
        if all(isinstance(use, Linear) for use in uses) and (joined := self._joined()) is not None:
            found = _from_kernels(*joined, self.known)
            if found is not None:
                return found
        total: Tensor | None = None
        for start, stop in self.chunks():
            rows = self.rows(start, stop)
            part = product(rows, rows, _CHUNK)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _joined(self) -> tuple[Tensor, Tensor] | None:
        """The inputs and the gradients of linear calls, one below the other: (B, T, in) and (B, T, out).

        Returns:
            The two, exchanged in calls that use the weight the other way round than the first, so that what they
            give adds up; None if not all samples have slots.
        """
        if any(slots.present is not None for *_, slots in self._parts):
            return None
        a, d = [], []
        for use, at_output, slots in self._parts:
            inputs, gradient = slots.split(wide(use.inputs)), slots.split(wide(at_output))  # type: ignore[attr-defined]
            same = use.flipped == self._parts[0][0].flipped  # type: ignore[attr-defined]
            a.append(inputs if same else gradient)
            d.append(gradient if same else inputs)
        return (a[0], d[0]) if len(a) == 1 else (torch.cat(a, 1), torch.cat(d, 1))

    def squares(self) -> Tensor:
        """Squared lengths of the rows, without their products.

        Returns:
            (B,), float64.
        """
        uses = [use for use, *_ in self._parts]
        if self._rows is None and all(isinstance(use, Linear) for use in uses):
            joined = self._joined()
            if joined is not None and joined[0].shape[1] == 1:
                a, d = (x.double().square().sum((1, 2)) for x in joined)
                return a * d
        if self._rows is None and len(uses) == 1 and isinstance(uses[0], Embedding):
            _, d, slots = self._parts[0]
            samples, _, sums = uses[0].pairs(d, slots)
            found = torch.zeros(slots.count, dtype=torch.float64, device=d.device)
            return found.index_add_(0, samples, sums.double().square().sum(1))
        total: Tensor | None = None
        for start, stop in self.chunks() if self._rows is None else [(0, self.length)]:
            rows = self.rows(start, stop) if self._rows is None else self._rows
            part = rows.double().square().sum(1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        """The gradient of a weighted sum of the losses.

        Args:
            weights: (B,).

        Returns:
            A tensor of the shape of the value.
        """
        if self._rows is not None:
            return (weights.to(self._rows) @ self._rows).view(self.shape)
        found: Tensor | None = None
        for use, d, slots in self._parts:
            part = use.weighted(d, slots, weights)
            found = part if found is None else (part + found if found.is_sparse else found + part)
        assert found is not None
        return found


def _squared(x: Tensor, known: Known) -> Tensor:
    """X Xᵀ, which is not to be changed; made once for the weight and the bias of a layer."""
    if x.data_ptr() not in known:
        known[x.data_ptr()] = x, product(x, x, _CHUNK)  # the address is that of nothing else as long as it is held
    return known[x.data_ptr()][1]


def _from_kernels(a: Tensor, d: Tensor, known: Known) -> Tensor | None:
    """Inner products ⟨Dᵢᵀ Aᵢ, Dⱼᵀ Aⱼ⟩ from those of all slots; None where forming rows takes less."""
    m, times, width = a.shape
    out = d.shape[2]
    if times > 1 and times**2 * (width + out + 16) >= width * out * (1 + times / m):
        return None
    if times == 1:
        return product(a[:, 0], a[:, 0]).mul_(_squared(d[:, 0], known))
    if (m * times) ** 2 > _BUCKET_CPU * 4:
        return None
    a, d = a.reshape(m * times, width), d.reshape(m * times, out)
    kernel = product(a, a).mul_(product(d, d))
    return kernel.view(m, times, m, times).sum((1, 3))


def _doubled(use: Use) -> Use:
    """The same in double precision."""
    new = type(use).__new__(type(use))
    new.__dict__.update(use.__dict__)
    for name in ("inputs", "scales"):
        if isinstance(given := getattr(use, name, None), Tensor):
            setattr(new, name, given.double())
    return new


def wide(x: Tensor) -> Tensor:
    """Single precision or better.

    Args:
        x: Any tensor.

    Returns:
        The tensor itself if it is so already.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
