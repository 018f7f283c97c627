"""SAND-mask: the AND-mask made smooth, and stricter where the gradients vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.surgery.and_mask import AndMask
from gradsurgery.surgery.base import SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SandMask(AndMask):
    """Keep each coordinate of the mean gradient the more, the more the losses agree on its sign and on its size.

    As :class:`AndMask`, with the mask M = ``max(0, tanh(k (|mean of sign gᵢ| − τ) / v))`` for the variance v of the gᵢ
    over the losses, in each coordinate. One loss alone keeps its gradient. Losses may rise to first order. The order
    of the losses does not matter. Where no coordinate is kept d is zero.

    Pitfall: v has units, those of a squared gradient. It is not homogeneous: where entries are about 1e-3, each
    coordinate is kept whole or not at all, as by the AND-mask. `relative` fixes that.

    Paper: Shahtalebi et al., SAND-mask: An Enhanced Gradient Masking Strategy for the Discovery of Invariances in
    Domain Generalization, 2021, arXiv 2106.02266; the formula, and k = 10, as in DomainBed.

    Departures: τ has no default and is below 1. DomainBed's is 1, with which the mask is 0 everywhere and nothing is
    ever trained. `relative` is an addition. Otherwise those of :class:`AndMask`.

    Args:
        optimizer: The optimizer that makes the step.
        tau: τ, 0 ≤ τ < 1: agreement up to which nothing is kept.
        k: k > 0, how steep the mask is.
        relative: Divide v by the mean square of the entries of all gradients in the tensor. Then it is positively
            homogeneous.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. It has no weights, so those that need them are
            refused, and so are `row_dtype` and `row_device` without `relative`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        >>> gradsurgery.SandMask(torch.optim.SGD([torch.zeros(2)], lr=0.1), tau=0.5, reduction="mean").combine(rows)
        tensor([4., 0.])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        tau: float,
        k: float = 10.0,
        relative: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        # The variance is that of rows without a loss scale, which those are that a method observes.
        self.observes = not relative
        super().__init__(optimizer, tau=tau, **switches)
        if self.tau == 1:
            raise ValueError(
                f"{self._name}: `tau` must be < 1, got {tau!r}: no agreement exceeds 1, so that nothing would ever be "
                "trained. Lower it, or take AndMask(tau=1)."
            )
        self.k = self.check.number("k", k, above=0.0)
        self.relative = self.check.choice("relative", relative, (False, True))
        if not self.relative:
            self.degree = None

    def mask(self, rows: Sequence[Tensor], votes: Tensor, unit: float) -> Tensor:
        excess = (votes.double() / len(rows) - self.tau).clamp(min=0)
        if len(rows) == 1:
            return torch.ones_like(excess)
        # A unit in which nothing overflows, the same for all pieces of a tensor.
        peak = self.over_pieces(torch.stack([g.abs().amax() if g.numel() else g.sum() for g in rows]).amax().double())
        peak = torch.where(peak > 0, peak, 1.0)
        # Equal gradients have differences of 0, and so no variance at all.
        scaled = [g.double() / peak for g in rows]
        apart = [g - scaled[0] for g in scaled[1:]]
        total = torch.stack(apart).sum(dim=0)
        squares = torch.stack(apart).square().sum(dim=0)
        variance = (squares - total.square() / len(rows)).clamp(min=0) / (len(rows) - 1)
        by = self._mean_square(scaled) if self.relative else 1 / (peak * unit).square()
        return torch.where(excess > 0, torch.tanh(self.k * excess * by / variance), 0.0)

    def _mean_square(self, rows: Sequence[Tensor]) -> Tensor:
        entries = torch.stack(list(rows))
        total, count = self.over_pieces(torch.stack([entries.square().sum(), entries.new_tensor(entries.numel())]))
        return total / count
