"""MultiAdam: Adam for each loss, and the mean of the steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradsurgery.surgery.per_loss_adam import PerLossAdam

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradsurgery.surgery.base import SurgerySwitches


class MultiAdam(PerLossAdam):
    r"""Keep Adam's moments for each loss, and step by the mean of the m steps that Adam would make.

    With the moments mᵢ, vᵢ of the gradient of loss i, each divided by its bias correction, d = (1/m) Σ m̂ᵢ / (√v̂ᵢ + ε).
    Every term has entries around ±1, so that the step does not depend on the size of a loss, up to ε, and no loss
    drowns another one in any entry. It takes the place of Adam: it gets parameters, not an optimizer, and Adam's
    learning rate. With one loss it is Adam.

    Heads have these moments too. A loss that only some parameters see moves them by 1/m of Adam's step. Losses may rise
    to first order, as they may with Adam. Gradients of zero let the momentum run on, as in Adam; a loss that is absent
    (None) leaves its moments alone and adds nothing, and m counts those that are present.

    ``.grad`` holds the direction between ``backward`` and ``step``, not a gradient: to clip it bounds the step. What
    else is added to ``.grad`` is stepped along as by plain SGD.

    Paper: Yao, Su, Hao, Liu, Su & Zhu, MultiAdam: Parameter-wise Scale-invariant Optimizer for Multiscale Training of
    Physics-informed Neural Networks, ICML 2023, arXiv 2306.02816, with defaults and averages of the authors' code
    (PINNacle, ``src/optimizer/multiadam.py``).

    Departures: the code adds an L2 penalty to the gradient of each loss, and so m times over; here weight decay is
    decoupled, as in AdamW. The code takes the learning rate from a scheduler of its own, so that torch's do nothing,
    knows one parameter group only, and starts its moments afresh after ``load_state_dict``. Its bias corrections count
    steps, not gradients. Losses are grouped by adding them up before. Its averages of the summed step
    (``agg_momentum``), off by default, are not here.

    Args:
        params: Parameters or groups of them, as any torch optimizer takes them. A group may have its own `lr`,
            `betas`, `eps` and `weight_decay`.
        lr: Learning rate, ≥ 0.
        betas: (β₁, β₂), weights of the past in the first and second moments, each in [0, 1).
        eps: ε ≥ 0, in the units of the gradients. Where it is 0, 0 / 0 counts as 0.
        weight_decay: λ ≥ 0: parameters that a loss reaches are multiplied by 1 − lr λ before the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `reduction` is "mean" by default, and "sum" leaves
            the 1/m out. `preference` multiplies the terms of the direction, not the gradients. What has no meaning
            where each entry has moments of its own is refused: `every`, `warmup`, `normalize`, `granularity`,
            `shared_params`, and bounds or averages of weights.

    Raises:
        TypeError: `params` is an optimizer or a module, or an argument is not known.
        ValueError: An argument is out of range, or excluded.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.MultiAdam([p], lr=0.1)
        >>> report = optimizer.backward([1000 * p[0] ** 2, (p * p).sum()])
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.9000, 1.9500])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.99, 0.99),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        switches.setdefault("reduction", "mean")
        super().__init__(params, lr, betas, eps, weight_decay, **switches)
