"""What happens to values that are not finite, and to sums that a dtype cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gradsurgery.batch import Batch
from gradsurgery.communication import shards
from gradsurgery.gradients import rows as rows_module
from gradsurgery.settings import Settings
from gradsurgery.transaction import Transaction


class Guard:
    """The policy `nonfinite` in one call.

    Where a gradient scaler is at work everything is written: it has to see inf and nan to skip the step. In every case
    the call is rejected, since a step that should not happen teaches nothing.

    Args:
        batch: The losses.
        settings: The switches of the method.
        transaction: Its memory.
    """

    def __init__(self, batch: Batch, settings: Settings, transaction: Transaction) -> None:
        self._batch = batch
        self._skips = settings.nonfinite == "skip"
        self._transaction = transaction

    def stops(self, finite: np.ndarray, what: str, wrong: str = "is not finite") -> bool:
        """Look at something of each loss.

        Args:
            finite: Whether it is as it should be, (m,).
            what: What it is, for the error.
            wrong: What is wrong with it otherwise.

        Returns:
            True if nothing is to be written.

        Raises:
            RuntimeError: The policy is "raise".
        """
        if finite.all() or self._transaction.rejected:
            return False
        self._transaction.flag("nonfinite")
        self._transaction.reject()
        if self._batch.is_scaled:
            return False
        if self._skips:
            self._transaction.flag("skipped")
            return True
        bad = [name for name, ok in zip(self._batch.names, finite, strict=True) if not ok]
        raise RuntimeError(
            f"{self._batch.owner}.backward: {what} of {', '.join(map(repr, bad))} {wrong}. Nothing was "
            'written. nonfinite="skip" passes over such a batch, nonfinite="drop" leaves out a loss whose value is '
            "not finite."
        )

    def fitting(self, weights: np.ndarray, largest: Callable[[], np.ndarray | float]) -> np.ndarray | None:
        """Look at weights that what they multiply may not be able to hold.

        Args:
            weights: As they are applied, (m,), or one for each of the rows that the method has.
            largest: Gives the largest number of what they multiply, or one each.

        Returns:
            The weights; None if nothing is to be written.
        """
        comm = self._batch.comm
        if comm.is_alone and sum(map(abs, weights.tolist())) <= rows_module.LEAST_RANGE:  # as almost always
            return weights
        most = largest()
        fits = np.abs(weights) <= most  # nan does not
        if not comm.is_alone and not (np.abs(weights) <= rows_module.LEAST_RANGE).all():
            # All have the same weights, but a loss that others lack may be in half precision.
            fits = comm.any_of(torch.from_numpy((~fits).astype(np.uint8))).numpy() == 0
        if fits.all():
            return weights
        if self._batch.is_scaled:
            return np.where(np.isnan(weights) | fits, weights, np.copysign(np.inf, weights))
        shown = ", ".join(f"{w:.3g}" for w in weights[~fits])
        wrong = (
            f"is out of range ({shown}; the largest number of the dtype is {np.min(most):.3g}), so inf or nan would be "
            "written. `max_weight` bounds the weights"
        )
        m = len(self._batch.names)
        of_losses = fits if len(fits) == m else np.full(m, False)
        return None if self.stops(of_losses, "the weight", wrong) else weights

    def spoiled(self, gradients: Sequence[Tensor | None], doubtful: bool, unseen: bool) -> bool:
        """Look for inf and nan in new gradients.

        Args:
            gradients: The gradients.
            doubtful: Sums may have overflowed.
            unseen: What they are made of was never looked at, which is done under the policy "skip" alone.

        Returns:
            True if nothing is to be written.

        Raises:
            RuntimeError: A sum has overflowed, and the policy is not "skip".
        """
        looks = doubtful or (unseen and self._skips)
        grads = [g for g in gradients if g is not None] if looks and not self._batch.is_scaled else []
        if not grads:
            return False
        worst = self._batch.comm.total(rows_module.peak([shards.local(g) for g in grads], grads[0].device))
        if bool(torch.isfinite(worst)):
            return False
        if not self._skips:
            dtypes = ", ".join(sorted({str(g.dtype).removeprefix("torch.") for g in grads}))
            raise RuntimeError(
                f"{self._batch.owner}.backward: every gradient is finite, and their weighted sum overflows {dtypes}. "
                "Nothing was written. Divide the losses by a constant, bound the weights with `max_weight`, or keep "
                'the parameters in a wider dtype. nonfinite="skip" passes over such a batch.'
            )
        self._transaction.reject()
        self._transaction.flag("nonfinite")
        self._transaction.flag("skipped")
        return True
