"""What the weighters that look at the size of the gradients have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.batch import Batch, Layout, parameters
from gradsurgery.gradients.gram import Row
from gradsurgery.optimizer import Switches
from gradsurgery.sharing import Habits, Sharing
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import RecordingWeighter, picked, ratio, require_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradientSizeWeighter(RecordingWeighter):
    """Base of the weighters that look at the size of each gradient.

    Args:
        optimizer: The torch optimizer that makes the step.
        shared_params: Where gradients are measured: a parameter, or any iterable of them. None: all parameters that two
            or more losses reach. Where the graph does not tell which these are, gradients that are there and not zero
            do, as in a surgery.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        TypeError: `shared_params` is empty or holds something that is not a tensor.
    """

    uses_features = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared_params: Tensor | Iterable[Tensor] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.shared_params: list[Tensor] | None = None
        if shared_params is not None:
            self.shared_params = self.check.params(shared_params)

    def _where(self, batch: Batch) -> list[Tensor]:
        if batch.features:
            return list(batch.features)
        if self.shared_params is not None:
            return self.shared_params
        masks = batch.masks
        mine = [p for p in parameters(self) if masks is None or p in masks]
        return [p for p in mine if masks is not None and masks[p] & (masks[p] - 1)] or mine

    def _rows(self, batch: Batch) -> Iterable[Row]:
        """The gradient of each loss where it is to be measured."""
        where = self._where(batch)
        rows = batch.rows_at(where)
        if batch.features or self.shared_params is not None or len(batch.names) < 2:
            return rows
        layout = Layout([group["params"] for group in self.param_groups])
        habits = Habits(
            keeps_rows=False, moves_unreached=False, undecided=False, acts_on_private=False, streaming=False
        )
        sharing = Sharing(batch, layout, self.settings, self.transaction, habits, self.phase)
        is_open = sharing.doubtful(where) or (batch.accumulated is None and batch.undecided(where))
        return sharing.really_shared(where, list(rows)) if is_open else rows

    def _sizes(self, batch: Batch, measure: Callable[[Row, torch.device], Tensor]) -> Tensor | None:
        """Apply a function, homogeneous of degree 1, to the gradient of each loss; None in steps that reuse weights."""
        if self.phase != "solve":
            return None
        sizes = []
        for name, row in zip(batch.names, self._rows(batch), strict=True):
            if batch.features and all(g is None for g in row):
                raise RuntimeError(f"{self._name}.backward: loss {name!r} does not reach `features`.")
            sizes.append(measure(row, batch.values.device))
        return torch.stack(sizes) / batch.loss_scale.to(batch.values.device, torch.float64)


def training_rates(
    owner: Weighter, losses: np.ndarray, given: Mapping[str, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Relative inverse training rates, (lᵢ/lᵢ(0)) / meanⱼ (lⱼ/lⱼ(0)).

    Args:
        owner: The method; its memory may have "initial_losses".
        losses: Values of the present losses, (m,).
        given: Initial losses from the user, by name, or None.

    Returns:
        The initial losses, (m,), and the rates, (m,), of mean 1. If all losses are 0 all rates are 1.

    Raises:
        ValueError: A loss is negative, or not positive the first time, or has no entry in `given`.
    """
    if given is None:
        first = owner.recall("initial_losses", losses)
        bad = {name: float(x) for name, x in zip(owner.names, first, strict=True) if not x > 0}
        if bad:
            raise ValueError(
                f"{owner.display_name}: every loss must be > 0 the first time, since later values are compared with "
                f"it; got {bad}. Nothing was written. `initial_losses` takes values from theory instead; or pass None "
                "for it in that batch."
            )
    else:
        first = np.array(picked(owner, "initial_losses", given))
    require_nonnegative(owner, losses, "it is compared with its initial value")
    rates = np.minimum(ratio(losses, first), 1e300 / len(losses))
    mean = rates.mean()
    return first, rates / mean if mean > 0 else np.ones(len(rates))
