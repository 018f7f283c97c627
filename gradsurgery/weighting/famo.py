"""FAMO: lower all losses at the same relative pace, at the cost of one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, picked, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FAMOWeighter(RecordingWeighter):
    """Learn weights under which all losses fall by the same factor in each step.

    With zᵢ = softmax(ξ)ᵢ and Dᵢ = lᵢ − `min_losses`, the weights are c zᵢ/Dᵢ, where c makes their sum m (1 in the
    paper: use `reduction="mean"`). After the step, δᵢ = log Dᵢ(before) − log Dᵢ(after) is how far each loss fell, and
    Adam moves ξ along zᵢ (δᵢ − Σ zⱼ δⱼ) plus a decay: a loss that fell less than the others gets more weight.
    Multiplying a loss by a constant, over the whole run, does not turn the direction. The first step is that of
    :class:`RealTimeWeighter`.

    The values after the step come from :meth:`update`, on the same batch and in the same mode of the model, which is
    the paper's way and costs a forward pass. If it is not called, the losses of the next ``backward`` serve: free, but
    another batch adds its noise.

    Paper: Liu, Feng, Stone and Liu, FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023, arXiv 2306.03792
    (algorithm 1).

    Departures: no 1e-8 in the logarithms: a loss at or below its bound is refused. The official code also clips the
    model's gradient to norm 1; do so between ``backward`` and ``step`` if you want it. `decay` is 1e-5 to 0.01 in the
    official scripts, 1e-3 in other libraries.

    Args:
        optimizer: The torch optimizer that makes the step.
        lr: Step size of ξ.
        decay: Weight decay of ξ ≥ 0, which pulls towards equal z.
        min_losses: Lower bounds of the losses, one number or by name or in the order of the losses.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not above its bound.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 4.0]))
        >>> optimizer = gradsurgery.FAMOWeighter(torch.optim.SGD([w], lr=0.1))
        >>> optimizer.backward({"class": w[0] ** 2, "box": w[1] ** 2 / 4}).weights
        {'class': 1.6, 'box': 0.4}
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     optimizer.update({"class": w[0] ** 2, "box": w[1] ** 2 / 4})
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr: float = 0.025,
        decay: float = 1e-3,
        min_losses: float | Mapping[str, float] | Sequence[float] = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.lr = self.check.number("lr", lr, above=0.0)
        self.decay = self.check.number("decay", decay, least=0.0)
        self.min_losses = self.check.one_or_each("min_losses", min_losses)

    def update(self, losses: Mapping[str, Any] | Iterable[Any] | Tensor) -> None:
        """Learn from the losses after the step, on the batch of the last ``backward``.

        Call it after ``step()``, before the next ``backward``. Where no step was made since ``backward``, because a
        gradient scaler skipped it or the batch was not finite, nothing happens, ``zero_grad()`` in between or not.

        Args:
            losses: Values or tensors, with or without a graph, named and ordered as in ``backward``; None for an absent
                task.

        Raises:
            RuntimeError: There was no ``backward`` since the last call.
            ValueError: A name is unknown, or a loss is not a number above its bound. Nothing changes then.
        """
        where = f"{self._name}.update"
        learnt = self.transaction.learnt
        if not self.transaction.stepped:
            return
        if not learnt.get("before"):
            raise RuntimeError(f"{where}: there is no step to learn from. Call backward(), step(), then update() once.")
        named = losses.items() if isinstance(losses, Mapping) else ((str(i), x) for i, x in enumerate(losses))
        after = {str(k): float(v.detach() if isinstance(v, Tensor) else v) for k, v in named if v is not None}
        known = learnt["tasks"]
        if not set(after) <= set(known):
            raise ValueError(f"{where}: `losses` must have the names of the losses, {known}; got {list(after)}.")
        with self.transaction.revising(tuple(known), tuple(after)):
            self._learn(self._logs(np.array(list(after.values()))))
            self.memory["before"] = {}

    def coefficients(self, losses: np.ndarray, measured: np.ndarray | None = None) -> np.ndarray:
        self._learn(self._logs(losses))
        return super().coefficients(losses, measured)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        return softmax(self.recall("logits", 0.0) - self._logs(losses))

    def observe(self, losses: np.ndarray) -> None:
        self.memory["before"] = dict(zip(self.names, self._logs(losses).tolist(), strict=True))

    def _logs(self, losses: np.ndarray) -> np.ndarray:
        bound = self.min_losses
        above = losses - (np.array(picked(self, "min_losses", bound)) if isinstance(bound, dict) else bound)
        bad = {k: float(x) for k, x, d in zip(self.names, losses, above, strict=True) if not 0 < d < np.inf}
        if bad:
            raise ValueError(
                f"{self._name}: every loss must be finite and above its bound in `min_losses`, got {bad}. "
                "Nothing was changed. Where a loss reaches its bound now and then, pass None for it in that batch, or "
                "lower the bound."
            )
        return np.log(above)

    def _learn(self, logs: np.ndarray) -> None:
        """Move the logits of the tasks that have a value both before and after the step."""
        before = self.memory.get("before", {})
        pairs = [(name, log) for name, log in zip(self.names, logs, strict=True) if name in before]
        if not pairs:
            return
        names = [name for name, _ in pairs]
        old, new = self.recall("before", 0.0, names), np.array([log for _, log in pairs])
        logits = self.recall("logits", 0.0, names)
        z = softmax(logits) / len(logits)
        surplus = old - new - z @ (old - new)
        # Adam has no epsilon here, so what is nothing but rounding must not move the logits.
        noise = 8 * np.finfo(np.float64).eps * (np.abs(old) + np.abs(new) + 1).max()
        surplus[np.abs(surplus) <= noise] = 0.0
        moved = self.descend("logits", logits, z * surplus + self.decay * logits, self.lr, "adam", names)
        self.keep("logits", moved, names)
