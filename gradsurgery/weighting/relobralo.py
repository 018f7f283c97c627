"""ReLoBRaLo: weigh the losses by their recent progress, and look back at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, ratio, shared_out, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReLoBRaLoWeighter(RecordingWeighter):
    """Relative loss balancing with random lookback: more weight to the losses that fell least.

    With λ̂(t, t′) = m softmax(l(t) / (T l(t′))), the weights are λ(t) = α (ρ λ(t−1) + (1 − ρ) λ̂(t, 0)) + (1 − α) λ̂(t,
    t−1), where ρ is 1 with probability `rho` and otherwise 0, which forgets the past and looks back to the first step.
    They begin at 1 and sum to m. Multiplying a loss by a constant, over the whole run, changes nothing.

    Pitfall: with α = ρ = .999 the weights move by a thousandth per step: they need thousands of steps to tell losses
    apart, and stay within some per cent of 1 in shorter runs. Take α = ρ = .9 to .99 there.

    Paper: Bischof and Kraus, Multi-Objective Loss Balancing for Physics-Informed Deep Learning, 2021, arXiv 2110.09813
    (eq. 11). The defaults lie in the range of its experiments: α 0.99 to 0.999, E[ρ] 0.99 to 0.9999; its T goes down to
    1e-5.

    Departure: the authors' training script uses α = 1 in the first step and 0 in the second; here α is the same in all.

    Args:
        optimizer: The torch optimizer that makes the step.
        alpha: α in [0, 1]: how slowly the weights forget.
        rho: E[ρ] in [0, 1]: probability that a step does not look back to the first one.
        temperature: T > 0; large values even the weights out.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.ReLoBRaLoWeighter(torch.optim.SGD([w], lr=0.0), alpha=0.5, rho=1.0)
        >>> for falling in (4.0, 2.0):
        ...     report = optimizer.backward({"class": falling * w[0], "box": w[1]})
        ...     optimizer.step()
        >>> {name: round(weight, 3) for name, weight in report.weights.items()}
        {'class': 0.878, 'box': 1.122}
    """

    if_still = "They move by 1 - alpha a step: take smaller `alpha` and `rho`, such as 0.95, or train for longer."

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        alpha: float = 0.999,
        rho: float = 0.999,
        temperature: float = 1.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.alpha = self.check.number("alpha", alpha, least=0.0, most=1.0)
        self.rho = self.check.number("rho", rho, least=0.0, most=1.0)
        self.temperature = self.check.number("temperature", temperature, above=0.0)

    def _relative(self, losses: np.ndarray, then: np.ndarray) -> np.ndarray:
        return softmax(ratio(ratio(losses, then), np.array(self.temperature)))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        m = len(losses)
        kept = self.recall("weights", 1.0)
        last = shared_out(kept, m)
        if not self.rng().random() < self.rho:
            last = self._relative(losses, self.recall("first", losses))
        recent = self._relative(losses, self.recall("previous", losses))
        weights = self.alpha * last + (1 - self.alpha) * recent
        self.keep("weights", shared_out(weights, kept.sum()))  # what absent tasks have stays theirs
        return weights

    def observe(self, losses: np.ndarray) -> None:
        self.keep("first", self.recall("first", losses))
        self.keep("previous", losses)

    def coefficients(self, losses: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        self.require_positive(losses, "it is compared with its former values")
        return super().coefficients(losses, measured)
