"""SoftAdapt: weigh the losses by how fast they change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, means

if TYPE_CHECKING:
    from typing_extensions import Unpack

Slope = Literal["oldest", "newest"]
# Beyond it a finite difference amplifies the noise of the losses a thousandfold.
_MAX_ORDER = 10


class SoftAdaptWeighter(RecordingWeighter):
    """Give more weight to the losses that rise, or fall least.

    w = softmax(β s), where sᵢ is the slope of loss i over a window of its last values, by a finite difference of order
    `accuracy_order`. β > 0 favours the worst performer, β < 0 the best, 0 none. Weights are 1 until the first update;
    from the next step on those of the update are used, until the one after. Their sum is m (the package's 1e-8 in the
    denominator is kept), so `reduction="mean"` applies the paper's weights. Large losses have large slopes and saturate
    the softmax: this is not invariant to the scale of a loss.

    Pitfall: β has the unit of 1/slope. With β = 0.1 slopes well below 1 per step leave the weights within some per cent
    of 1; losses near 1 that fall over thousands of steps have no effect at all. Take a larger β, or
    :class:`NormalizedSoftAdaptWeighter`. With ``interval="epoch"`` and no :meth:`epoch_end` the weights stay 1; a
    warning says so after 1000 steps.

    Paper: Heydari, Thompson and Mehmood, SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
    Multi-Part Loss Functions, 2019, arXiv 1912.12355.

    The defaults reproduce the `softadapt` package, whose slope is a forward difference at the *oldest* of the points it
    uses: a loss that has just jumped up gets less weight. `slope="newest"` takes the backward difference at the newest.

    Args:
        optimizer: The torch optimizer that makes the step.
        beta: β.
        accuracy_order: Order of the finite difference, which uses order + 1 points. None: all points of the window.
        slope: "oldest" or "newest": the end of the window where the slope is taken.
        window: How many values are kept, at least 2.
        interval: Steps between updates; "epoch" to keep the means of epochs and update at :meth:`epoch_end`. None: as
            many as `window`, so that each value is used once.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.SoftAdaptWeighter(torch.optim.SGD([w], lr=0.1), beta=0.1)
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 1.0, 'box': 1.0}
        >>> falling, rising = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]
        >>> [round(x, 4) for x in gradsurgery.SoftAdaptWeighter.get_component_weights(falling, rising).tolist()]
        [0.4502, 0.5498]
    """

    if_still = "Slopes are small beside 1/beta: raise `beta`, or take NormalizedSoftAdaptWeighter."
    _by_loss = False
    _normalize: Literal["none", "sum", "absolute"] = "none"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta: float = 0.1,
        accuracy_order: int | None = None,
        slope: Slope = "oldest",
        window: int = 5,
        interval: int | Literal["epoch"] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.beta = self.check.number("beta", beta)
        self.window = self.check.count("window", window, least=2)
        if accuracy_order is not None:
            self.check.count("accuracy_order", accuracy_order, least=1)
        order = self.window - 1 if accuracy_order is None else accuracy_order
        if order >= self.window or order > _MAX_ORDER:
            raise ValueError(
                f"{self._name}: `accuracy_order` must be below `window` and at most {_MAX_ORDER}, got {order} "
                f"with a window of {self.window}."
            )
        self.accuracy_order = accuracy_order
        self.slope = self.check.choice("slope", slope, ("oldest", "newest"))
        if isinstance(interval, str):
            self.check.choice("interval", interval, ("epoch",))
        elif interval is not None:
            self.check.count("interval", interval, least=1)
        self.interval: int | str = self.window if interval is None else interval

    def epoch_end(self) -> None:
        """End an epoch: update the weights now.

        With ``interval="epoch"`` the mean of each loss over the epoch enters the window first. The weights stay as they
        are for tasks that have too few values, or none since the last update. Committed memory changes at once; a
        ``backward`` whose ``step`` is still to come counts as part of the epoch if that step is made.
        """
        self._end_epoch()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        return self.held("weights")

    def observe(self, losses: np.ndarray) -> None:
        if self.interval == "epoch":
            self.add_up(losses)
            self.expect_epoch_end("window")
            return
        point = dict(zip(self.names, losses.tolist(), strict=True))
        self.memory.update(self._appended(self.memory, point), seen=self.memory.get("seen", 0) + 1)
        if self.memory["seen"] >= int(self.interval):
            self.memory.update(self._updated(self.memory))

    def roll(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        if self.interval != "epoch":
            return self._updated(memory)
        rolled = {**self._appended(memory, means(memory)), "epoch.sum": {}, "epoch.count": {}}
        return {**rolled, **self._updated({**memory, **rolled})}

    def _appended(self, memory: Mapping[str, Any], point: dict[str, float]) -> dict[str, Any]:
        kept = memory.get("window", {})
        added = {name: [*kept.get(name, []), value][-self.window :] for name, value in point.items()}
        fresh = dict.fromkeys([*memory.get("fresh", []), *point])
        return {"window": {**kept, **added}, "fresh": list(fresh)}

    def _updated(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        needed = 2 if self.accuracy_order is None else self.accuracy_order + 1
        # A task without a new value since the last update keeps its weight: its slope would be of long ago.
        fresh, windows = memory.get("fresh", []), memory.get("window", {})
        ready = {name: windows[name] for name in fresh if len(windows[name]) >= needed}
        if not ready:
            return {"seen": 0, "fresh": []}
        found = _component_weights(
            ready, self.beta, self.accuracy_order, self.slope, self._normalize, self._by_loss, self._name
        )
        kept = memory.get("weights", {})
        left = len(memory["tasks"]) - sum(kept.get(name, 1.0) for name in memory["tasks"] if name not in ready)
        return {"seen": 0, "fresh": [], "weights": {**kept, **dict(zip(ready, (left * found).tolist(), strict=True))}}

    @staticmethod
    def get_component_weights(
        *losses: Sequence[float] | Tensor,
        beta: float = 0.1,
        accuracy_order: int | None = None,
        slope: Slope = "oldest",
    ) -> Tensor:
        """Weights for values that you keep yourself, as the `softadapt` package computes them.

        Args:
            *losses: For each loss its last values, the oldest first.
            beta: β.
            accuracy_order: Order of the finite difference. None: one less than the number of values.
            slope: "oldest" or "newest".

        Returns:
            Weights, (m,), float64, with sum 1.
        """
        return _from_lists(losses, beta, accuracy_order, slope, "none", False, "SoftAdaptWeighter")


class NormalizedSoftAdaptWeighter(SoftAdaptWeighter):
    """SoftAdapt with slopes divided by their sum, which takes away their scale.

    w = softmax(β s / Σⱼ sⱼ). The package, and so the default, divides by the *signed* sum: when the losses fall
    together it is negative and the order is reversed, so the fastest faller gets the most weight.
    `normalize="absolute"` divides by ``Σ |sⱼ|`` and keeps the order of :class:`SoftAdaptWeighter`. Slopes whose sum is
    0 give equal weights.

    Paper: Heydari, Thompson and Mehmood, arXiv 1912.12355 (the normalised variant).

    Args:
        optimizer: The torch optimizer that makes the step.
        normalize: "sum" (as in the package) or "absolute".
        beta: β.
        accuracy_order: Order of the finite difference, which uses order + 1 points. None: all points of the window.
        slope: "oldest" or "newest": the end of the window where the slope is taken.
        window: How many values are kept, at least 2.
        interval: Steps between updates, "epoch", or None, as in :class:`SoftAdaptWeighter`.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> fast, slow = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6]
        >>> weights = gradsurgery.NormalizedSoftAdaptWeighter.get_component_weights
        >>> [round(x, 4) for x in weights(fast, slow, beta=1).tolist()]
        [0.6939, 0.3061]
        >>> [round(x, 4) for x in weights(fast, slow, beta=1, normalize="absolute").tolist()]
        [0.3061, 0.6939]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        normalize: Literal["sum", "absolute"] = "sum",
        beta: float = 0.1,
        accuracy_order: int | None = None,
        slope: Slope = "oldest",
        window: int = 5,
        interval: int | Literal["epoch"] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(
            optimizer,
            beta=beta,
            accuracy_order=accuracy_order,
            slope=slope,
            window=window,
            interval=interval,
            **switches,
        )
        self._normalize = self.check.choice("normalize", normalize, ("sum", "absolute"))

    @staticmethod
    def get_component_weights(
        *losses: Sequence[float] | Tensor,
        beta: float = 0.1,
        accuracy_order: int | None = None,
        slope: Slope = "oldest",
        normalize: Literal["sum", "absolute"] = "sum",
    ) -> Tensor:
        """Weights for values that you keep yourself, as the `softadapt` package computes them.

        Args:
            *losses: For each loss its last values, the oldest first.
            beta: β.
            accuracy_order: Order of the finite difference. None: one less than the number of values.
            slope: "oldest" or "newest".
            normalize: "sum" or "absolute".

        Returns:
            Weights, (m,), float64, with sum 1.
        """
        return _from_lists(losses, beta, accuracy_order, slope, normalize, False, "NormalizedSoftAdaptWeighter")


class LossWeightedSoftAdaptWeighter(SoftAdaptWeighter):
    """SoftAdapt that also favours the losses that are large.

    wᵢ ∝ l̄ᵢ exp(β sᵢ), with the mean l̄ᵢ of the loss over the window. All else as in :class:`SoftAdaptWeighter`.

    Paper: Heydari, Thompson and Mehmood, arXiv 1912.12355 (the loss-weighted variant).

    Departure: the package's 1e-8 in the denominator shrinks with sums below 1, so that tiny losses are weighted well.

    Args:
        optimizer: The torch optimizer that makes the step.
        **switches: The arguments of :class:`SoftAdaptWeighter`.

    Raises:
        ValueError: An argument is out of range, or the mean of a loss is negative.

    Example:
        >>> small, large = [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]
        >>> weights = gradsurgery.LossWeightedSoftAdaptWeighter.get_component_weights(small, large)
        >>> [round(x, 4) for x in weights.tolist()]
        [0.25, 0.75]
    """

    _by_loss = True

    @staticmethod
    def get_component_weights(
        *losses: Sequence[float] | Tensor,
        beta: float = 0.1,
        accuracy_order: int | None = None,
        slope: Slope = "oldest",
    ) -> Tensor:
        """Weights for values that you keep yourself, as the `softadapt` package computes them.

        Args:
            *losses: For each loss its last values, the oldest first; their mean must not be negative.
            beta: β.
            accuracy_order: Order of the finite difference. None: one less than the number of values.
            slope: "oldest" or "newest".

        Returns:
            Weights, (m,), float64, with sum 1.
        """
        return _from_lists(losses, beta, accuracy_order, slope, "none", True, "LossWeightedSoftAdaptWeighter")


def _from_lists(
    losses: Sequence[Sequence[float] | Tensor],
    beta: float,
    order: int | None,
    slope: str,
    normalize: str,
    by_loss: bool,
    owner: str,
) -> Tensor:
    where = f"{owner}.get_component_weights"
    if not losses:
        raise ValueError(f"{where}: `losses` must be one list of values per loss, got none.")
    if slope not in ("oldest", "newest") or normalize not in ("none", "sum", "absolute"):
        raise ValueError(f'{where}: `slope` must be "oldest" or "newest", `normalize` "sum" or "absolute".')
    if not math.isfinite(beta):
        raise ValueError(f"{where}: `beta` must be a finite number, got {beta!r}.")
    histories = {
        str(i): x.detach().to("cpu", torch.float64).reshape(-1).tolist() if isinstance(x, Tensor) else [*map(float, x)]
        for i, x in enumerate(losses)
    }
    return torch.from_numpy(_component_weights(histories, beta, order, slope, normalize, by_loss, where))


def _component_weights(
    histories: Mapping[str, list[float]],
    beta: float,
    order: int | None,
    slope: str,
    normalize: str,
    by_loss: bool,
    where: str,
) -> np.ndarray:
    slopes = np.array([_slope(np.array(v), order, slope, f"{where}: loss {k!r}") for k, v in histories.items()])
    if normalize != "none":
        total = np.abs(slopes).sum() if normalize == "absolute" else slopes.sum()
        rounding = 8 * np.finfo(np.float64).eps * np.abs(slopes).sum()
        slopes = slopes / total if abs(total) > rounding else np.zeros_like(slopes)
    scores = beta * slopes
    powers = np.exp(scores - scores.max())
    # The package shifts by β max s, where its 1e-8 counts; for β < 0 that is not the largest score.
    epsilon = 1e-8 * math.exp(beta * slopes.max() - scores.max())
    if by_loss:
        averages = np.array([np.mean(v) for v in histories.values()])
        bad = {k: float(mean) for k, mean in zip(histories, averages, strict=True) if mean < 0}
        if bad:
            raise ValueError(f"{where}: the mean of every loss must be >= 0, since it is a weight; got {bad}.")
        if not averages.any():
            averages = np.ones_like(averages)
        powers = powers * averages
    total = powers.sum()
    if total == 0:  # the only losses with a mean above 0 are those whose power underflows
        return np.full(len(powers), 1 / len(powers))
    return powers / (total + epsilon * min(1.0, total))


def _slope(values: np.ndarray, order: int | None, end: str, what: str) -> float:
    """Derivative of evenly spaced values at one end of the last order + 1 of them."""
    n = len(values) - 1 if order is None else order
    if len(values) < 2 or n < 1 or n >= len(values) or n > _MAX_ORDER:
        raise ValueError(
            f"{what} has {len(values)} values; a finite difference of order {n} needs {max(n, 1) + 1} of them, and its "
            f"order must be from 1 to {_MAX_ORDER}. Set `accuracy_order`."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has a value that is not finite.")
    # Forward difference of order n: (−1)ᵏ⁺¹ C(n, k)/k at the k-th point after the first, minus their sum at the first,
    # which is subtracted from the points instead: a constant then has slope 0 to the last bit.
    stencil = np.array([(-1) ** (k + 1) * math.comb(n, k) / k for k in range(1, n + 1)])
    points = values[-n - 1 :] if end == "oldest" else values[: -n - 2 : -1]
    slope = float(stencil @ (points[1:] - points[0]))
    return slope if end == "oldest" else -slope
