"""GradNorm: balance the lengths of the gradients by the training rates of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch
from gradsurgery.gradients.gram import length
from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.gradient_size import training_rates
from gradsurgery.weighting.recording import ratio, shared_out

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradNormWeighter(Weighter):
    """Learn weights that keep the weighted gradient norms in proportion to how far each loss lags behind.

    With Gᵢ = wᵢ ‖∇lᵢ‖ at `shared_params`, relative inverse training rates rᵢ = (lᵢ/lᵢ(0)) / meanⱼ (lⱼ/lⱼ(0)) and
    targets Ḡ rᵢ^α held constant, one step is made on ``Σ |Gᵢ − Ḡ rᵢ^α|`` after each step of the model (eq. 1 and 2,
    algorithm 1). Its gradient in wᵢ is sign(Gᵢ − Ḡ rᵢ^α) ‖∇lᵢ‖, so no second-order graph is built. A loss that lags
    (rᵢ > 1) gets more weight. The weights stay positive and sum to m; they start at 1, unless `start` says otherwise.

    A step costs m short backward passes, down to `shared_params` only, and one full one. The last shared layer, as in
    the paper, makes the short passes cheap; all shared parameters would make them full ones.

    Paper: Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks, ICML
    2018, arXiv 1711.02257.

    Departures: the weights' own optimizer is Adam, which is invariant to gradient norms; "sgd" with lr 0.025
    is the paper's form. No step takes away more than half of a weight, so that small ones stay positive and come back.
    With absent tasks the present ones share their usual total, and only they learn. A loss of 0 has the rate 0, and for
    α > 0 the target 0; if all are 0 their rates are equal. `start` other than "ones" is not in the paper: its algorithm
    then runs on losses divided by constants, and the weights used are its own over these constants, with sum m.

    Pitfall: weights move slowly, by at most `lr` per step. With losses or gradients a hundredfold apart the model is
    trained on the dominant loss alone until they have moved, and Adam's second moment remembers those gradients for
    thousands of steps more: start="losses" with a small `alpha` (0.12) is the form to begin with.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where the norms are measured: a parameter, any iterable of them, or a module, all counted; read
            once.
            Usually the weight of the last shared layer.
        alpha: Strength of the pull towards equal training rates, α ≥ 0. 0 equalises the norms; the paper uses 0.12 to
            1.5.
        lr: Step size of the weights' optimizer.
        initial_losses: lᵢ(0) > 0. ``None`` or "first": the values of each loss in the first committed step it takes
            part in. Or given, by name or in order: log K for cross-entropy over K classes, for example.
        weight_optimizer: "adam" or "sgd".
        schedule: Multiplies `lr`: called with the number of committed steps. It is not saved in checkpoints.
        start: What each loss is divided by beforehand: "ones": nothing, so that the weights start at 1, as in the
            paper; "losses": its initial loss lᵢ(0); "norms": the norm of its gradient at `shared_params` in the first
            step it takes part in.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` holds something that is not a tensor.
        ValueError: An argument is out of range, a loss is negative, or it is 0 where it has no initial value yet.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD([w], lr=0.1), shared_params=w)
        >>> optimizer.backward({"small": (w - 2).square().sum(), "large": (100 * (w - 2)).square().sum()}).weights
        {'small': 1.0, 'large': 1.0}
    """

    stateful = True

    def __init__(
        self,
        optimizer: Optimizer,
        shared_params: Tensor | Iterable[Tensor] | torch.nn.Module,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        initial_losses: Mapping[str, float] | Sequence[float] | Literal["first"] | None = None,
        weight_optimizer: Literal["adam", "sgd"] = "adam",
        schedule: Callable[[int], float] | None = None,
        start: Literal["ones", "losses", "norms"] = "ones",
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.shared_params = self.check.params(shared_params)
        self.alpha = self.check.number("alpha", alpha, least=0.0)
        self.lr = self.check.number("lr", lr, above=0.0)
        self.weight_optimizer = self.check.choice("weight_optimizer", weight_optimizer, ("adam", "sgd"))
        self.schedule = schedule
        self.start = self.check.choice("start", start, ("ones", "losses", "norms"))
        first = initial_losses is None or (isinstance(initial_losses, str) and initial_losses == "first")
        given: Any = initial_losses
        self.initial_losses = None if first else self.check.numbers("initial_losses", given, above=0.0)

    def measure(self, batch: Batch) -> Tensor | None:
        # Gradient norms at `shared_params`, (m,).
        if self.phase != "solve":
            return None
        device, scale = batch.values.device, batch.loss_scale.to(torch.float64)
        return torch.stack([length(row, device) for row in batch.rows_at(self.shared_params)]) / scale

    def weights(self, losses: np.ndarray) -> np.ndarray:
        weights = self.recall("weights", 1.0)
        total = weights.sum()
        first, rates = training_rates(self, losses, self.initial_losses)
        self.keep("initial_losses", first)
        units = self._units(first)
        norms = ratio(self.measured, units)

        lengths = weights * norms
        target = lengths.mean() * rates**self.alpha
        factor = 1.0 if self.schedule is None else float(self.schedule(self.memory["step"]))
        moved = self.descend(
            "weights", weights, np.sign(lengths - target) * norms, self.lr * factor, self.weight_optimizer
        )
        moved = np.maximum(moved, weights / 2)
        self.keep("weights", moved * (total / moved.sum()))
        return shared_out(weights * (units.min() / units), len(weights))

    def _units(self, first: np.ndarray) -> np.ndarray:
        """What each loss is divided by, (m,): all that follows is the paper's, on the quotients."""
        if self.start == "ones":
            return np.ones(len(first))
        if self.start == "losses":
            return first
        # A loss whose gradient has been 0 so far waits for its unit; until then any will do.
        found = self.recall("first_norms", self.measured)
        self.keep("first_norms", np.where(found > 0, found, self.measured))
        found = self.recall("first_norms", 0.0)
        there = found > 0
        return np.where(there, found, found[there].mean() if there.any() else 1.0)
