"""PCGrad: project conflicting gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.losses import Losses
from gradsurgery.report import Report
from gradsurgery.surgery.base import Surgery, SurgerySwitches
from gradsurgery.weighting.base import Weighter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PCGrad(Surgery):
    """Project each gradient onto the normal plane of every gradient it conflicts with, and add up what is left.

    Task i starts with p = gᵢ and meets the others, j ≠ i, in random order. Where ⟨p, gⱼ⟩ < 0 it takes
    p ← p − ⟨p, gⱼ⟩ / ‖gⱼ‖² · gⱼ, with the original gⱼ. The direction is the sum of the p.

    Without conflict the result is the gradient of the plain sum. With two tasks no loss rises to first order; with
    three or more that is *not* guaranteed. It is positively homogeneous, and its distribution does not depend on the
    order of the tasks. Rows keep their lengths: the longest dominates.

    Paper: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782, algorithm 1. As in the
    paper, and unlike several public implementations, a task never meets itself.

    Args:
        optimizer: The optimizer that makes the step.
        reduction: "sum" as in the paper; "mean" divides everything by the number of tasks.
        shuffle: Draw the order anew for every task and step. ``False``: the order of the losses.
        streaming: An approximation that holds two gradients instead of m: s, the sum so far, and g, the gradient of
            the next loss, are projected off each other as two tasks of algorithm 1, and added to the new s. One order
            of the losses is drawn for a step. It is PCGrad for m = 2, and the plain sum where no loss conflicts with
            the sum of those before it; in the paper every pair of losses meets. So for m ≥ 3 losses that conflict with
            each other but not with a sum are left as they are, and the first losses in the order are projected more
            often. What still holds for the direction before `reduction`: its inner products with the gradient of the
            last loss in the order and with the sum before that are not negative, and it is no longer than the sum of
            the gradient norms. Weights are ≥ 1. A parameter counts as shared if the graph says that two losses may
            reach it. The report has weights and norms, and no inner products. It costs one transfer to the host per
            loss. `preference`, `nonfinite`, `warmup`, `shared_params` and gradient scalers work; switches that need
            rows, or change weights afterwards, weighters inside, micro-batches and several processes are refused. At
            `features` there are rows, which get the same weights.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
        >>> gradsurgery.PCGrad(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([-2.2812,  5.9881])
    """

    descends = 2

    def __init__(  # type: ignore[misc]  # `reduction` may be given by position here
        self,
        optimizer: Optimizer,
        reduction: Literal["sum", "mean"] = "sum",
        *,
        shuffle: bool = True,
        streaming: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, reduction=reduction, **switches)
        self.shuffle = bool(shuffle)
        self.streaming = bool(streaming)
        self._require_together()

    def _require_together(self) -> None:
        super()._require_together()
        if self.streaming:
            self._refuse_what_needs_rows()

    def _refuse_what_needs_rows(self) -> None:
        usual = {
            "every": 1,
            "weight_momentum": 0.0,
            "min_weight": -math.inf,
            "max_weight": math.inf,
            "normalize": "none",
            "log_losses": False,
            "granularity": "all",
            "row_dtype": None,
            "row_device": None,
            "engine": "auto",
            "distributed": False,
        }
        for switch, value in usual.items():
            if getattr(self, switch) != value:
                given = "" if switch == "distributed" else f"={getattr(self, switch)!r}"
                named = "`distributed` or `process_group`" if switch == "distributed" else f"`{switch}`{given}"
                raise ValueError(
                    f"{self._name}: streaming=True excludes {named}: a gradient is projected and added before the next "
                    "one is known, and none is kept. Leave out one of the two."
                )
        if isinstance(self.base, Weighter):
            raise ValueError(
                f"{self._name}: streaming=True excludes a weighter inside ({type(self.base).__name__}). Wrap the torch "
                "optimizer; `preference` takes constant weights."
            )

    def _require_possible(self, accumulates: bool, exchanges: bool) -> None:
        super()._require_possible(accumulates, exchanges)
        if self.streaming and (accumulates or exchanges):
            what = "accumulate=True" if accumulates else "parameters that are spread over processes"
            raise ValueError(
                f"{self._name}.backward: streaming=True excludes {what}: the gradient of each loss must be there as a "
                "whole when its turn comes, and none is kept. Leave out one of the two."
            )

    def visiting_order(self) -> list[int]:
        """In which order the losses come, if `streaming`.

        Returns:
            A permutation of the present tasks.
        """
        m = len(self.names)
        # Of two, either order gives the same.
        return self.rng().permutation(m).tolist() if self.shuffle and m > 2 else list(range(m))

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if self.streaming:
            return geometry.streaming_pcgrad(gram, self.visiting_order(), noise=self.noise)
        mixing = geometry.pcgrad_mixing(gram, self.visiting_orders(self.shuffle))
        self.count_projections(mixing)
        return mixing.sum(axis=0)

    def pc_backward(self, losses: Losses) -> Report:
        """The name that other implementations give to ``backward``.

        Args:
            losses: As for ``backward``.

        Returns:
            As ``backward``.
        """
        return self.backward(losses)
