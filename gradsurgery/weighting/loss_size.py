"""Divide each loss by its expected size: at the start, from the labels, or now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import RecordingWeighter, picked, ratio, shared_out

if TYPE_CHECKING:
    from typing_extensions import Unpack


class InitialLossWeighter(RecordingWeighter):
    """Divide each loss by its value at the start of training: all begin at 1.

    wᵢ = 1/Lᵢ(0), where Lᵢ(0) is the mean over the first batches that the task takes part in, or given from theory: log
    K for cross-entropy over K classes (:func:`uniform_prior`), the mean square of the targets for a regression that
    begins near 0. Until enough batches have been seen it is the mean so far. A common recipe without a paper.
    Multiplying a loss by a constant, over the whole run, changes nothing.

    Args:
        optimizer: The torch optimizer that makes the step.
        initial_losses: Lᵢ(0) > 0, by name or in the order of the losses. None: measured.
        batches: Over how many batches they are measured. One batch is noisy.
        normalize: Rescale the weights to a sum of m, which keeps the learning rate meaningful.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive while it is measured.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 50.0]))
        >>> optimizer = gradsurgery.InitialLossWeighter(torch.optim.SGD([w], lr=0.1))
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 0.5, 'box': 0.02}
    """

    scale: Literal["sum", "paper", "priority"] = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        initial_losses: Mapping[str, float] | Sequence[float] | None = None,
        batches: int = 1,
        normalize: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.initial_losses = (
            None if initial_losses is None else self.check.numbers("initial_losses", initial_losses, above=0.0)
        )
        self.stateful = initial_losses is None
        self.batches = self.check.count("batches", batches, least=1)
        self.normalize = bool(normalize)
        if self.normalize:
            self.scale = "sum"

    def _means(self, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of batches measured and their mean, with this one if it counts."""
        count, mean = self.recall("count", 0.0), self.recall("initial_losses", 0.0)
        fresh = count < self.batches
        bad = {name: float(x) for name, x, f in zip(self.names, losses, fresh, strict=True) if f and not x > 0}
        if bad:
            raise ValueError(
                f"{self._name}: every loss must be > 0 while its initial value is measured; got {bad}. "
                "Nothing was written. `initial_losses` takes values from theory instead; or pass None for it in that "
                "batch."
            )
        count = count + fresh
        return count, np.where(fresh, mean + (losses - mean) / count, mean)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        if self.initial_losses is not None:
            initial = np.array(picked(self, "initial_losses", self.initial_losses))
        else:
            initial = self._means(losses)[1]
        weights = ratio(1.0, initial)
        return shared_out(weights / weights.max(), len(weights)) if self.normalize else weights

    def observe(self, losses: np.ndarray) -> None:
        if self.initial_losses is None:
            count, mean = self._means(losses)
            self.keep("count", count)
            self.keep("initial_losses", mean)


class PriorLossWeighter(Weighter):
    """Divide each loss by what a model that knows only the labels' distribution would pay.

    wᵢ = 1/priorᵢ, with the entropy of the labels for cross-entropy (:func:`label_entropy`), their variance for squared
    error (:func:`label_variance`), or log K for K classes (:func:`uniform_prior`). A weighted loss of 1 then means that
    nothing has been learnt. A common recipe without a paper. The prior must be reduced in the way the loss is: the mean
    over elements here.

    Args:
        optimizer: The torch optimizer that makes the step.
        priors: Loss of the prior, > 0, by name or in the order of the losses.
        normalize: Rescale the weights to a sum of m, which keeps the learning rate meaningful.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: A prior is not a positive number, or a loss has none.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> priors = {"class": gradsurgery.label_entropy([10, 10]), "box": gradsurgery.label_variance([1.0, 3.0, 5.0])}
        >>> optimizer = gradsurgery.PriorLossWeighter(torch.optim.SGD([w], lr=0.1), priors)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 1.443, 'box': 0.375}
    """

    scale: Literal["sum", "paper", "priority"] = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        priors: Mapping[str, float] | Sequence[float],
        *,
        normalize: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.priors = self.check.numbers("priors", priors, above=0.0)
        self.normalize = bool(normalize)
        if self.normalize:
            self.scale = "sum"

    def weights(self, losses: np.ndarray) -> np.ndarray:
        weights = ratio(1.0, np.array(picked(self, "priors", self.priors)))
        return shared_out(weights / weights.max(), len(weights)) if self.normalize else weights


class RealTimeWeighter(Weighter):
    """Divide each loss by its own present value: every term is 1 and only its gradient counts.

    wᵢ = 1/lᵢ, so that the gradient is Σ ∇lᵢ / lᵢ = ∇ Σ log lᵢ: that of the logarithm of the geometric mean, times m.
    Multiplying a loss by a constant changes nothing. A common recipe without a paper. As a loss goes to 0 its weight
    grows without bound (`max_weight` bounds it), and the weighted total is always m: watch the raw losses.

    Args:
        optimizer: The torch optimizer that makes the step.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: A loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 50.0]))
        >>> optimizer = gradsurgery.RealTimeWeighter(torch.optim.SGD([w], lr=0.1))
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 0.5, 'box': 0.02}
    """

    scale = "paper"

    def weights(self, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "it is divided by its value")
        return ratio(1.0, losses)


def uniform_prior(classes: int) -> float:
    """Cross-entropy of a uniform guess: log K.

    Args:
        classes: Number of classes K ≥ 2.

    Returns:
        log K, in nats.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(f"uniform_prior: `classes` must be an integer >= 2, got {classes!r}.")
    return math.log(classes)


def label_entropy(counts: Sequence[float] | np.ndarray | Tensor) -> float:
    """Cross-entropy of a guess that knows how frequent each class is: −Σ pₖ log pₖ.

    Args:
        counts: How often each class occurs, (K,), or its probability.

    Returns:
        The entropy in nats, at most log K.

    Raises:
        ValueError: A count is negative or not finite, or fewer than two classes occur.
    """
    values = _array(counts).reshape(-1)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("label_entropy: `counts` must be finite numbers >= 0.")
    if (values > 0).sum() < 2:
        raise ValueError(
            "label_entropy: `counts` must have two classes that occur; with one there is nothing to learn."
        )
    p = values[values > 0] / values.max()
    p = p / p.sum()
    return float(-(p * np.log(p)).sum())


def label_variance(y: Sequence[float] | np.ndarray | Tensor) -> float:
    """Mean squared error of a guess that knows the mean of the targets: the mean of (y − ȳ)².

    Args:
        y: Targets, (N,) or (N, …): the mean is taken over the first dimension, the average over all elements.

    Returns:
        The variance, divided by N and not N − 1.

    Raises:
        ValueError: A target is not finite, or the targets are constant.
    """
    values = _array(y)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("label_variance: `y` must be finite numbers, at least one.")
    variance = float(np.square(values - values.mean(axis=0)).mean())
    if (values == values[:1]).all() or variance == 0:
        raise ValueError("label_variance: `y` must not be constant; there would be nothing to learn.")
    return variance


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.atleast_1d(np.asarray(values, dtype=np.float64))
