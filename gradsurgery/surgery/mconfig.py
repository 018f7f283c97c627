"""M-ConFIG: ConFIG on momenta, with one loss per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.config import ConFIG

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradsurgery.surgery.base import SurgerySwitches


class MConFIG(ConFIG):
    """ConFIG on momenta, divided by a second moment as in Adam: one backward pass per step is enough.

    Pass one loss in turn and ``None`` for the others. For the losses that are present mᵢ ← β₁ mᵢ + (1 − β₁) gᵢ; the
    momenta of absent losses stay. Then g = ConFIG(m̂), with every m̂ᵢ corrected by its own count, and with t the number
    of such steps the first moment of a pseudo gradient is g (1 − β₁ᵗ). The gradient that would give it,
    (g (1 − β₁ᵗ) − β₁ g′ (1 − β₁ᵗ⁻¹)) / (1 − β₁) for the last step's g′, feeds the second moment s, and the direction is
    g / (√ŝ + ε).

    The direction has the length of Adam's: use plain SGD inside, without momentum, and Adam's learning rate. Shared
    parameters get zero until every loss has been seen; from then on, those that only one loss has ever reached are
    private, and get its plain gradient. Heads then step by plain SGD at Adam's learning rate, which may be far too
    large when losses are large; ``shared_params=model.parameters()`` gives them the direction, too. ConFIG's guarantees
    hold for the momenta before the division, not for the direction.

    Paper: Liu, Chu & Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025,
    arXiv 2408.11104 (M-ConFIG), and the authors' package ``conflictfree``.

    Departures: ConFIG is found from the Gram matrix, with no shortcut for two rows. A coordinate whose second moment is
    zero gives zero, also for ε = 0.

    Args:
        optimizer: The optimizer that makes the step: plain SGD.
        beta_1: β₁, weight of the past in the momenta, 0 ≤ β₁ < 1.
        beta_2: β₂, weight of the past in the second moment, 0 ≤ β₂ < 1.
        eps: ε ≥ 0, as in Adam. With 0 the direction does not depend on the length of the gradients.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. The direction is not made of this step's gradients,
            so switches that need weights are refused, and so is `normalize`. Until every loss has been seen the report
            has the flag "incomplete".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.MConFIG(torch.optim.SGD([p], lr=0.1))
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     report = optimizer.backward([p[0] ** 2, None] if step % 2 == 0 else [None, (p * p).sum()])
        ...     optimizer.step()
        >>> p.detach()
        tensor([0.9000, 1.9000])
    """

    stateful = True
    degree = None
    observes = True
    moves_unreached = True
    has_weights = False
    scale = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        eps: float = 1e-8,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.beta_1 = self.check.number("beta_1", beta_1, least=0.0, below=1.0)
        self.beta_2 = self.check.number("beta_2", beta_2, least=0.0, below=1.0)
        self.eps = self.check.number("eps", eps, least=0.0)

    def _require_together(self) -> None:
        super()._require_together()
        if self.normalize != "none":
            raise ValueError(f"{self._name}: `normalize` has no effect here: the method works on directions.")

    @property
    def undecided(self) -> bool:
        """Whether some loss has not been seen yet: then it may still reach any parameter."""
        return not {*self.memory.get("count", ()), *self.names}.issuperset(self.all_names)

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        complete = not self.undecided
        self.keep("count", self.recall("count", 0.0) + 1)
        counts = self.memory["count"]
        for name, row in zip(self.names, rows, strict=True):
            for j, m in enumerate(self.row_state("momentum", name, params)):
                past, now = m, row[j]
                if now is not None:
                    now = now * (1 - self.beta_1)
                row[j] = (
                    now if past is None else past * self.beta_1 if now is None else now.add_(past, alpha=self.beta_1)
                )
            self.keep_row("momentum", name, row, params)
        if complete:
            if "updates" not in self.memory:  # what turned out to be private needs no momentum any more
                places = set(map(self.place, params))
                self.memory["momentum"] = {
                    name: {j: m for j, m in kept.items() if j in places}
                    for name, kept in self.memory["momentum"].items()
                }
            self.memory["updates"] = self.memory.get("updates", 0) + 1
            # Copies, which `direct` may fill for one parameter after the other.
            for key in ("pseudo", "second"):
                self.memory[key] = dict(self.memory.get(key, {}))
        order = [*self.names, *(name for name in counts if name not in self.names)]
        return [
            [
                None if m is None else m / (1 - self.beta_1 ** counts[name])
                for m in self.row_state("momentum", name, params)
            ]
            for name in order
        ]

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if self.undecided:
            self.flag("incomplete")
            return np.zeros(len(gram))
        return super().weights(gram, losses)

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        terms = [(g, w / share) for g, w in zip(column, applied, strict=True) if g is not None]
        if not terms:
            return None
        t = self.memory.get("updates", 0)
        g = sum(w * m for m, w in terms)
        assert isinstance(g, Tensor)
        if t == 0:
            return rows_module.combine([g], [1.0], like)
        place, b1, b2 = self.place(like), self.beta_1, self.beta_2
        pseudo, second = self.memory["pseudo"], self.memory["second"]
        moment = g * (1 - b1**t)
        fake = moment / (1 - b1)
        if (last := pseudo.get(place)) is not None:
            fake.sub_(last.to(g.device), alpha=b1 / (1 - b1))
        square = fake.square().mul_(1 - b2)
        if (last := second.get(place)) is not None:
            square.add_(last.to(g.device), alpha=b2)
        pseudo[place], second[place] = moment, square
        root = (square / (1 - b2**t)).sqrt()
        return rows_module.combine([torch.where(root > 0, g / (root + self.eps), 0.0)], [share], like)
