"""Learning rate annealing for physics-informed networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.gram import Row, length
from gradsurgery.optimizer import Switches
from gradsurgery.weighting.gradient_size import GradientSizeWeighter
from gradsurgery.weighting.recording import ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LRAnnealingWeighter(GradientSizeWeighter):
    """Balance boundary and data losses against the residual loss by the statistics of their gradients.

    With the statistic "max-mean", λ̂ᵢ = ``max |∇l_ref| / mean |∇lᵢ|`` over all elements, and λᵢ ← (1 − a) λᵢ + a λ̂ᵢ
    from 1; the reference loss, usually the residual of the equation, keeps weight 1. With "mean", λ̂ᵢ =
    ``mean |∇l_ref| / mean |∇lᵢ|``, so that no single entry decides. With "norm" there is no reference and
    λ̂ᵢ = Σⱼ nⱼ / nᵢ with the gradient norms n: weighted gradients of equal length; `reduction="mean"` makes that the
    mean norm over the norm, as the authors' JAX code has it. The gradients are those of the unweighted losses, and the
    new weights are used at once. A gradient of 0 leaves the weight as it is.

    Papers: Wang, Teng and Perdikaris, Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed Neural
    Networks, SIAM J. Sci. Comput. 2021, arXiv 2001.04536 (algorithm 1); "mean": the code of PhysicsNeMo Sym, after Jin
    et al., NSFnets, J. Comput. Phys. 2021, arXiv 2003.06496, with a = 0.01; "norm": Wang et al., An Expert's Guide to
    Training Physics-Informed Neural Networks, 2023, arXiv 2308.08468.

    Departures: the authors' first code takes the gradients of the weighted losses, which settles at the square root of
    the ratio, and averages over layers. It keeps 0.9 of the old weight, which is a = 0.1 here, in every tenth step:
    `every=10`. PhysicsNeMo Sym smooths the weight of the reference too, and adds 1e-8 to the mean below.

    A step that updates costs m backward passes and a full one.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where gradients are taken: a parameter, or any iterable of them. None: all parameters that two or
            more losses reach.
        statistic: "max-mean", "mean" or "norm".
        reference: Name of the reference loss of "max-mean" and "mean". None: the first.
        rate: a, the share of the new value, 0 < a ≤ 1.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` holds something that is not a tensor.
        ValueError: An argument is out of range, or no loss has the name `reference`.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.LRAnnealingWeighter(torch.optim.SGD([w], lr=0.1), reference="residual", rate=1.0)
        >>> optimizer.backward({"residual": 3 * w[0] + w[1], "boundary": w.sum()}).weights
        {'residual': 1.0, 'boundary': 3.0}
    """

    scale = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared_params: Tensor | Iterable[Tensor] | None = None,
        statistic: Literal["max-mean", "mean", "norm"] = "max-mean",
        reference: str | None = None,
        rate: float = 0.1,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, shared_params=shared_params, **switches)
        self.statistic = self.check.choice("statistic", statistic, ("max-mean", "mean", "norm"))
        self.reference = reference
        self.rate = self.check.number("rate", rate, above=0.0, most=1.0)
        if reference is not None and self.statistic == "norm":
            raise ValueError(f'{self._name}: `reference` has no meaning with statistic="norm".')

    def measure(self, batch: Batch) -> Tensor | None:
        return self._sizes(batch, length if self.statistic == "norm" else _peak_and_mean)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        weights = self.recall("weights", 1.0)
        if self.statistic == "norm":
            above = below = self.measured
            above = np.full(len(below), above.sum())
            fixed = np.zeros(len(below), dtype=bool)
        else:
            known = self.memory["tasks"]
            reference = known[0] if self.reference is None else self.reference
            if reference not in known:
                raise ValueError(
                    f"{self._name}: `reference` must be the name of a loss, one of {known}, got {reference!r}."
                )
            if reference not in self.names:
                return weights
            peaks, below = self.measured.reshape(-1, 2).T
            own = below if self.statistic == "mean" else peaks
            fixed = np.array([name == reference for name in self.names])
            above = np.full(len(below), own[fixed][0])
        moves = (above > 0) & (below > 0) & ~fixed
        new = ratio(above, np.where(moves, below, 1.0))
        weights = np.where(moves, (1 - self.rate) * weights + self.rate * new, weights)
        self.keep("weights", weights)
        return weights


def _peak_and_mean(row: Row, device: torch.device) -> Tensor:
    """Largest and mean absolute entry of a gradient, over the parameters that the loss reaches."""
    there = [g for g in row if g is not None]
    entries = [g.coalesce().values() if g.is_sparse else g for g in there]
    entries = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in entries]
    count = sum(g.numel() << g.is_complex() for g in there)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in entries:
        total = total + torch.linalg.vector_norm(g, 1, dtype=torch.float64).to(device)
    return torch.stack([rows_module.peak(entries, device), total / max(count, 1)])
