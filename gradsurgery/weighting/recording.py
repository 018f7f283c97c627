"""What the weighters that remember losses have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from gradsurgery.weighting.base import Weighter

#: Bounds of learnt logarithms of weights: e to their power is still an ordinary number.
LOG_LIMIT = 690.0
#: So many steps without an end make a long first epoch.
EPOCH_STEPS = 1000


class RecordingWeighter(Weighter):
    """Base of the weighters that record the losses of every step, those that reuse weights or warm up included.

    A method overrides :meth:`observe`, and :meth:`roll` if it also works by epochs.

    Args:
        optimizer: The torch optimizer that makes the step.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.
    """

    stateful = True

    def observe(self, losses: np.ndarray) -> None:
        """Record the losses of a step, after its weights are found.

        Args:
            losses: Values of the present losses, (m,).
        """

    def roll(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in the memory when an epoch ends.

        Args:
            memory: The memory before. It must not be changed.

        Returns:
            The entries that change.
        """
        return {}

    def coefficients(self, losses: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        weights = super().coefficients(losses, measured)
        self.observe(losses)
        return weights

    def _end_epoch(self) -> None:
        self.transaction.revise(self.roll)

    def add_up(self, losses: np.ndarray) -> None:
        """Add the losses to the sums of this epoch.

        Args:
            losses: Values of the present losses, (m,).
        """
        self.keep("epoch.sum", self.recall("epoch.sum", 0.0, like=losses) + losses)
        self.keep("epoch.count", self.recall("epoch.count", 0.0, like=losses) + 1)

    def expect_epoch_end(self, key: str, meanwhile: str = "all weights stay 1") -> None:
        """Say so, once, where the first epoch does not end.

        Args:
            key: What the memory has once an epoch has ended.
            meanwhile: What holds until then.
        """
        # Steps, since counts may lie on a device.
        if key not in self.memory and self.memory["step"] + 1 >= EPOCH_STEPS:
            self.warn_once(
                "epoch_end",
                f"{self._name}: epoch_end() has not been called in {EPOCH_STEPS} steps, and until it is {meanwhile}. "
                "Call optimizer.epoch_end() after each epoch. If the first epoch is longer than that, ignore "
                "this.",
            )

    def held(self, key: str) -> np.ndarray:
        """Weights that the memory holds, 1 where it holds none. If tasks are absent the others get their share.

        Args:
            key: Name in the memory.

        Returns:
            Weights of the present tasks, (m,), with the usual total per task.
        """
        weights = self.recall(key, 1.0)
        kept = self.memory.get(key, {})
        everyone = np.array([kept.get(name, 1.0) for name in self.memory["tasks"]])
        if len(everyone) == len(weights):
            return weights
        return shared_out(weights, len(weights) * everyone.mean())


def shared_out(weights: np.ndarray, total: float) -> np.ndarray:
    """Rescale weights to a total; equal ones if all are zero.

    Args:
        weights: (m,), none negative.
        total: The sum to reach.

    Returns:
        (m,).
    """
    present = weights.sum()
    return weights * (total / present) if present > 0 else np.full(len(weights), total / len(weights))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax times the number of entries; scores may be infinite.

    Args:
        scores: (m,).

    Returns:
        Positive weights, (m,), with sum m.
    """
    powers = np.exp(bounded(scores) - bounded(scores).max())
    return powers * (len(powers) / powers.sum())


def bounded(x: np.ndarray) -> np.ndarray:
    """Replace infinities by very large numbers whose differences are finite.

    Args:
        x: Numbers.

    Returns:
        Finite numbers.
    """
    return np.clip(x, -1e300, 1e300)


def ratio(above: np.ndarray | float, below: np.ndarray) -> np.ndarray:
    """Divide; what overflows becomes the largest number.

    Args:
        above: Numbers.
        below: Positive numbers.

    Returns:
        Finite numbers.
    """
    with np.errstate(over="ignore"):
        return np.minimum(np.divide(above, below), np.finfo(np.float64).max)


def means(memory: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss of each task over an epoch, from the sums that :meth:`RecordingWeighter.add_up` keeps.

    Args:
        memory: The memory.

    Returns:
        By name; tasks without a loss in this epoch are not in it.
    """
    counts = memory.get("epoch.count", {})
    return {name: total / counts[name] for name, total in memory.get("epoch.sum", {}).items() if counts[name]}


def picked(owner: Weighter, argument: str, given: Mapping[str, Any]) -> list[Any]:
    """Look up what the user gave for each present task.

    Args:
        owner: The method.
        argument: Name of the argument, for the error.
        given: By name, or in order.

    Returns:
        One entry per present task.
    """
    return owner.each(argument, given)


def require_nonnegative(owner: Weighter, losses: np.ndarray, why: str) -> None:
    """Refuse negative losses by name.

    Args:
        owner: The method.
        losses: Values of the present losses, (m,).
        why: What would go wrong.

    Raises:
        ValueError: A loss is negative.
    """
    if isinstance(losses, Tensor) or (losses >= 0).all():  # tensors are looked at in the next call
        return
    bad = {name: float(loss) for name, loss in zip(owner.names, losses, strict=True) if not loss >= 0}
    if bad:
        raise ValueError(f"{owner.display_name}: every loss must be >= 0, since {why}; got {bad}. Nothing was written.")


def step_size(owner: Weighter, lr: float | None) -> float:
    """Step size of learnt weights.

    Args:
        owner: The method.
        lr: What the user gave; None for the learning rate of the first parameter group.

    Returns:
        The step size.
    """
    return float(owner.param_groups[0]["lr"]) if lr is None else lr
