"""GLS: descend on the geometric mean of the losses."""

from __future__ import annotations

import numpy as np

from gradsurgery.weighting.base import Weighter


class GeometricMeanWeighter(Weighter):
    """Minimise the geometric mean of the losses.

    The objective is (Π lᵢ)^(1/m), at most their mean; the weights are its derivatives, wᵢ = GM/(m lᵢ). Multiplying a
    loss by c multiplies all of them by c^(1/m) and does not turn the direction, which is that of
    :class:`RealTimeWeighter`. Computed with logarithms, so the product neither overflows nor underflows. Under absent
    tasks it is the mean of the present ones.

    Paper: Chennupati et al., MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning, CVPR workshops 2019, arXiv 1904.08492 (the geometric loss strategy, GLS).

    Args:
        optimizer: The torch optimizer that makes the step.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: A loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 4.0]))
        >>> optimizer = gradsurgery.GeometricMeanWeighter(torch.optim.SGD([w], lr=0.1))
        >>> {k: round(v, 6) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 1.0, 'box': 0.25}
    """

    scale = "paper"

    def weights(self, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "a geometric mean has no gradient at 0")
        logs = np.log(losses)
        return np.exp(np.minimum(logs.mean() - logs, 709.0)) / len(losses)
