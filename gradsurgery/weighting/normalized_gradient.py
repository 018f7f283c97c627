"""Give the gradients of all losses the same length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch
from gradsurgery.gradients.gram import length
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

    With ``backward(losses, features=z)`` and `decay` it is the balancer of audio codecs (EnCodec, Défossez et al.,
    2022, arXiv 2210.13438), whose importance of each loss is `preference`. α is from Chen et al., GradNorm, ICML 2018,
    arXiv 1711.02257; α = 0 is a common recipe without a paper.

    A step costs m backward passes down to where the norms are taken, and a full one.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where norms are taken: a parameter, or any iterable of them. None: all parameters that two or
            more losses reach. The last shared layer makes it cheap.
        alpha: α ≥ 0: how much longer the gradients of losses that lag behind are made.
        length: The common length c: "mean", "max", "min" or "geometric" mean of the norms that are not 0, or "unit": 1.
        decay: Smoothing of the norms, 0 ≤ decay < 1: exponential averages without bias. Codecs use 0.999.
        initial_losses: lᵢ(0) > 0, by name or in the order of the losses. None: the first values. Used if α > 0.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` holds something that is not a tensor.
        ValueError: An argument is out of range; where α > 0, a loss is negative, or is 0 the first time.

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
        decay: float = 0.0,
        initial_losses: Mapping[str, float] | Sequence[float] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, shared_params=shared_params, **switches)
        self.alpha = self.check.number("alpha", alpha, least=0.0)
        self.length = self.check.choice("length", length, ("mean", "max", "min", "geometric", "unit"))
        self.decay = self.check.number("decay", decay, least=0.0, below=1.0)
        self.initial_losses = (
            None if initial_losses is None else self.check.numbers("initial_losses", initial_losses, above=0.0)
        )
        self.stateful = self.decay > 0 or (self.alpha > 0 and self.initial_losses is None)
        if self.length == "unit":
            self.scale = "paper"

    def measure(self, batch: Batch) -> Tensor | None:
        return self._sizes(batch, length)

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
        some = norms[there]
        common = {
            "mean": some.mean(),
            "max": some.max(),
            "min": some.min(),
            "geometric": np.exp(np.log(some).mean()),
            "unit": 1.0,
        }[self.length]
        weights = np.where(there, ratio(common, np.where(there, norms, 1.0)), 0.0)
        if self.alpha:
            weights = weights * training_rates(self, losses, self.initial_losses)[1] ** self.alpha
        return weights

    def observe(self, losses: np.ndarray) -> None:
        if self.alpha and self.initial_losses is None:
            self.keep("initial_losses", self.recall("initial_losses", losses))
