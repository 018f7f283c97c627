"""What the scalarisations with a preference vector have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import picked

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PreferenceWeighter(Weighter):
    """Base of the scalarisations: `preference` is a part of the formula and does not multiply the weights.

    Args:
        optimizer: The torch optimizer that makes the step.
        reference: The ideal losses z, one number or by name or in the order of the losses.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.
    """

    scale = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        reference: float | Mapping[str, float] | Sequence[float] = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.reference = self.check.one_or_each("reference", reference)

    def preferences(self) -> np.ndarray:
        # The base class multiplies the weights by these.
        return np.ones(len(self.names))

    def vector(self) -> np.ndarray:
        """The preference vector.

        Returns:
            (m,); 1/m each if none was given. As given otherwise, also where tasks are absent.
        """
        m = len(self.names)
        return np.full(m, 1.0 / m) if self.preference is None else super().preferences()

    def above(self, losses: np.ndarray) -> np.ndarray:
        """How far the losses are above the reference.

        Args:
            losses: Values of the present losses, (m,).

        Returns:
            l − z, (m,).
        """
        z = self.reference
        return losses - (np.array(picked(self, "reference", z)) if isinstance(z, dict) else z)
