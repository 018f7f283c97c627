"""Gradients of single samples, for analysis: their lengths and inner products, without any of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradsurgery.batch import parameters, samples_of
from gradsurgery.gradients import Refused
from gradsurgery.gradients.per_sample import analysed


def sample_norms(losses: Tensor, params: nn.Module | torch.optim.Optimizer | Iterable[Tensor]) -> Tensor:
    """Lengths of the gradients of all samples, from backward passes over the whole batch.

    They say which samples an update follows most, for sampling by importance or for a look at outliers; a sum of the
    losses with weights ``min(1, c / norm)`` has the gradient of clipped samples. Nothing here is a promise of
    differential privacy. Where each sample uses a layer once, no products of samples are made.

    Args:
        losses: One loss per sample, (m,), loss i depending on sample i only, such as ``reduction="none"`` gives. The
            graph stays, and no ``.grad`` is touched.
        params: The parameters, or a module or an optimizer that has them. Those that are frozen do not count.

    Returns:
        Lengths, (m,), float64, on the device of the losses.

    Raises:
        ValueError: `losses` is no vector with a graph, or there are no parameters.
        RuntimeError: Samples depend on each other, and which operation brings them together; or what else prevents it,
            as with ``backward(losses, per_sample=True)``.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> gradsurgery.sample_norms(x @ w, [w])
        tensor([5., 1.], dtype=torch.float64)
    """
    return _found(losses, params, "sample_norms", products=False).sqrt()


def sample_gram(losses: Tensor, params: nn.Module | torch.optim.Optimizer | Iterable[Tensor]) -> Tensor:
    """Inner products of the gradients of all samples, from backward passes over the whole batch.

    Divided by the lengths they are cosines: which samples pull together, and which against each other.

    Args:
        losses: One loss per sample, (m,), as for :func:`gradsurgery.sample_norms`.
        params: As there.

    Returns:
        Inner products, (m, m), float64, on the device of the losses.

    Raises:
        ValueError: As there.
        RuntimeError: As there.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> gradsurgery.sample_gram(x @ w, [w])
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
    """
    return _found(losses, params, "sample_gram", products=True)


def _found(
    losses: Tensor, params: nn.Module | torch.optim.Optimizer | Iterable[Tensor], name: str, products: bool
) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
        shown = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"{name}: `losses` must be a 1-d tensor with a graph, one loss per sample, got {shown}.")
    if isinstance(params, torch.optim.Optimizer):
        wanted = parameters(params)
    else:
        wanted = list(params.parameters() if isinstance(params, nn.Module) else params)
    wanted = [p for p in wanted if p.requires_grad]
    if not wanted:
        raise ValueError(f"{name}: `params` must have a parameter that requires grad.")
    with torch.enable_grad():
        samples = samples_of(losses.unbind(), automatic=False)
    if isinstance(samples, str):
        raise RuntimeError(f"{name}: {samples}.")
    try:
        return analysed(samples, wanted, torch.ones_like(losses), products)
    except Refused as refused:
        raise RuntimeError(f"{name}: {refused}.") from None
