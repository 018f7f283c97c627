"""MoDo: min-norm weights learnt step by step, from independent batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery import losses as losses_module
from gradsurgery.gradients import rows as rows_module
from gradsurgery.losses import Losses
from gradsurgery.optimizer import told
from gradsurgery.report import Report
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DoubleSampling(Surgery):
    """Base of the methods whose weights come from the products J₁J₂ᵀ of the gradients of two independent batches.

    On one batch J Jᵀ is a biased estimate of that of the expected gradients: its diagonal has the variance of the noise
    on top. The product of two independent batches is unbiased. Every further batch costs m backward passes and m rows
    of memory.

    Args:
        optimizer: The optimizer that makes the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.
    """

    stateful = True
    observes = True
    rows_repeat_tasks = True

    def __init__(self, optimizer: Optimizer, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self._batches: list[Any] = []  # changed in place, as all that lasts for a call

    @told
    def backward(self, losses: Losses, *, independent: Iterable[Losses] = (), **options: Any) -> Report:
        """Turn the losses into gradients and add them to ``.grad``.

        Args:
            losses: The losses of the batch that the direction is for, as for every method.
            independent: The same losses on further batches, drawn independently: none, one (J₁; J₂ is `losses`), or two
                (J₁ and J₂). Only the weights read them; they give no gradient to private parameters. Under `log_losses`
                each gradient is divided by the loss of its own batch. Their graphs are not freed by the call itself.
                Not with micro-batches.
            **options: The other arguments of :meth:`gradsurgery.optimizer.MultiLossOptimizer.backward`.

        Returns:
            What happened; also kept as `report`.

        Raises:
            ValueError: There are more than two further batches, one lacks a loss that is present, or micro-batches are
                accumulated.
        """
        batches = self._checked([losses_module.read(batch, self._name) for batch in independent])
        if batches and (options.get("accumulate") or self.accumulated):
            raise ValueError(
                f"{self._name}.backward: `independent` has no meaning for gradients that are accumulated over "
                "micro-batches."
            )
        if batches:  # they may be parts of one forward pass: the graph is needed until the last of them
            options["retain_graph"] = True
        self._batches[:] = batches
        try:
            return super().backward(losses, **options)
        finally:
            self._batches.clear()

    def combine(
        self,
        rows: Tensor,
        losses: Sequence[float] | Tensor | None = None,
        update: bool = False,
        independent: Sequence[Tensor] = (),
    ) -> Tensor:
        """The direction for given rows, without any model.

        Args:
            rows: Gradients of m losses, (m, n).
            losses: Their values, (m,).
            update: Commit what the method learns, as a step would.
            independent: Gradients of the same losses on up to two further batches, each (m, n). Not with `log_losses`,
                which would need their losses.

        Returns:
            The direction, (n,).

        Raises:
            ValueError: `independent` has more than two entries, or one of another shape than `rows`, or comes with
                `log_losses`.
        """
        if len(independent) and self.log_losses:
            raise ValueError(
                f"{self._name}.combine: log_losses=True divides each gradient by its loss, and the losses of the "
                "batches in `independent` are not known here. Divide the rows of each batch by its losses, and leave "
                "out log_losses."
            )
        if any(batch.shape != rows.shape for batch in independent):
            raise ValueError(f"{self._name}.combine: `independent` must hold matrices of the shape of `rows`.")
        self._batches[:] = self._checked(list(independent))
        try:
            return super().combine(rows, losses, update)
        finally:
            self._batches.clear()

    def _checked(self, batches: list[Any]) -> list[Any]:
        if len(batches) > 2:
            raise ValueError(f"{self._name}: `independent` must hold at most two batches, got {len(batches)}.")
        return batches

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        rows = list(rows)
        for batch in self._batches:
            if isinstance(batch, Tensor):
                rows += [[rows_module.wide(row.detach())] for row in batch]
                continue
            missing = [name for name in self.names if name not in batch.present]
            if missing:
                raise ValueError(f"{self._name}.backward: a batch in `independent` lacks the losses {missing}.")
            rows += self.further_rows(batch, params)
        return rows

    def cross(self, gram: np.ndarray) -> tuple[np.ndarray, float]:
        """The products of the two batches, taken from the inner products of all rows.

        Args:
            gram: Inner products of the rows of `losses` and of the further batches, one batch after the other.

        Returns:
            J₁J₂ᵀ, (m, m), J Jᵀ if there is one batch only; and the mean over the tasks of the product of both lengths.
        """
        m = len(self.names)
        first = slice(m, 2 * m) if len(gram) > m else slice(0, m)
        second = slice(2 * m, 3 * m) if len(gram) > 2 * m else slice(0, m)
        lengths = np.sqrt(gram.diagonal())
        return gram[first, second], float(np.mean(lengths[first] * lengths[second]))


class MoDo(DoubleSampling):
    """Move the weights by one projected gradient step towards those of MGDA, with independent batches for every factor.

    λ ← Π(λ − γ (J₁J₂ᵀ λ + ρλ)) with Π the projection on the simplex, then d = J₃ᵀλ: J₁ and J₂ are the gradients on the
    batches in ``backward(losses, independent=[first, second])``, and J₃ those of `losses`. With one further batch J₂ is
    J₃; with none all three are the same, and λ follows the projected gradient descent for MGDA's problem.

    Losses may rise to first order. γ and ρ are absolute, so the direction is not homogeneous: long gradients throw λ
    into a corner in one step. `relative` fixes that.

    Paper: Chen, Fernando, Ying & Chen, Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
    and Conflict-Avoidance, NeurIPS 2023 and JMLR 2024, arXiv 2305.20057. Authors' code and its ports differ in γ and ρ.

    Departures: with ``reduction="sum"`` the direction is multiplied by m, so that m equal rows g give m·g. Public code
    averages the gradients of private parameters over the batches; here they come from `losses`.

    Args:
        optimizer: The optimizer that makes the step.
        gamma: γ ≥ 0, step of the weights. 0 keeps them equal.
        rho: ρ ≥ 0, pulls the weights towards equality.
        relative: Divide J₁J₂ᵀ by the mean product of the lengths of its rows: the direction becomes positively
            homogeneous.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> gradsurgery.MoDo(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean").combine(rows)
        tensor([0.8500, 0.5750])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gamma: float = 0.1,
        rho: float = 0.1,
        relative: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.gamma = self.check.number("gamma", gamma, least=0.0)
        self.rho = self.check.number("rho", rho, least=0.0)
        self.relative = bool(relative)
        self.degree = 1.0 if self.relative else None

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        products, size = self.cross(gram)
        if self.relative:
            products = products / (size or 1.0)
        shares = self.recall_shares("shares")
        shares = geometry.project_simplex(shares - self.gamma * (products @ shares + self.rho * shares))
        self.keep_shares("shares", shares)
        return len(shares) * shares
