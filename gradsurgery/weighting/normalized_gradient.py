"""Give the gradients of all losses the same length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch
from gradsurgery.gradients.gram import Row, length
from gradsurgery.optimizer import Switches
from gradsurgery.weighting.gradient_size import GradientSizeWeighter, training_rates
from gradsurgery.weighting.recording import ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NormalizedGradientWeighter(GradientSizeWeighter):
    """Scale each loss so that all gradients have the same length: GradNorm's target, reached at once.

    wᵢ = c rᵢ^α / nᵢ, with the gradient norms nᵢ at `shared_params` (or at `features`), a common length c made from
    them, and GradNorm's relative inverse training rates rᵢ = (lᵢ/lᵢ(0)) / meanⱼ (lⱼ/lⱼ(0)). With α = 0, the default,
    every weighted gradient has length c: multiplying a loss by a constant does not turn the direction, and scaling all
    losses scales the step. A loss whose gradient is 0 has weight 0. Tiny, noisy gradients are blown up to full length.
    Not a common-descent method.

    With ``backward(losses, features=z)``, ``norm="item"``, ``total=1.0``, ``decay=0.999`` it is the balancer of audio
    codecs (EnCodec, Défossez et al., 2022, arXiv 2210.13438; the authors' code adds 1e-12 to each norm), whose
    importance of each loss is `preference`: nᵢ is then the mean, over the batch, of the norm of the gradient at each
    item, and the weighted gradients have lengths that add up to `total`. α is from Chen et al., GradNorm, ICML 2018,
    arXiv 1711.02257; α = 0 is a common recipe without a paper.

    A step costs m backward passes down to where the norms are taken, and a full one.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where norms are taken: a parameter, or any iterable of them. None: all parameters that two or
            more losses reach. The last shared layer makes it cheap.
        alpha: α ≥ 0: how much longer the gradients of losses that lag behind are made.
        length: The common length c: "mean", "max", "min" or "geometric" mean of the norms that are not 0, or "unit": 1.
        norm: "all": of the gradient as a whole. "item": the mean over the first dimension of `features` of the norms of
            its items, which does not shrink with the batch size. It needs `features`.
        total: The lengths of all weighted gradients together, > 0, divided among the present losses in proportion to
            `preference`; in place of `length`. None: c decides.
        decay: Smoothing of the norms, 0 ≤ decay < 1: exponential averages without bias. Codecs use 0.999.
        initial_losses: lᵢ(0) > 0, by name or in the order of the losses. None: the first values. Used if α > 0.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` holds something that is not a tensor.
        ValueError: An argument is out of range, `total` and `length` are both given, or ``norm="item"`` finds no items;
            where α > 0, a loss is negative, or is 0 the first time.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.NormalizedGradientWeighter(torch.optim.SGD([w], lr=0.1), shared_params=w)
        >>> optimizer.backward({"class": w[0], "box": 9 * w[1]}).weights
        {'class': 5.0, 'box': 0.5555555555555556}
        >>> w.grad
        tensor([5., 5.])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared_params: Tensor | Iterable[Tensor] | None = None,
        alpha: float = 0.0,
        length: Literal["mean", "max", "min", "geometric", "unit"] = "mean",
        norm: Literal["all", "item"] = "all",
        total: float | None = None,
        decay: float = 0.0,
        initial_losses: Mapping[str, float] | Sequence[float] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, shared_params=shared_params, **switches)
        self.alpha = self.check.number("alpha", alpha, least=0.0)
        self.length = self.check.choice("length", length, ("mean", "max", "min", "geometric", "unit"))
        self.norm = self.check.choice("norm", norm, ("all", "item"))
        self.total = None if total is None else self.check.number("total", total, above=0.0)
        if self.total is not None and self.length != "mean":
            raise ValueError(f"{self._name}: `total` takes the place of `length`={length!r}. Leave out one of the two.")
        if self.norm == "item" and shared_params is not None:
            raise ValueError(
                f'{self._name}: norm="item" measures at the items of `features`, so that `shared_params` has no '
                "effect. Leave it out."
            )
        self.decay = self.check.number("decay", decay, least=0.0, below=1.0)
        self.initial_losses = (
            None if initial_losses is None else self.check.numbers("initial_losses", initial_losses, above=0.0)
        )
        self.stateful = self.decay > 0 or (self.alpha > 0 and self.initial_losses is None)
        if self.length == "unit" or self.total is not None:
            self.scale = "paper"

    def measure(self, batch: Batch) -> Tensor | None:
        if self.norm == "all":
            return self._sizes(batch, length)
        if self.phase == "solve" and (not batch.features or len({z.shape[:1] for z in batch.features}) > 1):
            raise ValueError(
                f'{self._name}.backward: norm="item" needs `features` whose first dimensions are the batch, and equal; '
                f"got {[tuple(z.shape) for z in batch.features] or 'none'}."
            )
        if any(z.dim() == 0 for z in batch.features):
            raise ValueError(
                f'{self._name}.backward: norm="item" needs `features` whose first dimension is the batch, got a tensor '
                "of shape ()."
            )
        return self._sizes(batch, partial(_mean_of_items, count=len(batch.features)))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        norms = self.measured
        if self.decay:
            total = self.decay * self.recall("norms.sum", 0.0) + norms
            count = self.decay * self.recall("norms.count", 0.0) + 1
            self.keep("norms.sum", total)
            self.keep("norms.count", count)
            norms = total / count
        there = norms > 0
        if not there.any():
            return np.zeros(len(losses))
        common = self._common(norms[there]) if self.total is None else self.total / self.preferences().sum()
        weights = np.where(there, ratio(common, np.where(there, norms, 1.0)), 0.0)
        if self.alpha:
            weights = weights * training_rates(self, losses, self.initial_losses)[1] ** self.alpha
        return weights

    def _common(self, norms: np.ndarray) -> float:
        """The common length of gradients, from those that are not 0."""
        lengths = {
            "mean": norms.mean(),
            "max": norms.max(),
            "min": norms.min(),
            "geometric": np.exp(np.log(norms).mean()),
            "unit": 1.0,
        }
        return float(lengths[self.length])

    def observe(self, losses: np.ndarray) -> None:
        if self.alpha and self.initial_losses is None:
            self.keep("initial_losses", self.recall("initial_losses", losses))


def _mean_of_items(row: Row, device: torch.device, count: int) -> Tensor:
    """The mean length of a gradient at one item of a batch, over several features and the parts of all processes."""
    lengths = []
    for start in range(0, len(row), count):
        there = [g for g in row[start : start + count] if g is not None]
        parts = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in there]
        norms = [torch.linalg.vector_norm(g[:, None].flatten(1), dim=1, dtype=torch.float64).to(device) for g in parts]
        if norms:
            lengths.append(torch.linalg.vector_norm(torch.stack(norms), dim=0))
    items = torch.cat(lengths) if lengths else torch.zeros(1, dtype=torch.float64, device=device)
    return items.mean() if len(items) else items.sum()
