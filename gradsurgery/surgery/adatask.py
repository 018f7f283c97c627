"""AdaTask: Adam for each loss, and the sum of the steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradsurgery.surgery.per_loss_adam import PerLossAdam

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradsurgery.surgery.base import SurgerySwitches


class AdaTask(PerLossAdam):
    r"""Keep Adam's moments for each loss, and step by the sum of the m steps that Adam would make.

    With the moments mᵢ, vᵢ of the gradient of loss i, each divided by its bias correction, d = Σ m̂ᵢ / (√v̂ᵢ + ε): in
    every entry each loss has a learning rate of its own, set by its own past gradients. It is
    :class:`gradsurgery.MultiAdam` with a sum in place of the mean, and Adam's usual averages. It takes the place of
    Adam: it gets parameters, not an optimizer. A head gets Adam's step; a parameter that all m losses reach may move m
    times as far, so that Adam's learning rate is an upper end to start from. With one loss it is Adam.

    Losses may rise to first order, as they may with Adam. The step does not depend on the size of a loss, up to ε. What
    is said of ``.grad``, absent losses and zeros under :class:`gradsurgery.MultiAdam` holds here too.

    Paper: Yang et al., AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning, AAAI 2023, arXiv
    2211.15055, in the form of the authors' code (``adatask.py``, Adam).

    Departures: in the code a task's weight multiplies its loss, which the division takes out again; here `preference`
    multiplies its term. The code takes `weight_decay` and `amsgrad` and uses neither; here weight decay is decoupled,
    as in AdamW. It takes the learning rate of the last parameter group for all, and averages from the constructor. A
    parameter that two losses reach and the user calls a head has the moments of their sum there, and those of each
    here.

    Args:
        params: Parameters or groups of them, as any torch optimizer takes them. A group may have its own `lr`,
            `betas`, `eps` and `weight_decay`.
        lr: Learning rate, ≥ 0.
        betas: (β₁, β₂), weights of the past in the first and second moments, each in [0, 1).
        eps: ε ≥ 0, in the units of the gradients. Where it is 0, 0 / 0 counts as 0.
        weight_decay: λ ≥ 0: parameters that a loss reaches are multiplied by 1 − lr λ before the step.
        **switches: As for :class:`gradsurgery.MultiAdam`, but that `reduction` is "sum" by default.

    Raises:
        TypeError: `params` is an optimizer or a module, or an argument is not known.
        ValueError: An argument is out of range, or excluded.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.AdaTask([p], lr=0.1)
        >>> report = optimizer.backward([1000 * p[0] ** 2, (p * p).sum()])
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.8000, 1.9000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **switches)
