"""MTAdam: gradients brought to the length of the first one, Adam for each, and one denominator for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.gradients import moments
from gradsurgery.gradients.rows import Row
from gradsurgery.surgery.per_loss_adam import PerLossAdam

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradsurgery.surgery.base import SurgerySwitches


class MTAdam(PerLossAdam):
    r"""Bring all gradients in a tensor to the usual length of the first one, and step by Adam with one denominator.

    In each parameter tensor Nᵢ ← β₃ Nᵢ + (1 − β₃) ‖gᵢ‖, which begins as ‖gᵢ‖, and gᵢ is replaced by
    rᵢ (N_a / Nᵢ) gᵢ. The anchor a is the first loss with N_a > 0 there; the ranks rᵢ are `preference`, 1 by default.
    With Adam's moments of these, d = Σ m̂ᵢ / maxⱼ (√v̂ⱼ + ε): the losses keep their ranks after the division too, which
    separate denominators would undo. It takes the place of Adam: it gets parameters, not an optimizer, and with m equal
    gradients d is m times Adam's. With one loss it is Adam.

    Heads have these moments too. Multiplying a loss other than the anchor by a constant does not change the step, up to
    ε. The order of the losses matters, by the anchor: it is the order of the first call. Losses may rise to first
    order. The maximum is over the losses that are present; the anchor keeps its place, and its length, where it is
    absent. What is said of ``.grad`` and of zeros under :class:`gradsurgery.MultiAdam` holds here too.

    Paper: Malkiel & Wolf, MTAdam: Automatic Balancing of Multiple Training Loss Terms, EMNLP 2021, arXiv 2006.14683, as
    the authors' code computes it (``mtadam.py``).

    Departures: in the code a loss that does not reach a tensor has a length there that decays from 1, and gradients are
    brought to it if that loss comes first; here the anchor is the first loss that reaches the tensor. The code stops at
    the first parameter without a gradient and leaves out the rest of its group, loses the lengths on resume, and holds
    lengths below 1e-10 for zero. Its L2 penalty enters the moments of each loss; here weight decay is decoupled, as in
    AdamW.

    Args:
        params: Parameters or groups of them, as any torch optimizer takes them. A group may have its own `lr`,
            `betas`, `eps` and `weight_decay`.
        lr: Learning rate, ≥ 0.
        betas: (β₁, β₂, β₃), weights of the past in the first and second moments and in the lengths, each in [0, 1).
        eps: ε ≥ 0, in the units of the anchor's gradients. Where it is 0, 0 / 0 counts as 0.
        weight_decay: λ ≥ 0: parameters that a loss reaches are multiplied by 1 − lr λ before the step.
        **switches: As for :class:`gradsurgery.MultiAdam`, but that `reduction` is "sum" by default, and `preference`
            has the ranks.

    Raises:
        TypeError: `params` is an optimizer or a module, or an argument is not known.
        ValueError: An argument is out of range, or excluded.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.MTAdam([p], lr=0.1, preference={"a": 1.0, "b": 0.5})
        >>> report = optimizer.backward({"a": (p * p).sum(), "b": 1000 * (p * p).sum()})
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.8500, 1.8500])
    """

    betas_wanted = 3
    preference_scales_rows = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **switches)
        self.check.by_order = True  # the anchor is the first loss of the first call

    def prepared(self, rows: list[Row], lengths: Sequence[Row], params: Sequence[Tensor]) -> list[Row]:
        for name, own in zip(self.names, lengths, strict=True):
            self._keep_lengths(name, own, params)
        usual = self._usual_lengths(params)
        # The first positive length of each column; argmax takes the first of equal entries. What is out of range is
        # told of elsewhere, under the name of its loss.
        usual = torch.where(usual.isfinite(), usual, 0.0)
        anchors = usual.gather(0, (usual > 0).byte().argmax(dim=0, keepdim=True))
        ranks = [1.0] * len(rows) if self.preference is None else self.each("preference", self.preference)
        found = []
        for name, row, rank in zip(self.names, rows, ranks, strict=True):
            mine = usual[self.order.index(name)]
            found.append(moments.scaled(row, torch.where(mine > 0, rank * anchors[0] / mine, rank).unbind()))
        return found

    def divisors(self, roots: list[Row]) -> list[Row]:
        return [moments.largest(roots)] * len(roots)

    def _keep_lengths(self, name: str, lengths: Row, params: Sequence[Tensor]) -> None:
        """Go on with the average lengths of one loss."""
        before = self.row_state("exp_norm", name, params)
        here = [j for j, n in enumerate(lengths) if n is not None]
        now = [n for n in lengths if n is not None]
        if not here:
            return
        betas = [float(self.group(params[j])["betas"][2]) for j in here]
        past = [n if (m := before[j]) is None else m for j, n in zip(here, now, strict=True)]
        for j, n in zip(here, moments.mixtures(past, now, betas), strict=True):
            before[j] = n
        self.keep_row("exp_norm", name, before, params)

    def _usual_lengths(self, params: Sequence[Tensor]) -> Tensor:
        """Average lengths of all losses, in the order of the first call; 0 where one is not known, (m, P)."""
        known = [self.row_state("exp_norm", name, params) for name in self.order]
        device = next(n.device for row in known for n in row if n is not None)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(
            [torch.stack([zero if n is None else n.to(device, torch.float64) for n in row]) for row in known]
        )
