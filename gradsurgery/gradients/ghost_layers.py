"""Layers whose weight gradients are never formed: what is kept of each loss instead, and what follows from it.

The gradient of loss i in the weight of a linear layer is Dᵢᵀ A, with the layer's inputs A, (N, in), and the gradients
at its outputs, Dᵢ, (N, out). Inner products follow from K = A Aᵀ alone, ⟨Dᵢᵀ A, Dⱼᵀ A⟩ = ⟨Dᵢ, K Dⱼ⟩, and the weighted
sum of all rows is one product, (Σ wᵢ Dᵢ)ᵀ A. Where N is small, this costs less than one weight gradient per loss. The
gradient of an embedding has no more rows than there were indices, and is kept as those. A convolution is a linear layer
of the patches of its inputs.

A weight that several calls use, in siamese or recurrent networks, has the sum of their gradients: Σᵤ Dᵢᵤᵀ Aᵤ is Dᵢᵀ A
once more, if the inputs of all calls are put one below the other, and the gradients at their outputs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients.gram import Row, Workspace
from gradsurgery.graph.torch_private import metadata, version

# Entries of all tasks that are handled at once.
_BUCKET_CPU, _BUCKET_GPU = 2**18, 2**24

# In multiplications: what reading or writing an entry costs, and what calling the operations of a layer costs on a CPU,
# both found by timing. An accelerator multiplies some hundred times faster, and is called no faster. The inner products
# and the sum of a layer take some forty calls.
TRAFFIC, _CALLS_CPU, _CALLS_GPU, _CALLS = 16.0, 12e6, 1e9, 40


#: Seconds that a function takes on a device.
Clock = Callable[[Callable[[], object], torch.device], float]


class Linear(NamedTuple):
    """y = A Wᵀ + b, or y = A W + b. Of each loss, the gradients D at the outputs are kept, (N, out).

    Attributes:
        edges: Where autograd hands over the gradients at the outputs, one per call.
        params: The weight, and the bias if it is a ghost too.
        places: Their places among the shared parameters.
        inputs: The inputs of each call, (Nᵤ, in). One below the other they are A.
        versions: What they counted of changes in place when the graph was read.
        flipped: The weight is (out, in).
    """

    edges: tuple[GradientEdge, ...]
    params: tuple[Tensor, ...]
    places: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    flipped: bool

    def costs(self, m: int, share: float = 1.0) -> tuple[float, float]:
        """Predict what this costs, and what forming the weight gradient of each loss does.

        Args:
            m: Number of losses.
            share: What part of the calls a loss reaches.

        Returns:
            Both, in multiplications.
        """
        n, width, calls = sum(a.shape[0] for a in self.inputs), self.inputs[0].shape[1], len(self.inputs)
        out = self.params[0].numel() // width
        ghost, rows = _costs(n, width, out, m, self.inputs[0].device)
        if calls > 1:  # copies here, sums of gradients there, and no gradient of what a loss does not reach
            ghost += 2 * TRAFFIC * n * (m * out + width)
            rows += 3 * TRAFFIC * (share * calls - 1) * m * width * out - (1 - share) * m * n * width * out
        return ghost, rows

    def sample(self) -> list[Tensor]:
        """Make up gradients at the outputs.

        Returns:
            Ones, one tensor per call.
        """
        return _ones(self.edges, self.params[0])

    def keep(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """What is kept of one loss.

        Args:
            gradients: At the outputs of each call, (Nᵤ, out).

        Returns:
            D, (N, out), or None if the loss reaches none of the calls.
        """
        return gradients[0] if len(gradients) == 1 else _joined(gradients, [a.shape[0] for a in self.inputs])

    def products(self, rows: Sequence[Tensor], least: torch.dtype, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """Inner products of the gradients in the parameters.

        Args:
            rows: What is kept of each loss, m matrices.
            least: Half and single precision are multiplied in this one.
            workspace: Memory for parts of them.

        Returns:
            (m, m), and Σₙ ‖aₙ‖² ‖dₙ‖² for each loss, (m,); float64.
        """
        inputs = self._all_inputs()
        dtype = _widest(least, inputs, *rows)
        inputs = inputs.to(dtype)
        kernel = gram_module.product(inputs, inputs)
        if len(self.params) > 1:  # the bias is the weight of one more input, always 1
            kernel += 1
        lengths = kernel.diagonal().clone()
        # K = M + Mᵀ with a block of zeros in M: a quarter of the work less.
        (n, out), m = rows[0].shape, len(rows)
        half = n // 2
        kernel = kernel.to(dtype)
        upper, lower = kernel[:half, :half].div_(2), kernel[half:]
        lower[:, half:].div_(2)
        found: list[tuple[Tensor, Tensor]] = []
        step = max(1, (_BUCKET_CPU if kernel.device.type == "cpu" else _BUCKET_GPU) // (m * n))
        for start in range(0, out, step):
            pieces = list(rows) if step >= out else [row[:, start : start + step] for row in rows]
            shape = n, m * pieces[0].shape[1]
            part, moved = (workspace.matrix(k, shape, kernel.device, dtype) for k in (0, 1))
            if all(piece.dtype == dtype for piece in pieces):
                torch.cat(pieces, dim=1, out=part)
            else:
                part.copy_(torch.cat(pieces, dim=1))
            torch.mm(upper, part[:half], out=moved[:half])
            torch.mm(lower, part, out=moved[half:])
            apart = part.view(n, m, -1)
            products = _summed_products(apart, moved.view(n, m, -1))
            found.append((products, lengths @ torch.linalg.vector_norm(apart, dim=2).double().square()))
        gram, squares = found[0]
        for products, sizes in found[1:]:
            gram, squares = gram + products, squares + sizes
        return gram + gram.T, squares

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """Add up gradients.

        Args:
            rows: What is kept of some losses.
            weights: One a loss.

        Returns:
            New tensors, one per parameter.
        """
        self.check()
        inputs = self._all_inputs()
        mixed = _mixed(rows, weights, _widest(torch.float32, inputs, *rows))
        inputs = inputs.to(mixed.dtype)
        weight = mixed.T @ inputs if self.flipped else inputs.T @ mixed
        return [_as(g, p) for g, p in zip((weight, mixed.sum(0)), self.params, strict=False)]

    def beyond_rows(self, m: int, clock: Clock) -> float:
        """Time what comes on top of the backward passes.

        Args:
            m: Number of losses.
            clock: How.

        Returns:
            Seconds, less those of the m weight gradients that are spared.
        """
        return _beyond_rows(self, m, clock)

    def check(self) -> None:
        """See that the inputs are what they were. Autograd does the same before it forms a gradient.

        Raises:
            RuntimeError: They were changed in place.
        """
        _require_unchanged(self.inputs, self.versions)

    def _all_inputs(self) -> Tensor:
        return self.inputs[0] if len(self.inputs) == 1 else torch.cat(self.inputs)


class Convolution(NamedTuple):
    """A convolution in two dimensions, which is a linear layer of the patches of its inputs.

    It pays where there are few places and many channels, as at the end of a deep network. Of each loss, the gradients D
    at the outputs are kept, (N, out), with one row a place of each image.

    Attributes:
        edges: Where autograd hands over the gradients at the outputs.
        params: The weight, (out, in, height, width), and the bias if it is a ghost too.
        places: Their places among the shared parameters.
        inputs: The images, (B, in, …, …).
        version: What they counted of changes in place when the graph was read.
        samples: Number of places in all images, N.
        window: What :func:`torch.nn.functional.unfold` has to know: dilation, padding and stride.
    """

    edges: tuple[GradientEdge, ...]
    params: tuple[Tensor, ...]
    places: tuple[int, ...]
    inputs: Tensor
    version: int
    samples: int
    window: dict[str, tuple[int, ...]]

    def costs(self, m: int) -> tuple[float, float]:
        """Predict what this costs, and what forming the weight gradient of each loss does.

        Args:
            m: Number of losses.

        Returns:
            Both, in multiplications.
        """
        out = self.params[0].shape[0]
        width = self.params[0].numel() // out
        ghost, rows = _costs(self.samples, width, out, m, self.inputs.device)
        # Convolutions differentiate themselves faster than a product of matrices does.
        return ghost + 4 * TRAFFIC * self.samples * width, rows / 2

    def sample(self) -> list[Tensor]:
        """Make up gradients at the outputs.

        Returns:
            Ones, in one tensor.
        """
        return _ones(self.edges, self.params[0])

    def keep(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """What is kept of one loss.

        Args:
            gradients: At the outputs, (B, out, …, …).

        Returns:
            D, (N, out), or None if the loss does not reach the layer.
        """
        (g,) = gradients
        return None if g is None else g.flatten(2).transpose(1, 2).reshape(-1, g.shape[1])

    def products(self, rows: Sequence[Tensor], least: torch.dtype, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """Inner products of the gradients in the parameters; see :meth:`Linear.products`.

        Args:
            rows: What is kept of each loss, m matrices.
            least: Half and single precision are multiplied in this one.
            workspace: Memory for parts of them.

        Returns:
            (m, m), and the sizes of what is added up, (m,); float64.
        """
        return self._unfolded().products(rows, least, workspace)

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """Add up gradients.

        Args:
            rows: What is kept of some losses.
            weights: One a loss.

        Returns:
            New tensors, one per parameter.
        """
        self.check()
        return self._unfolded().combine(rows, weights)

    def beyond_rows(self, m: int, clock: Clock) -> float:
        """Time what comes on top of the backward passes.

        Args:
            m: Number of losses.
            clock: How.

        Returns:
            Seconds, less those of the m weight gradients that are spared.
        """
        return _beyond_rows(self, m, clock)

    def check(self) -> None:
        """See that the inputs are what they were; see :meth:`Linear.check`."""
        _require_unchanged([self.inputs], [self.version])

    def _unfolded(self) -> Linear:
        patches = nn.functional.unfold(self.inputs, self.params[0].shape[2:], **self.window)
        flat = patches.transpose(1, 2).reshape(self.samples, -1)
        return Linear(self.edges, self.params, self.places, (flat,), (version(flat),), flipped=True)


class Embedding(NamedTuple):
    """Rows of a table. Of each loss, the gradients of those that were looked up are kept, (N, width).

    Attributes:
        edges: Where autograd hands over the gradients at the outputs, one per call.
        params: The table.
        places: Its place among the shared parameters.
        counts: Number of indices of each call; N in all.
        groups: For each index, where it is among those without repetition, (N,).
        indices: The indices without repetition, filled up with zeros, (N,).
        scales: What the gradient at each index is multiplied by, (N, 1), float64, or None.
    """

    edges: tuple[GradientEdge, ...]
    params: tuple[Tensor, ...]
    places: tuple[int, ...]
    counts: tuple[int, ...]
    groups: Tensor
    indices: Tensor
    scales: Tensor | None

    def costs(self, m: int) -> tuple[float, float]:
        """Predict what this costs, and what forming the gradient of each loss does.

        Args:
            m: Number of losses.

        Returns:
            Both, in multiplications.
        """
        entry = m * (m + 4 * TRAFFIC) * self.params[0].shape[1]
        return entry * 2 * len(self.indices), entry * len(self.params[0])

    def sample(self) -> list[Tensor]:
        """Make up gradients at the outputs.

        Returns:
            Ones, one tensor per call.
        """
        return _ones(self.edges, self.params[0])

    def keep(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """What is kept of one loss.

        Args:
            gradients: At the outputs of each call, (…, width).

        Returns:
            The gradient in each row of the table that was looked up, (N, width), or None if the loss reaches none.
        """
        width = self.params[0].shape[1]
        flat = _joined([None if g is None else g.reshape(-1, width) for g in gradients], self.counts)
        if flat is None:
            return None
        flat = flat.to(_widest(torch.float32, flat))
        if self.scales is not None:
            flat = flat * self.scales.to(flat.dtype)
        return flat.new_zeros(flat.shape).index_add_(0, self.groups, flat)

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """Add up gradients.

        Args:
            rows: What is kept of some losses.
            weights: One a loss.

        Returns:
            A new tensor, alone in a list.
        """
        mixed = _mixed(rows, weights, rows[0].dtype)
        table = mixed.new_zeros(self.params[0].shape)
        return [_as(table.index_add_(0, self.indices, mixed), self.params[0])]

    def beyond_rows(self, m: int, clock: Clock) -> float:
        """Time what comes on top of the backward passes.

        Args:
            m: Number of losses.
            clock: How.

        Returns:
            Seconds, less those of the m gradients that are spared.
        """
        sample = self.sample()
        kept = self.keep(sample)
        assert kept is not None
        found: list[Row] = [[kept] for _ in range(m)]
        one = clock(lambda: self.combine([kept], [1.0]), kept.device)
        ours = m * clock(lambda: self.keep(sample), kept.device)
        ours += clock(lambda: gram_module.gram(found), kept.device)
        return ours + clock(lambda: self.combine([kept] * m, [0.5] * m), kept.device) - m * one


Layer = Linear | Convolution | Embedding


def calling(device: torch.device) -> float:
    """What calling one operation costs.

    Args:
        device: Where it runs.

    Returns:
        The number of multiplications that take as long.
    """
    return (_CALLS_CPU if device.type == "cpu" else _CALLS_GPU) / _CALLS


def _costs(n: int, width: int, out: int, m: int, device: torch.device) -> tuple[float, float]:
    """Multiplications, or what takes as long, without weight gradients of single losses, and with them."""
    called = _CALLS * calling(device)
    ghost = n * n * width + m * n * n * out + n * width * out + (m + 3 * TRAFFIC) * m * n * out + called
    return ghost, m * n * width * out + (m + 4 * TRAFFIC) * m * width * out


def _beyond_rows(layer: Linear | Convolution, m: int, clock: Clock) -> float:
    kept = layer.keep(layer.sample())
    assert kept is not None
    rows, device = [kept.clone() for _ in range(m)], kept.device
    one = clock(lambda: layer.combine(rows[:1], [1.0]), device)
    ours = clock(lambda: layer.products(rows, torch.float32, Workspace()), device)
    return ours + clock(lambda: layer.combine(rows, [0.5] * m), device) - m * one


def _require_unchanged(inputs: Sequence[Tensor], versions: Sequence[int]) -> None:
    if any(version(a) != before for a, before in zip(inputs, versions, strict=True)):
        raise RuntimeError(
            "The inputs of a layer were changed in place after the losses were computed, so that its gradient is lost. "
            "Change a clone of them."
        )


def _ones(edges: Sequence[GradientEdge], like: Tensor) -> list[Tensor]:
    shapes = [tuple(metadata(edge.node)[edge.output_nr].shape) for edge in edges]
    return [torch.ones(shape, dtype=like.dtype, device=like.device) for shape in shapes]


def _joined(gradients: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Gradients of several calls, one below the other, with zeros for those that are not reached."""
    like = next((g for g in gradients if g is not None), None)
    if like is None or len(gradients) == 1:
        return like
    return torch.cat(
        [like.new_zeros(n, like.shape[1]) if g is None else g for g, n in zip(gradients, counts, strict=True)]
    )


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Σₙ aₙ bₙᵀ of two tensors (n, m, k), float64."""
    m, k = a.shape[1:]
    if k >= m:
        return torch.bmm(a, b.transpose(1, 2)).sum(0, dtype=torch.float64)
    # n products would hold more entries than what is multiplied.
    left, right = (x.transpose(0, 1).reshape(m, -1) for x in (a, b))
    return gram_module.product(left, right)


def _widest(least: torch.dtype, *tensors: Tensor) -> torch.dtype:
    for tensor in tensors:
        if tensor.dtype != least:
            least = torch.promote_types(least, tensor.dtype)
    return least


def _mixed(rows: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    total = rows[0].to(dtype) * weights[0]
    for row, w in zip(rows[1:], weights[1:], strict=True):
        total.add_(row, alpha=w)
    return total


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient with the shape, dtype, device and strides of its parameter."""
    gradient = gradient.reshape(like.shape)
    same = gradient.dtype == like.dtype and gradient.device == like.device and gradient.stride() == like.stride()
    return gradient if same else torch.empty_like(like, requires_grad=False).copy_(gradient)
